"""The embedded default: a pool of generated tasks, a tiny language model, and the demo that runs on them."""
