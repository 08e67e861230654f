"""The losses of a reference model on the tokens that a run is trained on: kept in a store, or computed beside it."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dataflex import distributed
from dataflex.errors import ConfigError, MismatchError
from dataflex.features.cross_entropy import token_losses
from dataflex.features.head import find_head
from dataflex.mixers.base import NativeMixer
from dataflex.rows import Status
from dataflex.trainers.directing import DirectedTrainer
from dataflex.trainers.micro_batch import MicroBatch

if TYPE_CHECKING:  # a run checks its reference when it is put together
    from dataflex.pipelines.run import Run


def reference_losses(run: Run, mixer: NativeMixer) -> StoredReference | LiveReference | None:
    """Return what gives a micro-batch's reference losses (B, T), or None where the mixer has no reference. Collective.

    Raises:
        MismatchError: the reference is no model of this run's tokenizer, or, if its losses are to be stored, not of
            this run's architecture.
        ConfigError: rows are padded on the left, so that stored losses are not where the tokens are; or the reference
            is to stand beside a model whose weights ZeRO-3 or FSDP2 deals out.
    """
    path = mixer.reference_model_path
    if path is None:
        return None
    if mixer.reference_is_live:
        if not run.state.sharding.has_whole_weights:
            raise ConfigError(
                f"reference: found live under {run.state.sharding.name}, which would shard the reference without "
                "running it; take ZeRO-2 or DDP"
            )
        return LiveReference(path, run.trainer)
    if run.trainer.processing_class.padding_side != "right":
        raise ConfigError(
            "padding_side: found left; a reference's stored losses expect rows that begin at their first token"
        )
    (need,) = (need for need in mixer.needs() if need.spec.is_by_token)
    (store,) = run.access.ensure([need.spec], run.rows, need.state)
    return StoredReference(run.access.view(need.spec, run.rows, store), run.trainer.args.device)


def check_reference(run: Run) -> None:
    """Look at the folder of the method's reference model, if it has one.

    Raises:
        CorruptionError: it is a damaged checkpoint.
        MismatchError: its tokenizer is not the run's.
    """
    for path in [each.reference_model_path for each in run.methods if each.reference_model_path is not None]:
        run.state.require_whole(path)
        _check_vocabulary(path, run.trainer.processing_class)


class StoredReference:
    """Losses by row in one file that is mapped into memory; one process of each node writes it from the store.

    A row that the reference gave no finite loss has NaN for all of its tokens. A step's rows are read before its first
    micro-batch, so that none waits for the device.

    Args:
        view: of the training rows' token losses.
        device: where losses go.
    """

    def __init__(self, view: Any, device: torch.device):
        self._device = device
        folder = None
        if distributed.local_rank() == 0:
            self._scratch = tempfile.TemporaryDirectory(prefix="dataflex-reference-")  # removed with this object
            folder = self._scratch.name
            shape = len(view.keys), view.store.layout.width
            kind = np.float32 if view.store.layout.storage == "float32" else np.float16
            out = np.lib.format.open_memmap(Path(folder) / "losses.npy", mode="w+", dtype=kind, shape=shape)
            out[view.status != Status.OK] = np.nan
            for rows, vectors in view.blocks():
                out[rows] = vectors
            out.flush()
        found = distributed.gather(folder)[distributed.rank() - distributed.local_rank()]
        assert found is not None
        self._losses = np.load(Path(found) / "losses.npy", mmap_mode="r")
        self._ready: deque[Tensor] = deque()

    def prefetch(self, rows: Sequence[Tensor]) -> None:
        """Read the losses of a step's micro-batches, of rows (B,) each."""
        found = torch.from_numpy(np.asarray(self._losses[torch.cat(list(rows)).cpu().numpy()], dtype=np.float32))
        if self._device.type == "cuda":
            found = found.pin_memory()
        self._ready = deque(found.to(self._device, non_blocking=True).split([len(some) for some in rows]))

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Return the losses (B, T) of the next micro-batch, whose rows begin at its first column."""
        width = batch.losses.shape[1]
        found = self._ready.popleft()[:, :width]
        return torch.nn.functional.pad(found, (0, width - found.shape[1]))


class LiveReference:
    """The reference model beside the proxy; it runs at every step.

    Args:
        path: folder of the model, or of an adapter.
        trainer: whose device and precision it takes.
    """

    def __init__(self, path: str, trainer: DirectedTrainer):
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        is_adapter = (Path(path) / "adapter_config.json").is_file()
        loader: Any = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
        alike = {
            "dtype": next(trainer.model.parameters()).dtype,
            "attn_implementation": trainer.model.config._attn_implementation,
        }
        self._model = loader.from_pretrained(path, **alike).to(trainer.args.device).eval()
        self._accelerator = trainer.accelerator

        def run(tokens: list[int]) -> Any:
            return self._model(input_ids=torch.tensor([tokens], device=trainer.args.device), use_cache=False)

        with torch.no_grad(), self._accelerator.autocast():
            self._head = find_head(self._model, run)

    def prefetch(self, rows: Sequence[Tensor]) -> None:
        """Read nothing: it computes the losses of each micro-batch as it comes."""

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Tensor:
        """Return the losses (B, T)."""
        head = self._head
        with self._accelerator.autocast(), nullcontext() if head is None else head.apart() as states:
            logits = self._model(**batch.inputs, use_cache=False).logits
        if head is None or states is None:
            return token_losses(logits, batch.targets)
        return head.losses(states[0], batch.targets)


def _check_vocabulary(path: str, tokenizer: Any) -> None:
    """Refuse a reference that does not know every token of the run by the same number; it may know more.

    Raises:
        MismatchError: it does not, or has no tokenizer to tell.
    """
    if not (Path(path) / "tokenizer_config.json").is_file():
        raise MismatchError(
            f"reference_model_path: found no tokenizer in {path}; expected the one that the reference was trained "
            "with, as LLaMA-Factory saves it. Put its files there"
        )
    from transformers import AutoTokenizer

    other_tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ours, theirs = tokenizer.get_vocab(), other_tokenizer.get_vocab()
    if other := [token for token, number in ours.items() if theirs.get(token) != number]:
        raise MismatchError(
            f"reference_model_path: {len(other)} of the run's {len(ours)} tokens are others, or none, in {path} "
            f"(first: {other[0]!r}); losses of tokens can only be compared under one tokenizer. Train the reference "
            "with the proxy's"
        )
