"""Runs with a selector: warm-up, updates, and what is recorded of them."""
