"""A mixer of the documented interface is handed what the model takes, and the same after a resume."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.mixers import Mixer, register_mixer
from tests.workspace import assert_equal_weights, cut_back, mix

SEEN: list[tuple[int, list[int] | None, list[int] | None]] = []


@register_mixer("by_batch")
class ByBatch(Mixer):
    """Runs the model on the batch that it is handed, and draws by what it finds."""

    def mix(self, model: Any, step_id: int, **kwargs: Any) -> np.ndarray:
        batch, domains = kwargs["batch"], kwargs["domain_ids"]
        SEEN.append((step_id, batch and batch["input_ids"][:, :40].flatten().tolist(), batch and domains.tolist()))
        if batch is None:
            return np.ones(3) / 3
        with torch.no_grad():
            loss = float(model(**batch).loss)
        return np.array([1.0, loss, 1.0 + float(domains.sum())])


@pytest.mark.slow
def test_a_batch_is_what_the_model_takes_and_the_same_after_a_resume(workspace: Any) -> None:
    """Between updates, and right at one, where the batch is of a step before the checkpoint."""
    section = {"plugins": ["tests.test_custom_mixer"]}
    keys = {"component_name": "by_batch", "update_step": 2, "update_times": -1, "dataflex": section}
    keys |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "train_step": 7}
    keys |= {"save_strategy": "steps", "save_steps": 1}
    SEEN.clear()
    workspace.run("train", mix(workspace, "whole", **keys))
    whole = list(SEEN)
    assert [step for step, _, _ in whole] == [0, 2, 4, 6]
    assert [batch is None for _, batch, _ in whole] == [True, False, False, False]
    for step in (3, 4):
        out = workspace.folder / "out"
        cut_back(shutil.copytree(out / "whole", out / f"from-{step}"), step)
        SEEN.clear()
        workspace.run("train", mix(workspace, f"from-{step}", **keys))
        assert [one for one in whole if one[0] >= step] == SEEN
        assert_equal_weights(workspace.weights(f"from-{step}"), workspace.weights("whole"))
