"""Runnable run files, and the quickstart."""
