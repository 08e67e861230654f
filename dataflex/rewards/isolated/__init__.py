"""What runs in the two processes of a `unit_tests` reward: `response.py` has the code, `trial.py` the tests.

Both are run as scripts by `dataflex/rewards/confine.py` and import nothing of DataFlex but what lies in this folder.
"""
