"""Of run files with a mixer or a weighter what cannot be is refused, what has no effect noted, the rest taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dataflex.config import load
from dataflex.config.overview import summary
from dataflex.errors import ConfigError
from tests.run_file import write

pytestmark = pytest.mark.usefixtures("run_folder")

MIX = "train_type: dynamic_mix\ncomponent_name: odm\ndataset: pool,target\n"
WEIGHT = "train_type: dynamic_weight\ncomponent_name: loss\n"


def merged(base: str, changes: str) -> Path:
    """Write a run file; a key in `changes` takes the place of the one in `base`."""
    given = {line.partition(":")[0] for line in changes.splitlines()}
    kept = [line for line in base.splitlines() if line.partition(":")[0] not in given]
    path: Path = write("\n".join([*kept, changes]))
    return path


def problems(base: str, changes: str) -> str:
    with pytest.raises(ConfigError) as found:
        load(merged(base, changes))
    return str(found.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("init_mixture_proportions: [1, 2, 3]", "expected 2 numbers, one for each of pool, target"),
        ("init_mixture_proportions: [0, 0]", "expected numbers of 0 or more, not all 0"),
        ("init_mixture_proportions: [1.0e+308, 1.0e+308]", "expected numbers of 0 or more, not all 0"),
        ("init_mixture_proportions: [-1, 2]", "expected numbers of 0 or more, not all 0"),
        ("mixture_sample_rule: stratified", "stratified would take no notice of the mixer odm"),
        ("mixture_sample_rule: proportional", "mixture_sample_rule: found 'proportional'; expected mixture, "),
        ("mix_strategy: interleave_under", "mix_strategy: found 'interleave_under'; expected concat"),
        ("streaming: true", "streaming: found true; expected no such key"),
        ("enable_liger_kernel: true", "Its fused loss hides the logits"),
        ("label_smoothing_factor: 0.1", "another loss than the one that is watched and weighted"),
        ("mixer_eval_dataset: target", "expected component_name: dynamic_moe, which alone reads it"),
        (
            "component_name: dynamic_moe\nmixer_eval_dataset: target",
            "mixer_eval_dataset: found 'target'; expected 2 datasets of eval_dataset, one for each of pool, target",
        ),
        ("update_step: 2\nupdate_times: 0", "update_times: found 0; expected 1 or more, or -1"),
        ("tokenized_path: tokens", "tokenized_path: found 'tokens'; expected no such key"),
        ("max_steps: 5", "Set train_step: 5, which takes its place under dynamic_mix"),
        ("dataflex: {mixture: {passes: 2}}", "exhausted: renormalise or stop beside passes"),
        ("dataflex: {params: {min_exploration_rate: 0.5}}", "min_exploration_rate: found 0.5 for 2 domains"),
        ("dataflex: {params: {alhpa: 1}}", "did you mean 'alpha'?"),
        ("dataflex: {weighter: {name: los}}", "dataflex.weighter.name: found 'los'; expected a weighter"),
        (
            "dataflex: {weighter: {name: loss, params: {delta: x}}}",
            "dataflex.weighter.params.delta: found 'x'; expected a number",
        ),
        ("component_name: static\ndataflex: {params: {proportions: {pool: 1}}}", "target"),
        ("component_name: doremi", "dataflex.params.reference_model_path: "),
        (
            "component_name: doremi\ninit_mixture_proportions: [1, 0]\n"
            "dataflex: {params: {reference_model_path: model}}",
            "expected more than 0 for every domain, as doremi compares all of them",
        ),
        ("fsdp: full_shard", "would load the whole model on every device"),
    ],
)
def test_what_a_mixture_cannot_be_is_refused(changes: str, said: str) -> None:
    assert said in problems(MIX, changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("enable_liger_kernel: true", "Its fused loss hides the logits"),
        ("use_unsloth: true", "there is none of single examples"),
        ("use_dft_loss: true", "another loss than the one"),
        ("max_steps: 5\ntrain_step: 6", "max_steps: found 5; expected no such key"),
        ("dataflex: {weighter: {name: loss}}", "the weighter is component_name itself"),
        ("dataflex: {params: {strategy: lin}}", "dataflex.params.strategy: found 'lin'; expected "),
    ],
)
def test_what_cannot_be_weighted_is_refused(changes: str, said: str) -> None:
    assert said in problems(WEIGHT, changes)


def test_all_problems_are_said_at_once() -> None:
    text = problems(MIX, "init_mixture_proportions: [1]\nmix_strategy: interleave_over\nlearning_rate: x")
    assert text.startswith("3 problems")


@pytest.mark.parametrize(
    ("changes", "name", "note"),
    [
        ("static_mix: true", "static", "static_mix: true leaves odm out"),
        ("update_step: 5\nupdate_times: 2\nnum_train_epochs: 2", "odm", "num_train_epochs has no effect"),
        ("component_name:\nmixture_sample_rule: uniform", "uniform", ""),
    ],
)
def test_the_documented_keys_name_a_mixer(changes: str, name: str, note: str) -> None:
    settings = load(merged(MIX, changes))
    assert settings.component_name == name
    assert not note or any(note in text for text in settings.notes)


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (
            MIX,
            "train_step: 349\ndataflex: {params: {warmup_steps: 2000}}",
            "odm has no effect: it stays at the initial proportions for 2001 steps, and the run has 349. Lower warmup",
        ),
        (MIX, "train_step: 349\ndataflex: {params: {warmup_steps: 349}}", "for 350 steps, and the run has 349"),
        (MIX, "train_step: 349\ndataflex: {params: {warmup_steps: 348}}", "for 349 steps, and the run has 349"),
        (MIX, "train_step: 349\ndataflex: {params: {warmup_steps: 347}}", ""),
        (
            MIX,
            "update_step: 5\nupdate_times: 2\nwarmup_step: 0\ndataflex: {params: {warmup_steps: 20}}",
            "the run has 10",
        ),
        (
            MIX,
            "component_name: ado\ntrain_step: 2000",
            "ado has no effect: it stays at the initial proportions for 2000 steps, and the run has 2000. Lower "
            "ignore_steps or fit_interval",
        ),
        (MIX, "component_name: ado\ntrain_step: 2001", ""),
        (MIX, "train_step: 9\nupdate_step: 9\nwarmup_step: 0", "first losses that it sees are those of step 9"),
        (MIX, "train_step: 9\nupdate_step: 8\nwarmup_step: 0", ""),
        (MIX, "train_step: 9\nwarmup_step: 9", "odm has no effect: warmup_step is 9, and the run has 9"),
        (
            MIX,
            "train_step: 9\nwarmup_step: 9\ndataflex: {weighter: {name: loss}}",
            "loss has no effect: warmup_step is 9, and the run has 9",
        ),
        (WEIGHT, "train_step: 9\nwarmup_step: 10", "loss has no effect: warmup_step is 10, and the run has 9"),
        (WEIGHT, "max_steps: 9\nwarmup_step: 10", "loss has no effect: warmup_step is 10, and the run has 9"),
        (WEIGHT, "train_step: 9\nwarmup_step: 8", ""),
        (WEIGHT, "warmup_step: 100000", ""),  # how many steps there are follows from the rows
        ("", "train_step: 3\nwarmup_step: 5", "less has no effect: warmup_step is 5, and the run has 3"),
    ],
)
def test_a_warm_up_that_outlasts_the_run_is_noted(base: str, changes: str, said: str) -> None:
    notes = [note for note in load(merged(base, changes)).notes if "has no effect:" in note]
    assert bool(notes) == bool(said), notes
    assert not said or any(said in note for note in notes), notes


def test_a_documented_odm_file_means_the_papers_rule() -> None:
    assert load(merged(MIX, "dataflex: {params: {reward_scale: 15}}")).params.variant == "paper"


def test_steps_follow_from_the_keys() -> None:
    every = "num_train_epochs: 2"
    schedule = load(merged(MIX, "warmup_step: 3\nupdate_step: 5\nupdate_times: 2\n" + every)).schedule
    assert schedule.total(100, 4) == 13
    assert [r.steps for r in schedule.rounds(100, 4)] == [3, 5, 5]
    schedule = load(merged(MIX, "warmup_step: 0\nupdate_step: 0\n" + every)).schedule
    assert schedule.total(100, 4) == 50
    assert {r.steps for r in schedule.rounds(100, 4)} == {1}  # the mixer's own interval
    schedule = load(merged(MIX, "warmup_step: 4\nupdate_step: 7\nupdate_times: -1\ntrain_step: 20")).schedule
    assert [(r.kind, r.steps) for r in schedule.rounds(100, 4)] == [
        ("warmup", 4), ("update", 7), ("update", 7), ("update", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("text", [MIX, WEIGHT])
def test_validate_imports_no_torch(text: str) -> None:
    path = write(text)
    code = f"import sys; from dataflex.config import load; load({str(path)!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_summary_names_method_and_steps() -> None:
    said = "\n".join(summary(load(merged(MIX, "dataflex: {weighter: {name: loss}}"))))
    assert "odm" in said
    assert "weighter" in said


DOCUMENTED = """
from dataflex.weighters import Weighter, register_weighter

@register_weighter("documented_under_test")
class Mine(Weighter):
    def get_weighted_loss(self, losses, *, ctx, model, inputs):
        return losses.mean()
"""


def test_a_documented_weighter_stands_alone() -> None:
    Path("mine.py").write_text(DOCUMENTED)
    plugins = "dataflex: {plugins: [mine.py]"
    said = problems(MIX, plugins + ", weighter: {name: documented_under_test}}")
    assert "expected a weighter that gives weights" in said
    assert load(merged(WEIGHT, "component_name: documented_under_test\n" + plugins + "}")).component is not None


def test_a_documented_mixer_takes_the_loss_that_is_watched() -> None:
    Path("fading.py").write_text(
        "from dataflex.mixers import Mixer, register_mixer\n\n"
        "@register_mixer('fading_under_test')\nclass Fading(Mixer):\n"
        "    def mix(self, model, step_id, **kwargs):\n        return [0.5, 0.5]\n"
    )
    base = MIX.replace("odm", "fading_under_test") + "dataflex: {plugins: [fading.py]}\n"
    assert load(merged(base, "")).component is not None
    assert "another loss than the one that is watched" in problems(base, "use_dft_loss: true")
