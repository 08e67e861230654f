"""The target rows as the live model sees them, for a weighter that holds examples against them."""

from __future__ import annotations

import math

import torch

from dataflex import distributed
from dataflex.errors import ConfigError
from dataflex.features.batching import collate
from dataflex.features.inference import evaluation
from dataflex.features.pooling import exact_pool
from dataflex.pipelines.run import Run
from dataflex.trainers.micro_batch import capturing
from dataflex.weighters.adapt import unit
from dataflex.weighters.base import NativeWeighter


class Anchors:
    """Embeds all target rows when the weighter says that it is time; each rank embeds its share.

    Args:
        run: has the target sets.
        weighter: takes the mean of the rows' unit vectors.

    Raises:
        ConfigError: there are no target rows.
    """

    def __init__(self, run: Run, weighter: NativeWeighter):
        self._run, self._weighter = run, weighter
        self._examples = [rows.examples[i] for rows in run.targets.values() for i in range(len(rows))]
        if not self._examples:
            raise ConfigError("eval_dataset: found no rows; the weighter weighs examples by how near they are to these")

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """Embed the anchors before the step that follows `step` others, if they are due. Collective."""
        if not self._weighter.due(step):
            return
        trainer = self._run.trainer
        size, world = self._weighter.anchor_batch_size, distributed.world()
        mine = list(distributed.shard(self._examples, distributed.rank(), world))
        # As many passes on every rank: sharded weights are put together by all of them at once.
        passes = math.ceil(math.ceil(len(self._examples) / world) / size)
        total = torch.zeros(trainer.model.config.get_text_config().hidden_size, dtype=torch.float64)
        total = total.to(trainer.args.device)
        pad, side = trainer.processing_class.pad_token_id or 0, "right"
        with evaluation(trainer.model):
            for number in range(passes):
                some = mine[number * size : (number + 1) * size]
                batch = collate(some or self._examples[:1], pad, side, trainer.args.device)
                with trainer.accelerator.autocast(), capturing(trainer.model) as states:
                    trainer.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                if some:
                    total += unit(exact_pool(states[-1], batch.attention_mask.bool())).sum(dim=0)
        total = distributed.all_gather_rows(total).sum(dim=0)
        self._weighter.set_anchors(total / len(self._examples), step)
