"""Run file -> settings; everything that is wrong in one error, before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dataflex.components.compatibility import without_effect
from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS, Registry, import_plugin, use_plugins
from dataflex.config.combinations import Combinations
from dataflex.config.component import Asked, Component, M, component, find_file, replaced, validated
from dataflex.config.evaluation import check_evaluation
from dataflex.config.idle import idle_note, known_steps
from dataflex.config.keys import MIX_ONLY, DataflexKeys, FlatKeys
from dataflex.config.llamafactory_keys import fault, known_keys
from dataflex.config.mappings import check_mappings
from dataflex.config.mixing import check_mixing, mixer_asked, mixing_schedule, watches
from dataflex.config.outputs import check_outputs, check_store
from dataflex.config.packages import check_trackers, missing_packages
from dataflex.config.paths import check_files, repeated
from dataflex.config.prefiltering import check_prefilter
from dataflex.config.problems import Problems
from dataflex.config.runfile import Document, override, put, read
from dataflex.config.settings import Settings, store_root
from dataflex.environment import is_on
from dataflex.errors import ConfigError
from dataflex.features.spec import BASE
from dataflex.mixers.base import NativeMixer
from dataflex.schedule import Schedule
from dataflex.selectors.base import REFRESHES, NativeSelector
from dataflex.weighters.base import NativeWeighter


def load(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Settings:
    """Read and check a run file.

    Args:
        path: YAML or JSON.
        overrides: `key=value` texts that win over the file; dotted keys reach into mappings.
        values: the same as values of Python's, as `dataflex.load` takes them.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    problems = Problems()
    document = read(Path(path), problems)
    if document is not None:
        document = override(document, overrides, problems) if values is None else _put(document, values, problems)
    problems.raise_if_any()
    assert document is not None
    return _Loading(document, problems).settings()


def _put(document: Document, values: Mapping[str, Any], problems: Problems) -> Document:
    """Return the document with values in place of what it has; in `dataflex`, and in its `params`, entry by entry."""
    given: dict[str, Any] = {}
    for key, value in values.items():
        given |= _reaching(key, value)
    return put(document, given, problems, by="dataflex.load")


def _reaching(key: str, value: Any) -> dict[str, Any]:
    """Return a value by its dotted key; a mapping that is reached into as several."""
    if key not in ("dataflex", "dataflex.params") or not isinstance(value, Mapping):
        return {key: value}
    return {at: each for name, item in value.items() for at, each in _reaching(f"{key}.{name}", item).items()}


