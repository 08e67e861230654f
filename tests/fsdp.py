"""`dataflex` on CPU processes whose models FSDP2 shards: `torchrun ... tests/fsdp.py VERB RUN [VERB RUN ...]`.

The environment is what `accelerate launch` makes of LLaMA-Factory's `examples/accelerate/fsdp2_config.yaml`. Accelerate
enters FSDP where there is a device alone; here its state is told so before it prepares a model, as it would tell
itself, and all else is what runs on devices.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from dataflex import distributed
from dataflex.config import load
from dataflex.features.sharded import is_dealt_out
from dataflex.llamafactory import workflow
from dataflex.pipelines.featurize import featurize
from dataflex.pipelines.train import train
from tests.workspace import cut_back

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def shard_on_cpu() -> None:
    """Make every `Accelerator` from here on shard by FSDP2, as the environment says."""
    workflow._require_devices = lambda arguments: None
    begin, prepare = Accelerator.__init__, Accelerator.prepare

    @functools.wraps(begin)
    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        plugin = FullyShardedDataParallelPlugin()
        if self.state.mixed_precision != "no":
            plugin.set_mixed_precision(self.state.mixed_precision)
        self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every new state begins as this one

    def prepared(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = prepare(self, *args, **kwargs)
        for each in found if isinstance(found, list | tuple) else [found]:
            assert is_dealt_out(each) or not isinstance(each, torch.nn.Module), "FSDP2 was not entered"
        return found

    Accelerator.__init__, Accelerator.prepare = begun, prepared


def again(settings: Any) -> None:
    """Go on with a finished run from its checkpoint at step 4."""
    if distributed.is_main():
        cut_back(Path(settings.llamafactory["output_dir"]), 4)
    distributed.barrier()
    train(settings)


def main(commands: list[str]) -> None:
    distributed.prepare()
    shard_on_cpu()
    for verb, path in zip(commands[::2], commands[1::2], strict=True):
        {"featurize": featurize, "train": train, "again": again}[verb](load(Path(path)))
    distributed.leave()


if __name__ == "__main__":
    main(sys.argv[1:])
