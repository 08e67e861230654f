"""Settings of evaluation, saving and the best model that Transformers' trainer does not take together.

It would say so late and by a traceback: in the trainer's constructor, or at the first evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dataflex.config.paths import names
from dataflex.config.problems import NOTHING, Origin, Problems

_MEASURED = ("loss", "runtime", "samples_per_second", "steps_per_second")
_GENERATED = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
_FOLLOWS_LOSS = ("reduce_lr_on_plateau", "greedy")


def check_evaluation(values: Mapping[str, Any], origin: Origin, problems: Problems) -> None:
    """Note what cannot be evaluated, saved or compared as the keys ask for.

    Args:
        values: LLaMA-Factory's keys.
        origin: where they were written.
        problems: takes what is wrong.
    """
    # The defaults here and below (no, steps, 500) are those of transformers.TrainingArguments.
    strategy, keeps_best = values.get("eval_strategy", "no"), bool(values.get("load_best_model_at_end"))
    wanted = {
        "lr_scheduler_type": values.get("lr_scheduler_type") in _FOLLOWS_LOSS,
        "early_stopping_steps": values.get("early_stopping_steps") is not None,
        "load_best_model_at_end": keeps_best,
        "save_strategy": values.get("save_strategy") == "best",
    }
    asking = next((key for key, asks in wanted.items() if asks), None)
    if asking is not None and strategy == "no":
        why = f"{asking}: {values[asking]} goes by what is measured in training"
        problems.add(origin, "eval_strategy", "steps or epoch", values.get("eval_strategy", NOTHING), why=why)
    elif keeps_best:
        _check_saving(values, strategy, origin, problems)
    metric = values.get("metric_for_best_model")
    if metric is None and (keeps_best or wanted["lr_scheduler_type"]):
        metric = "loss"  # as Transformers has it
    if metric is None and (wanted["early_stopping_steps"] or wanted["save_strategy"]):
        problems.add(origin, "metric_for_best_model", f"the metric that {asking} goes by, such as eval_loss")
    elif metric is not None and strategy != "no":
        _check_metric(values, metric, origin, problems)
    if strategy == "steps" and not values.get("eval_steps") and values.get("logging_steps", 500) <= 0:
        expected = "a number above 0, or logging_steps above 0"
        problems.add(origin, "eval_steps", expected, values.get("eval_steps", NOTHING))
    if values.get("logging_strategy", "steps") == "steps" and values.get("logging_steps", 500) == 0:
        problems.add(origin, "logging_steps", "more than 0, or logging_strategy: no", 0)


def _check_saving(values: Mapping[str, Any], strategy: str, origin: Origin, problems: Problems) -> None:
    """Note checkpoints that would be saved without an evaluation to compare them by."""
    saving = values.get("save_strategy", "steps")
    if saving not in ("best", strategy):
        why = "load_best_model_at_end needs an evaluation at every checkpoint"
        problems.add(origin, "save_strategy", f"{strategy}, as eval_strategy, or best", saving, why=why)
    elif saving == strategy == "steps":
        every, at = values.get("eval_steps") or values.get("logging_steps", 500), values.get("save_steps", 500)
        if every > 0 and not _is_multiple(at, every):
            why = f"load_best_model_at_end needs an evaluation at every checkpoint, and evaluates every {every:g}"
            problems.add(origin, "save_steps", "a multiple of eval_steps", at, why=why)


def _is_multiple(at: float, every: float) -> bool:
    """Say whether saves fall on evaluations, as Transformers reckons it; below 1 both are shares of the run."""
    both_are_shares = at < 1 and every < 1
    return at % every == 0 or (both_are_shares and round(at * 1_000_000) % max(1, round(every * 1_000_000)) == 0)


def _check_metric(values: Mapping[str, Any], metric: str, origin: Origin, problems: Problems) -> None:
    """Note a metric that no evaluation measures; several evaluation sets are measured each under its own name."""
    if values.get("stage", "sft") not in ("sft", "pt"):
        return  # these have metrics of their own
    measured = [*_MEASURED, *(["accuracy"] if values.get("compute_accuracy") else [])]
    measured += _GENERATED if values.get("predict_with_generate") else []
    sets = names(values.get("eval_dataset")) if values.get("eval_on_each_dataset") else []
    known = [f"eval_{name}_{each}" for each in measured for name in sets] or [f"eval_{each}" for each in measured]
    if metric.removeprefix("eval_") in (each.removeprefix("eval_") for each in known):
        return
    first = [each for each in known if each.endswith("_loss")]
    why = "With eval_on_each_dataset each set is measured under its own name" if sets else ""
    found = values.get("metric_for_best_model", NOTHING)
    expected = f"the metric that picks the best model: {' or '.join(first[:5])}{' ...' if len(first) > 5 else ''}"
    problems.add(origin, "metric_for_best_model", expected, found, known, why)
