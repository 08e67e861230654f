"""Data-centric training of language models on LLaMA-Factory: featurize once, select while training."""

from dataflex.components.registry import register_selector

__all__ = ["__version__", "register_selector"]

__version__ = "0.1.0"
