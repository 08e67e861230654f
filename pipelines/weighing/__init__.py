"""Runs with a weighter."""
