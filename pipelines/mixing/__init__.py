"""Runs with a mixer: domains, their shares, and what a mixture leaves behind."""
