"""Settings that are right one by one and wrong together, each refused with the reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dataflex.config import quantised
from dataflex.config.keys import DataflexKeys
from dataflex.config.llamafactory_keys import template_names
from dataflex.config.problems import NOTHING, Origin, Problems
from dataflex.environment import is_on
from dataflex.schedule import MOST_STEPS, Schedule

_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
"""Optimizers with plain moments per parameter; 8-bit ones keep quantised blocks."""
_OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
_OTHER_LOSSES = ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor")
_DAY = 86400  # seconds; longer time-outs are pointed out


class Combinations:
    """Checks of LLaMA-Factory's keys against what a run does with them.

    Args:
        values: LLaMA-Factory's keys.
        origin: where they were written.
        problems: takes what is wrong.
    """

    def __init__(self, values: Mapping[str, Any], origin: Origin, problems: Problems):
        self._values = values
        self._origin = origin
        self._problems = problems
        self.notes: list[str] = []

    def check_present(self, stage: str) -> None:
        """Require what every run over rows needs: a model, a dataset, an output folder, a template and do_train."""
        wanted = {
            "model_name_or_path": "a model folder, or a name on the Hub",
            "dataset": "names registered in dataset_info.json",
            "output_dir": "a folder for the run's output",
        }
        if stage == "sft":
            wanted["template"] = "the name of a chat template of LLaMA-Factory"
        for key, expected in wanted.items():
            if not self._values.get(key) and not self._problems.has(key):  # an empty text names nothing either
                self._problems.add(self._origin, key, expected, self._values.get(key, NOTHING))
        template, templates = self._values.get("template"), template_names()
        if template and templates and template not in templates:
            expected = "the name of a chat template of LLaMA-Factory"
            self._problems.add(self._origin, "template", expected, template, known=templates)
        if self._values.get("fp16") and self._values.get("bf16"):
            self._refuse("fp16", "no fp16 beside bf16: true", "A run has one reduced precision")
        if self._values.get("do_train") is not True and not self._problems.has("do_train"):
            self._problems.add(self._origin, "do_train", "true", self._values.get("do_train", NOTHING))

    def check_signals(self) -> None:
        """Refuse Transformers' own checkpoint on SIGTERM: it would end an interrupted run as if it had finished."""
        why = "A signal already makes train write a checkpoint that it resumes from: dataflex.checkpoint_on_signal"
        self._refuse_if_set("enable_jit_checkpoint", why)

    def check_rows(self, stage: str) -> None:
        """Refuse settings under which single rows cannot be chosen, or another program's training loop runs."""
        if stage not in ("sft", "pt"):
            why = "Other stages have no per-example loss here, and would train on all rows without a selection"
            self._refuse("stage", "sft or pt", why)
        if stage == "sft":
            for key in ("packing", "neat_packing"):
                self._refuse_if_set(key, "A packed block in stage sft mixes examples, so a row is no example any more")
        self._refuse_if_set("streaming", "Rows of a stream cannot be chosen by position")
        why = "LLaMA-Factory would load the whole model on every device; give FSDP2 to accelerate launch --config_file"
        self._refuse_if_set("fsdp", why)
        self._refuse_if_set("auto_find_batch_size", "The rows of a round are decided for one batch size")
        for key in ("use_mca", "use_kt", "use_hyper_parallel"):
            self._refuse_if_set(key, "This backend has a training loop of its own, which asks no selector")
        for name in ("USE_RAY", "USE_MCA", "USE_KT"):
            if is_on(name):
                text = f"found {os.environ[name]}; expected it to be unset with a dynamic train_type"
                why = "Ray workers and other backends would train without the method"
                self._problems.say(self._origin, f"environment variable {name}", text, why)

    def note_timeout(self) -> None:
        """Point out a time-out of collectives after which nobody waits any more."""
        timeout = self._values.get("ddp_timeout")
        if isinstance(timeout, int) and timeout > _DAY:
            self.notes.append(
                f"ddp_timeout: {timeout} seconds are {timeout / _DAY:.0f} days, for which the other processes wait "
                "where one hangs; 1800, the default, ends the run with an error"
            )

    def check_schedule(self, schedule: Schedule, train_type: str) -> None:
        """Refuse a second source of the number of steps that says otherwise, and more steps than a run can have."""
        steps = self._values.get("max_steps")
        is_second = train_type != "dynamic_weight" or schedule.train_step > 0
        if isinstance(steps, int) and steps > 0 and is_second and steps != schedule.train_step:
            why = f"Set train_step: {steps}, which takes its place under {train_type}"
            self._refuse("max_steps", "no such key", why)
        if not schedule.needs_rows and schedule.total() > MOST_STEPS:
            text = f"found {schedule.total()} optimizer steps in all; expected at most {MOST_STEPS}"
            self._problems.say(self._origin, "update_times", text)
        if self._values.get("warmup_steps") is not None and schedule.warmup_step == 0:
            self.notes.append(
                f"warmup_steps: {self._values['warmup_steps']} warms up the learning rate; steps on random rows before "
                "the first selection are warmup_step, which is 0"
            )

    def check_losses(self) -> None:
        """Refuse settings under which single examples have no loss, or another loss than cross-entropy is trained."""
        why = "Its fused loss hides the logits, so there is no loss of single examples"
        for key in ("enable_liger_kernel", "use_liger_kernel"):
            self._refuse_if_set(key, why)
        self._refuse_if_set("use_unsloth", "It replaces the loss, so there is none of single examples")
        for key in _OTHER_LOSSES:
            self._refuse_if_set(key, "It is another loss than the one that is watched and weighted, the cross-entropy")
        why = "A packed row is several examples to the model, and one to the method"
        self._refuse_if_set("neat_packing", why)
        self._refuse_padding_in_losses()

    def check_evaluation(self) -> None:
        """Require rows to evaluate on, if the run is to evaluate."""
        strategy = self._values.get("eval_strategy", "no")
        if strategy != "no" and not self._values.get("eval_dataset") and not self._values.get("val_size"):
            why = f"eval_strategy is {strategy}"
            self._problems.add(self._origin, "eval_dataset", "registered names, or a val_size above 0", why=why)

    def check_targets(self) -> None:
        """Require target rows, which the method compares training rows with."""
        has_split = bool(self._values.get("val_size"))
        if not self._values.get("eval_dataset") and not has_split:
            why = "The method compares training rows with these"
            self._problems.add(self._origin, "eval_dataset", "registered names, or a val_size above 0", why=why)
        if self._values.get("eval_dataset") and has_split:
            self._refuse("val_size", "no val_size beside eval_dataset", "LLaMA-Factory takes one of the two")
        why = "Target rows would be prompts without labels, which have no loss and no gradient"
        self._refuse_if_set("predict_with_generate", why)

    def check_exclusion(self, train_type: str) -> None:
        """Refuse to leave target rows out where there are none, or where LLaMA-Factory trains untouched."""
        at = "dataflex.exclude_targets"
        if train_type == "static":
            why = "With train_type: static LLaMA-Factory trains untouched, on every row"
            self._problems.add(self._origin, at, "false, or a dynamic train_type", True, why=why)
        elif not self._values.get("eval_dataset") and not self._values.get("val_size"):
            why = "The rows of eval_dataset, or those that val_size splits off, are what is left out"
            self._problems.add(self._origin, at, "eval_dataset or val_size beside it", True, why=why)

    def check_tests(self, train_type: str, section: DataflexKeys) -> None:
        """Refuse to measure a run that LLaMA-Factory makes alone, and keys that say how without saying on what."""

        def refuse(key: str, expected: str, found: Any, why: str = "") -> None:
            self._problems.add(self._origin, f"dataflex.{key}", expected, found, why=why)

        tests, reward = ",".join(section.test_dataset), section.test_reward
        if tests and train_type == "static":
            why = "With train_type: static LLaMA-Factory trains untouched; component_name: random trains on rounds"
            refuse("test_dataset", "none, or a dynamic train_type", tests, why)
        if tests and section.on_missing == "error":
            refuse("on_missing", "compute beside test_dataset, whose losses are of a model just trained", "error")
        if reward is not None and not tests:
            refuse("test_reward", "test_dataset beside it, whose prompts are responded to", reward.type)
        judged = ",".join(section.test_reward_dataset)
        if judged and reward is None:
            refuse("test_reward_dataset", "test_reward beside it, which judges the responses", judged)
        if set(section.test_reward_dataset) - set(section.test_dataset):
            refuse("test_reward_dataset", f"some of test_dataset ({tests})", judged)
        if "test_tokens" in section.model_fields_set and reward is None:
            refuse("test_tokens", "test_reward beside it, which judges the responses", section.test_tokens)
        if "target_seed" in section.model_fields_set and section.target_rows is None:
            refuse("target_seed", "target_rows beside it, the number of rows to draw", section.target_seed)

    def check_features(self) -> None:
        """Refuse models that features cannot be computed of."""
        self._refuse_if_set("use_unsloth", "It replaces the model's forward pass, which features are computed by")
        self._refuse_if_set("mixture_of_depths", "Which tokens a layer sees depends on the other rows of the batch")
        why = "It quantises the model by texts that are drawn at random, so no name tells what the model is"
        self._refuse_if_set("export_quantization_bit", why)
        self._refuse_quantised(lambda kind: kind == quantised.BATCHED, quantised.WHY_NO_VALUES)
        self._refuse_padding_in_losses()

    def _refuse_quantised(self, is_refused: Callable[[str], bool], why: str) -> None:
        found = quantised.asked_for(self._values)
        if found and is_refused(found) and not self._problems.has("quantization_bit"):
            text = f"found {found}; expected {quantised.EXACT}, or none"
            self._problems.say(self._origin, "quantization_bit", text, why)
        saved = quantised.saved_as(self._values.get("model_name_or_path"))
        if saved and is_refused(saved) and not self._problems.has("model_name_or_path"):
            text = f"found a base saved quantised ({saved}); expected one in 4 bits of bitsandbytes, or not quantised"
            self._problems.say(self._origin, "model_name_or_path", text, why)

    def _refuse_padding_in_losses(self) -> None:
        # In stage pt LLaMA-Factory's collator never trains on padding, whatever this says.
        if self._values.get("ignore_pad_token_for_loss") is False and self._values.get("stage", "sft") == "sft":
            why = "Training on padding makes an example's loss depend on the length of the others in its batch"
            self._refuse("ignore_pad_token_for_loss", "true", why)

    def check_base(self) -> None:
        """Refuse PiSSA where features of the base model are asked for."""
        why = "PiSSA takes the adapter's first weights out of the frozen ones, so there is no base model to look at"
        self._refuse_if_set("pissa_init", why)

    def check_gradients(self, schedule: Schedule, is_live: bool) -> None:
        """Refuse settings under which the gradient of a single example is not exact.

        Args:
            schedule: of the run.
            is_live: whether a gradient of the model being trained is wanted, not only of given checkpoints.
        """
        kind = self._values.get("finetuning_type", "lora")
        if kind not in ("lora", "full", "freeze"):
            self._refuse("finetuning_type", "lora, full or freeze", "There are no exact gradients of other adapters")
        self._refuse_if_set("use_dora", "There is no exact per-example gradient of DoRA's magnitudes")
        self._refuse_if_set("fp8", quantised.WHY_NO_GRADIENTS)
        self._refuse_quantised(lambda kind: kind != quantised.EXACT, quantised.WHY_NO_GRADIENTS)
        for key in _OTHER_LOSSES:
            if self._values.get(key):
                self.notes.append(f"{key} changes the training loss; gradients are of the plain mean cross-entropy")
        # PiSSA and a given adapter begin elsewhere.
        begins_at_zero = (
            kind == "lora" and not self._values.get("adapter_name_or_path") and not self._values.get("pissa_init")
        )
        if is_live and begins_at_zero and schedule.warmup_step == 0:
            self.notes.append(
                "no warm-up and no checkpoints: at LoRA's initialisation B is zero and the gradients of A vanish, so "
                "the first selection rests on B alone; set warmup_step"
            )

    def check_policies(self) -> None:
        """Refuse targets without a prompt of their own, which the model is to respond to."""
        why = "Policy gradients are of responses to a row's prompt, which would be part of the supervised answer"
        self._refuse_if_set("train_on_prompt", why)
        if self._values.get("stage") == "pt":
            self._refuse("stage", "sft", why)

    def check_encoders(self, names: Iterable[str]) -> None:
        """Refuse encoders that are not where the name says, or whose package is not installed.

        Args:
            names: folders, or names on the Hub, which are looked up when the run begins.
        """
        for name in names:
            text, why = None, ""
            if os.path.isdir(name):
                parts = [part for part in ("modules.json", "config.json") if os.path.isfile(os.path.join(name, part))]
                if not parts:
                    text = f"found {name} without modules.json and config.json; expected the folder of an encoder"
                elif parts[0] == "modules.json" and importlib.util.find_spec("sentence_transformers") is None:
                    text = f"found {name}, a sentence-transformers model; expected its package to be installed"
                    why = "Install it: pip install sentence-transformers"
            # A name on the Hub has one slash at most, so this can only be meant as a path.
            elif os.path.exists(name) or name.startswith((".", "~")) or os.path.isabs(name) or name.count("/") > 1:
                text = f"found {name!r}; expected a folder that exists, or a name on the Hub"
            if text:
                self._problems.say(self._origin, "embedding_model_name_or_path", text, why)

    def check_adam(self) -> None:
        """Refuse optimizers without Adam's moments."""
        why = (
            "gradient_type: adam takes the moments of the optimizer, as target_direction: precond_only does; use "
            "gradient_type: sgd and target_direction: sgd, or AdamW"
        )
        for key in _OTHER_OPTIMIZERS:
            self._refuse_if_set(key, why)
        optimizer = self._values.get("optim")
        if optimizer is not None and optimizer not in _ADAM:
            self._refuse("optim", f"one of {', '.join(_ADAM)}", why)

    def _refuse(self, key: str, expected: str, why: str) -> None:
        self._problems.add(self._origin, key, expected, self._values.get(key, NOTHING), why=why)

    def _refuse_if_set(self, key: str, why: str) -> None:
        if self._values.get(key):
            self._refuse(key, "no such key", why)
