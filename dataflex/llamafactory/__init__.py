"""Everything that touches the `llamafactory` package: arguments, rows with their origin, the training workflow.

No other part of DataFlex imports it, so an upstream change is met here and nowhere else.
"""