class _Loading:
    """One reading of a run file; each step adds to `problems` and goes on with what is right."""

    def __init__(self, document: Document, problems: Problems):
        self.document = document
        self.origin = document.origin
        self.problems = problems
        self.notes: list[str] = []

    def settings(self) -> Settings:
        """Check everything, raise what is wrong, or return the settings."""
        llamafactory = self._llamafactory_keys()
        flat = self._flat_keys()
        if flat.mixer_eval_dataset and not (llamafactory.get("eval_dataset") or llamafactory.get("val_size")):
            llamafactory["eval_dataset"] = flat.mixer_eval_dataset  # documented run files name them there alone
        section = self._section(llamafactory.get("output_dir"))
        stage = llamafactory.setdefault("stage", "sft")
        epochs = llamafactory.get("num_train_epochs", 1.0)
        schedule = Schedule(flat.warmup_step, flat.update_step, flat.update_times, flat.train_step, epochs)
        found, weighter, prefilter = self._components(flat, section, llamafactory.get("output_dir"))
        if flat.train_type == "dynamic_mix":
            mixer: Component[NativeMixer] | None = found
            # Anew: without update_step the mixer says how often it acts, and it is known only now.
            schedule = mixing_schedule(flat, epochs, mixer.method if mixer else None)
            weighs = weighter is not None or (mixer is not None and watches(mixer.method))
            self.notes += check_mixing(
                flat, llamafactory, mixer, section.mixture.unit, weighs, self.origin, self.problems
            )
        methods = [each for each in (found, weighter, prefilter) if each]
        self._cross_check(flat, llamafactory, stage, schedule, methods, section)
        total = known_steps(flat, schedule, llamafactory)
        for each in (found, weighter):
            if each and total and (note := idle_note(each.name, each.method, schedule, total)):
                self.notes.append(note)
        params = found.params if found else None
        root = store_root(section.store, getattr(params, "cache_dir", None) if found and found.needs else None)
        # Only features of the live model are certain to be written: a run that reads may name a read-only root.
        live = any(need.state is None for each in methods for need in each.needs)
        self._check_surroundings(llamafactory, section, root, section.must_write(schedule, live))
        self.problems.raise_if_any()
        return Settings(
            path=self.origin.file,
            llamafactory=llamafactory,
            keys=flat,
            component_name=found.name if found else None,
            component=found.cls if found else None,
            params=params,
            weighter=weighter.cls if weighter else None,
            weighter_params=weighter.params if weighter else None,
            prefilter=prefilter.cls if prefilter else None,
            prefilter_params=prefilter.params if prefilter else None,
            needs=tuple(need for each in methods for need in each.needs),
            schedule=schedule,
            dataflex=section,
            store_root=root,
            notes=tuple(self.notes),
        )

    def _check_surroundings(
        self, llamafactory: Mapping[str, Any], section: DataflexKeys, root: str, writes: bool
    ) -> None:
        """Check that the files, folders and packages that the keys name are there."""
        check_files(llamafactory, section.test_dataset, self.origin, self.problems)
        check_evaluation(llamafactory, self.origin, self.problems)
        check_trackers(llamafactory, self.origin, self.problems)
        check_outputs(llamafactory, self.origin, self.problems)
        self.notes += check_mappings(llamafactory, self.origin, self.problems)
        self.notes += repeated(llamafactory)
        check_store(section.store, root, writes, self.origin, self.problems)
        self.notes += missing_packages(llamafactory)

    def _llamafactory_keys(self) -> dict[str, Any]:
        """Return LLaMA-Factory's keys whose values have the right type; the others are noted as problems."""
        ours = {*FlatKeys.model_fields, "dataflex"}
        known = known_keys()
        right = {}
        for key, value in self.document.values.items():
            if key in ours:
                continue
            if not isinstance(key, str):
                self.problems.add(self.origin, str(key), "text as a key (quote it)", key)
            elif key in known:
                expected = fault(key, value)
                if expected is None:
                    right[key] = value
                else:
                    self.problems.add(self.origin, key, expected, value, known[key].choices)
                if isinstance(value, str) and "${" in value:
                    self.notes.append(
                        f"{key}: {value!r} stays as it is: neither LLaMA-Factory nor DataFlex resolves it"
                    )
            elif key in DataflexKeys.model_fields or key == "params":
                self.problems.say(
                    self.origin, key, f"found an unknown key; expected it under dataflex: (dataflex.{key})"
                )
            elif is_on("ALLOW_EXTRA_ARGS"):  # LLaMA-Factory's own switch, with the same meaning there
                self.notes.append(f"{key}: unknown, and passed over because ALLOW_EXTRA_ARGS is set")
                right[key] = value
            else:
                self.problems.add_unknown(
                    self.origin, key, "key", [*known, *ours], expected="a key of LLaMA-Factory or DataFlex"
                )
        return right

    def _flat_keys(self) -> FlatKeys:
        # `key:` without a value is null in YAML, and means the default.
        values = {k: v for k, v in self.document.values.items() if k in FlatKeys.model_fields and v is not None}
        flat: FlatKeys = self._valid(FlatKeys, values, "")
        dynamic = [k for k in values if k not in ("train_type", "components_cfg_file", "early_stopping_min_delta")]
        if flat.train_type == "static" and dynamic and "train_type" not in self.document.values:
            self.notes.append(f"train_type is static by default, so {', '.join(dynamic)} mean nothing")
        elif flat.train_type != "dynamic_mix" and (unused := [k for k in values if k in MIX_ONLY]):
            self.notes.append(f"only dynamic_mix reads {', '.join(unused)}")
        unused = [k for k in values if k in ("update_step", "update_times")]
        if flat.train_type == "dynamic_weight" and unused:
            self.notes.append(f"dynamic_weight does not read {', '.join(unused)}: every step is weighted")
        return flat

    def _section(self, output_dir: Any) -> DataflexKeys:
        values = self.document.values.get("dataflex")
        if values is not None and not isinstance(values, dict):
            self.problems.add(self.origin, "dataflex", "a mapping of keys to values", values)
        right = {}
        for key, value in (values if isinstance(values, dict) else {}).items():
            if not isinstance(key, str):
                self.problems.add(self.origin, f"dataflex.{key}", "text as a key (quote it)", key)
            elif key in FlatKeys.model_fields or (key in known_keys() and key not in DataflexKeys.model_fields):
                text = f"found an unknown key; expected {key} at the top level of the run file"
                self.problems.say(self.origin, f"dataflex.{key}", text)
            elif key in ("weighter", "prefilter") and isinstance(value, dict):  # its params have a model of their own
                right[key] = {k: v for k, v in value.items() if k != "params"}
            elif key != "params" and value is not None:
                right[key] = replaced(value, output_dir, self.origin, f"dataflex.{key}", self.problems)
        section: DataflexKeys = self._valid(DataflexKeys, right, "dataflex")
        plugins = []
        # Imported now, before the component is looked up: a plugin may register the name that the run file uses.
        for i, name in enumerate(section.plugins):
            file = find_file(name, self.origin.file) if name.endswith(".py") else None
            if name.endswith(".py") and file is None:
                expected = "a file, relative to the working folder or to the run file"
                self.problems.add(self.origin, f"dataflex.plugins.{i}", expected, name)
            else:
                plugins.append(str(file.resolve()) if file else name)
                try:
                    import_plugin(plugins[-1])
                except ConfigError as error:
                    self.problems.say(self.origin, f"dataflex.plugins.{i}", str(error))
                    plugins.pop()
        use_plugins(plugins)
        return section.model_copy(update={"plugins": tuple(plugins)})

    def _valid(self, model: type[BaseModel], values: dict[str, Any], prefix: str) -> Any:
        """Return an instance; keys whose values are wrong are noted and left out."""
        result = validated(model, values)
        if isinstance(result, ValidationError):
            # Defaults stand in for what is wrong, so that the rest of the file is checked in the same reading.
            wrong = self.problems.add_invalid(result, model, values, lambda _: (self.origin, prefix))
            result = model.model_validate({k: v for k, v in values.items() if k not in wrong})
        return result

    def _components(
        self, flat: FlatKeys, section: DataflexKeys, output_dir: Any
    ) -> tuple[Component[Any] | None, Component[NativeWeighter] | None, Component[NativeSelector] | None]:
        """Return the method of the run, the weighter beside a mixer, and the prefilter before a selector."""
        written = self.document.values.get("dataflex")
        written = written if isinstance(written, dict) else {}
        params, beside, before = (written.get(key) for key in ("params", "weighter", "prefilter"))

        def found(asked: Asked[M]) -> Component[M] | None:
            file = flat.components_cfg_file
            made = component(asked, self.document, file, section.plugins, output_dir, self.problems)
            if made is not None and (said := asked.registry.override(asked.name, made.cls)):
                self.notes.append(said)
            if made is not None:
                self.notes += [f"{asked.name}: {said}" for said in without_effect(made.params)]
            return made

        kinds: dict[str, Registry[Any]]
        kinds = {"dynamic_select": SELECTORS, "dynamic_mix": MIXERS, "dynamic_weight": WEIGHTERS}
        registry = kinds.get(flat.train_type)
        if section.weighter is not None and registry is not MIXERS:
            why = "Without a mixer the weighter is component_name itself, under train_type: dynamic_weight"
            self.problems.add(self.origin, "dataflex.weighter", "train_type: dynamic_mix beside it", beside, why=why)
        if section.prefilter is not None and registry is not SELECTORS:
            why = "It says which rows a selector looks at"
            self.problems.add(
                self.origin, "dataflex.prefilter", "train_type: dynamic_select beside it", before, why=why
            )
        if registry is None:
            return None, None, None
        asked = Asked(flat.component_name or "", registry, params)
        if registry is MIXERS:
            asked = mixer_asked(flat, asked, self.notes)
        if not asked.name:
            if self.document.values.get("component_name") in (None, ""):
                named = {"selector": "less or random", "mixer": "odm or static", "weighter": "loss"}[registry.kind]
                self.problems.add(self.origin, "component_name", f"a {registry.kind}, such as {named}, or module:Class")
            return None, None, None
        weighter = None
        if section.weighter is not None and registry is MIXERS and isinstance(beside, dict):
            at = ("dataflex.weighter.name", "dataflex.weighter.params")
            weighter = found(Asked(section.weighter.name, WEIGHTERS, beside.get("params"), *at))
            if weighter is not None and weighter.method.acts_alone:
                why = "A weighter of the classic interface computes the whole loss, so it acts alone: dynamic_weight"
                self.problems.add(self.origin, at[0], "a weighter that gives weights", section.weighter.name, why=why)
        method, prefilter = found(asked), None
        if section.prefilter is not None and registry is SELECTORS and isinstance(before, dict):
            at = ("dataflex.prefilter.method", "dataflex.prefilter.params")
            prefilter = found(Asked(section.prefilter.method, SELECTORS, before.get("params"), *at))
        if method is not None and prefilter is not None:
            check_prefilter(method, prefilter, section.refresh.policy, self.origin, self.problems)
        return method, weighter, prefilter

    def _cross_check(
        self,
        flat: FlatKeys,
        llamafactory: Mapping[str, Any],
        stage: str,
        schedule: Schedule,
        methods: Sequence[Component[Any]],
        section: DataflexKeys,
    ) -> None:
        """Check the keys against each other, as far as this run uses them.

        Args:
            flat: DataFlex's keys at the top level.
            llamafactory: LLaMA-Factory's.
            stage: of the training.
            schedule: of the run.
            methods: the run's own, then what stands beside it or before.
            section: the mapping `dataflex`.
        """
        check = Combinations(llamafactory, self.origin, self.problems)
        check.check_signals()
        if section.exclude_targets:
            check.check_exclusion(flat.train_type)
        check.check_tests(flat.train_type, section)
        is_dynamic = flat.train_type != "static"
        needs = tuple(need for each in methods for need in each.needs)
        specs = [
            *(need.spec for need in needs),
            *(spec for each in methods for spec in each.method.asked),
            *section.features,
        ]
        policies_taken = methods[0].method.refreshes if methods and flat.train_type == "dynamic_select" else REFRESHES
        if section.refresh.policy not in policies_taken:
            expected = f"{' or '.join(policies_taken)} with these parameters"
            why = "What the method compares must be of one state of the model"
            self.problems.add(self.origin, "dataflex.refresh.policy", expected, section.refresh.policy, why=why)
        check.note_timeout()
        if not is_dynamic and not specs:  # plain LLaMA-Factory, which checks what it reads itself
            if not llamafactory.get("model_name_or_path"):
                self.problems.add(self.origin, "model_name_or_path", "a model folder, or a name on the Hub")
            return
        check.check_present(stage)
        check.check_rows(stage)
        if is_dynamic:
            check.check_schedule(schedule, flat.train_type)
        if (
            flat.train_type == "dynamic_weight"
            or section.weighter is not None
            or (flat.train_type == "dynamic_mix" and any(watches(each.method) for each in methods))
        ):
            check.check_losses()
        if any(need.of == "targets" for need in needs) or any(each.method.needs_targets for each in methods):
            check.check_targets()
        else:
            check.check_evaluation()
        if specs or section.test_dataset:
            check.check_features()
        if any(spec.gradient for spec in specs):
            is_live = bool(section.features) or any(need.state is None for need in needs)
            check.check_gradients(schedule, is_live)
        if any(spec.needs_moments for spec in specs):
            check.check_adam()
        if section.test_reward is not None or any(spec.rewards for spec in specs):
            check.check_policies()
        check.check_encoders(dict.fromkeys(spec.encoder for spec in specs if spec.encoder is not None))
        for state in dict.fromkeys(need.state for need in needs if need.state not in (None, BASE)):
            if not os.path.isdir(state):
                self.problems.add(self.origin, "dataflex.params", "checkpoint folders that exist", state)
        if any(need.state == BASE for need in needs):
            check.check_base()
        self.notes += check.notes
