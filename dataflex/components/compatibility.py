"""Parameters of DataFlex's reference implementation that have nothing to act on here.

They are accepted, so that its run files load unchanged, and whoever sets one is told that it has no effect.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

_REASONS = {
    "assignment_chunk_size": "FAISS assigns all rows in one search",
    "cache_dir": "a method that asks for no features keeps nothing",
    "clustering_batch_size": "batches are filled by tokens (dataflex.token_budget)",
    "embedding_model_dtype": "an encoder is loaded as Transformers loads it by default",
    "save_interval": "whatever is computed is kept by fragments (dataflex.fragment_rows)",
    "score_batch_size": "batches are filled by tokens (dataflex.token_budget)",
    "score_num_workers": "rows are tokenized before they are scored",
}


def accepted(name: str, default: Any, **bounds: Any) -> Any:
    """Return the field of a parameter without effect."""
    return Field(default, description=f"without effect: {_REASONS[name]}", json_schema_extra={"acts": False}, **bounds)


def without_effect(params: BaseModel) -> list[str]:
    """Say of each parameter that was set and has no effect why that is."""
    return [
        f"{name} has no effect: {_REASONS[name]}"
        for name, field in type(params).model_fields.items()
        if name in params.model_fields_set and field.json_schema_extra == {"acts": False}
    ]
