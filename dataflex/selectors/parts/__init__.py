"""What methods are put together from: representations, similarities, rules."""
