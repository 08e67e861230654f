"""The run file: LLaMA-Factory's keys, DataFlex's flat keys, and one `dataflex:` mapping."""

from dataflex.config.loading import load
from dataflex.config.settings import Settings, store_root

__all__ = ["Settings", "load", "store_root"]
