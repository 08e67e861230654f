"""Proportions from a table of finished runs: a law fitted for each metric, and the mixture that it puts first."""
