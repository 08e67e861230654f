"""What a mixer may ask of the live model and of the stores: loads of the experts and base losses, domain by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dataflex import distributed
from dataflex.config.settings import Settings
from dataflex.draws import generator
from dataflex.errors import ConfigError
from dataflex.features.batching import collate
from dataflex.features.inference import evaluation
from dataflex.features.spec import BASE, LossSpec
from dataflex.mixers.base import LAST_BATCH, NativeMixer, RoutedRows
from dataflex.pipelines.run import Run
from dataflex.rows import Status

_BIASES = ("correction_bias", "expert_bias")
"""Ends of the names of what some models add to the router logits when they choose."""


def signals(
    run: Run,
    mixer: NativeMixer,
    settings: Settings,
    members: Sequence[np.ndarray],
    names: Sequence[str],
    last_batch: Callable[[], Any],
) -> dict[str, Callable[[], Any]]:
    """Return the signals that the mixer asks for.

    Raises:
        ConfigError: there is no such signal, the model has no experts, or there are no rows to route.
    """
    made: dict[str, Callable[[], Callable[[], Any]]] = {
        "expert_loads": lambda: ExpertLoads(run, _routed(mixer), settings, members, names),
        "base_losses": lambda: BaseLosses(run, members),
        LAST_BATCH: lambda: last_batch,
    }
    if other := [name for name in mixer.signals if name not in made]:
        raise ConfigError(f"signals: found {', '.join(other)}; expected some of {', '.join(made)}")
    return {name: made[name]() for name in mixer.signals}


def _routed(mixer: NativeMixer) -> RoutedRows:
    if not isinstance(mixer.params, RoutedRows):
        raise ConfigError(
            f"expert_loads: found the parameters {type(mixer.params).__qualname__} of {type(mixer).__qualname__}; "
            "expected a subclass of dataflex.mixers.RoutedRows, which says what is sent through the router"
        )
    return mixer.params


class BaseLosses:
    """Each domain's mean loss per token under the model before any training, from the store. Making it is collective.

    Args:
        run: has the rows, and the stores.
        members: K arrays, rows of each domain.
    """

    def __init__(self, run: Run, members: Sequence[np.ndarray]):
        spec = LossSpec()
        (store,) = run.access.ensure([spec], run.rows, BASE)
        view = run.access.view(spec, run.rows, store)
        usable, loss, tokens = view.status == Status.OK, view.scalar("loss_sum"), view.scalar("tokens")
        kept = [rows[usable[rows]] for rows in members]
        self._means = np.array(
            [loss[rows].sum() / max(1, tokens[rows].sum()) if len(rows) else np.nan for rows in kept]
        )

    def __call__(self) -> np.ndarray:
        """Return nats per token, (K,) float64, NaN for a domain without a usable row."""
        return self._means


class ExpertLoads:
    """Counts, for each domain, the tokens that the last router sends to each expert. K domains, E experts.

    Rows are those of `mixer_eval_dataset`, whose datasets belong to the domains by name where all are called
    `<domain>_eval`, else in the domains' order; without it rows of the domains themselves, drawn once. Padding is not
    counted.

    Args:
        run: has the model and the rows.
        params: say how many rows are routed.
        settings: name the held-out datasets.
        members: K arrays, rows of each domain.
        names: (K,) of the domains.

    Raises:
        ConfigError: the model's experts are unknown.
    """

    def __init__(
        self, run: Run, params: RoutedRows, settings: Settings, members: Sequence[np.ndarray], names: Sequence[str]
    ):
        self._run, self._params = run, params
        config = run.trainer.model.config.get_text_config()
        self._k = getattr(config, "num_experts_per_tok", None)
        if self._k is None or not hasattr(config, "output_router_logits"):
            raise ConfigError(
                f"dynamic_moe: the model ({config.model_type}) has no experts whose router logits it gives; expected a "
                "mixture of experts, as Mixtral or Qwen-MoE"
            )
        tensors = [*run.trainer.model.named_parameters(), *run.trainer.model.named_buffers()]
        if biased := next((name for name, _ in tensors if name.endswith(_BIASES)), None):
            raise ConfigError(
                f"dynamic_moe: the model ({config.model_type}) chooses experts by router logits and {biased}; expected "
                "a model that chooses by the logits, which are all that it tells"
            )
        named = settings.keys.mixer_eval_dataset
        held_out = None if named is None else [name.strip() for name in named.split(",")]
        if set(called := [f"{name}_eval" for name in names]) == set(held_out or []):
            held_out = called
        self._examples = []
        for i, (name, rows) in enumerate(zip(names, members, strict=True)):
            if held_out is not None:
                target = run.targets[held_out[i]]
                found = [target.examples[row] for row in range(len(target))]
            else:
                draw = generator(run.trainer.args.seed, "expert loads", name)
                found = [run.rows.examples[int(row)] for row in draw.permutation(rows)[: self._params.eval_samples]]
            self._examples.append(found[: self._params.eval_samples])

    def __call__(self) -> np.ndarray:
        """Return the counts at the live model, (K, E) float64. Collective.

        Raises:
            ConfigError: the model gives no router logits after all.
        """
        trainer = self._run.trainer
        size, world, rank = self._params.eval_batch_size, distributed.world(), distributed.rank()
        loads = []
        with evaluation(trainer.model), torch.no_grad():
            for examples in self._examples:
                batches = [examples[i : i + size] for i in range(0, len(examples), size)][: self._params.collect_steps]
                total: Any = None
                for number in range(rank, -(-len(batches) // world) * world, world):
                    some = batches[number] if number < len(batches) else examples[:1]
                    counts = self._counts(some)
                    total = torch.zeros_like(counts) if total is None else total
                    total += counts if number < len(batches) else 0
                loads.append(total)
        stacked = distributed.all_gather_rows(torch.stack(loads)).sum(dim=0)
        return np.asarray(stacked.cpu().numpy())

    def _counts(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        trainer = self._run.trainer
        pad = trainer.processing_class.pad_token_id or 0
        batch = collate(examples, pad, "right", next(trainer.model.parameters()).device)
        with trainer.accelerator.autocast():
            output = trainer.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                output_router_logits=True,
                use_cache=False,
            )
        routed = output.get("router_logits")
        if not routed:
            raise ConfigError("dynamic_moe: the model gave no router logits; expected those of each layer with experts")
        logits = routed[-1].reshape(-1, routed[-1].shape[-1])
        chosen = logits.topk(self._k, dim=1).indices[batch.attention_mask.reshape(-1).bool()]
        return torch.bincount(chosen.reshape(-1), minlength=logits.shape[1]).double()


def freeze_routers(model: Any) -> None:
    """Leave the routers of a mixture of experts untrained.

    Raises:
        ConfigError: the model has none that would be trained.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    routers = [parameter for name, parameter in named if {"gate", "router"} & set(name.split("."))]
    if not routers:
        raise ConfigError("freeze_gate: found no router among the trained parameters; remove the key")
    for parameter in routers:
        parameter.requires_grad_(False)
