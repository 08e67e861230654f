"""Checkpoints as files: whole or noticed, and read without running what a pickle may hold."""
