"""`dataflex` on CPU processes whose models FSDP2 shards: `torchrun ... tests/fsdp.py VERB RUN [VERB RUN ...]`.

Accelerate enters FSDP where there is a device alone; here its state is told so before it prepares a model, as it
would tell itself, and all else is what runs on devices.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def shard_on_cpu() -> None:
    """Make every `Accelerator` from here on shard by FSDP2."""
    begin = Accelerator.__init__

    @functools.wraps(begin)
    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True
        )
        if self.state.mixed_precision != "no":
            plugin.set_mixed_precision(self.state.mixed_precision)
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every new state begins as this one

    Accelerator.__init__ = begun  # type: ignore[method-assign]


def main(commands: list[str]) -> None:
    from dataflex import distributed
    from dataflex.config import load
    from dataflex.pipelines.featurize import featurize
    from dataflex.pipelines.train import train

    distributed.prepare()
    shard_on_cpu()
    for verb, path in zip(commands[::2], commands[1::2], strict=True):
        {"featurize": featurize, "train": train}[verb](load(Path(path)))
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
