"""The part of an example that a loss is taken of. T tokens of the example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dataflex.features.spec import FeatureSpec, LossSpec
from dataflex.fingerprint import IGNORE_INDEX


def excerpt(example: Mapping[str, Any], spec: FeatureSpec) -> Mapping[str, Any]:
    """Return the example as a feature sees it: whole, for all but two kinds of loss.

    `given: nothing` cuts off what stands before the first supervised token, which then has no predecessor and is not
    predicted. `first_token: drop` keeps what stands before it and takes the token's label away, so that the two are
    losses of the same tokens.

    Args:
        example: `input_ids`, `labels` and what is as long as they are, (T,) each.
        spec: the feature.
    """
    if not isinstance(spec, LossSpec) or spec == LossSpec():
        return example
    labels = np.array(example["labels"])
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    first = int(supervised[0]) if len(supervised) else 0
    if spec.given == "nothing":
        return {name: values[first:] for name, values in example.items() if values is not None}
    labels[first] = IGNORE_INDEX
    return {**example, "labels": labels}
