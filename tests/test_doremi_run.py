"""DoReMi from reference to target as a user runs it, in stage pt, against plain loops over recorded token losses."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError, MismatchError
from dataflex.pipelines.mixing.reference_losses import _check_vocabulary
from dataflex.trainers.micro_batch import MicroBatch
from dataflex.trainers.observer import Observer
from dataflex.trainers.trainer import DataflexTrainer
from tests.processes import TWO, dataflex
from tests.weighed import linupper

DOMAINS = ("words", "sums", "lists")
EPS = 1e-3


@dataclass
class Seen:
    """What went through trainings, in order.

    Attributes:
        rows: for each observed row (call of `observe`, domain, tokens, loss of each token after the first).
        calls: calls of `observe`.
        begun: weights before each optimizer step's first micro-batch.
        grads: gradients after each optimizer step's last.
        parts: micro-batches of a step.
        trained: for each micro-batch, its rows as (domain, tokens, labels).
    """

    rows: list[tuple[int, int, list[int], list[float]]] = field(default_factory=list)
    calls: int = 0
    begun: list[dict[str, Any]] = field(default_factory=list)
    grads: list[dict[str, Any]] = field(default_factory=list)
    trained: list[list[tuple[int, list[int], list[int]]]] = field(default_factory=list)
    parts: int = 1

    def step(self, number: int) -> list[tuple[int, list[int], list[int]]]:
        """Return an optimizer step's rows, if all runs accumulated alike."""
        return list(itertools.chain(*self.trained[number * self.parts : (number + 1) * self.parts]))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Note what the observer is shown and what every optimizer step's gradient is."""
    found = Seen()
    observe, step = Observer.observe, DataflexTrainer.training_step

    def observed(self: Observer, batch: MicroBatch) -> None:
        for i, row in enumerate(batch.rows.tolist()):
            length = int(batch.inputs["attention_mask"][i].sum())
            tokens = batch.inputs["input_ids"][i, :length].tolist()
            losses = batch.losses[i].detach().double()
            assert not losses[length - 1 :].any()
            found.rows.append((found.calls, int(self.domains[row]), tokens, losses[: length - 1].tolist()))
        found.calls += 1
        observe(self, batch)

    def stepped(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        number, found.parts = len(found.trained), self.args.gradient_accumulation_steps
        rows = self.row_sets.train
        domains = {tuple(rows.examples[i]["input_ids"]): int(rows.dataset[i]) for i in range(len(rows))}
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        ids, labels = (
            [x[:n].tolist() for x, n in zip(inputs[k], lengths, strict=True)] for k in ("input_ids", "labels")
        )
        found.trained.append([(domains[tuple(i)], i, given) for i, given in zip(ids, labels, strict=True)])
        if number % found.parts == 0:
            found.begun.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})
        out = step(self, model, inputs, *args)
        if number % found.parts == found.parts - 1:
            found.grads.append({k: p.grad.detach().clone() for k, p in self.model.named_parameters()})
        return out

    monkeypatch.setattr(Observer, "observe", observed)
    monkeypatch.setattr(DataflexTrainer, "training_step", stepped)
    return found


def write(workspace: Any, name: str, **keys: Any) -> Path:
    """Write a run file over three domains of texts, trained whole."""
    values: dict[str, Any] = {
        "stage": "pt",
        "template": None,
        "finetuning_type": "full",
        **{key: None for key in ("lora_target", "lora_rank", "lora_dropout", "eval_dataset")},
        **{key: None for key in ("warmup_step", "update_step", "update_times", "save_steps")},
        "dataset_dir": str(workspace.folder / "data"),
        "dataset": ",".join(DOMAINS),
        "cutoff_len": 24,
        "packing": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "train_type": "dynamic_mix",
        "train_step": 4,
    }
    params = keys.pop("params", {})
    values["dataflex"] = {"store": str(workspace.folder / "store"), "storage": "float32"}
    if params:
        values["dataflex"]["params"] = params
    path: Path = workspace.write(name, **{**values, **keys})
    return path


def proxy(workspace: Any, name: str, keys: dict[str, Any] | None = None, **params: Any) -> Path:
    given = {"reference_model_path": str(workspace.folder / "out" / "reference"), "reweight_eta": 4.0, **params}
    return write(workspace, name, component_name="doremi", params=given, **(keys or {}))


@pytest.fixture(scope="module")
def space(tiny: Any, tmp_path_factory: pytest.TempPathFactory, workspace_class: Any) -> Any:
    """A workspace with a trained reference, whose token losses are featurized with the proxy's run file."""
    from examples.quickstart.pool import write_datasets

    space = workspace_class(tmp_path_factory.mktemp("doremi"), tiny)
    rng = np.random.default_rng(2)
    words = ["apple", "river", "stone", "cloud", "grass", "light"]
    texts = {
        "words": [" ".join(rng.choice(words, rng.integers(2, 6))) for _ in range(10)],
        "sums": [f"{a} + {b} = {a + b}" for a, b in rng.integers(0, 99, (8, 2)).tolist()],
        "lists": [str(rng.integers(0, 9, rng.integers(3, 7)).tolist()) for _ in range(6)],
    }
    write_datasets(space.folder / "data", {name: [{"text": t} for t in several] for name, several in texts.items()})
    space.run("train", write(space, "reference", component_name="stratified", train_step=6))
    space.run("featurize", proxy(space, "proxy"))
    return space


def token_losses(folder: Path) -> Callable[[Sequence[int]], list[float]]:
    """Return a function of a row's tokens: its losses under a model, computed for that row alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def losses(tokens: Sequence[int]) -> list[float]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].double()
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none").tolist()

    return losses


def alphas(
    seen: Seen, reference: Callable[[Sequence[int]], list[float]], calls: int, eta: float = 4.0, eps: float = EPS
) -> list[list[float]]:
    """Return alpha before the first step and after each, by loops over recorded losses; `calls` are those of a step."""
    alpha, score = [1 / 3] * 3, [0.0] * 3
    history = [alpha]
    for step in range(seen.calls // calls):
        excess: list[list[float]] = [[], [], []]
        for call, domain, tokens, losses in seen.rows:
            if call // calls == step:
                excess[domain] += [
                    max(ours - theirs, 0.0)
                    for ours, theirs in zip(losses, reference(tokens), strict=True)
                    if math.isfinite(ours) and math.isfinite(theirs)
                ]
        score = [sum(e) / len(e) if e else held for e, held in zip(excess, score, strict=True)]
        raised = [a * math.exp(eta * s) for a, s in zip(alpha, score, strict=True)]
        alpha = [(1 - eps) * r / sum(raised) + eps / 3 for r in raised]
        history.append(alpha)
    return history


def logged(space: Any, name: str) -> list[dict[str, Any]]:
    text = (space.folder / "out" / name / "mixture.jsonl").read_text("utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "proportions" in line]


def history(space: Any, name: str) -> np.ndarray:
    """(steps + 1, K) alpha in force at each step, and after the last, as the run wrote it."""
    return np.array([[line["alpha"][name] for name in DOMAINS] for line in logged(space, name)])


def outcome(space: Any, name: str) -> np.ndarray:
    found = json.loads((space.folder / "out" / name / "mixture_proportions.json").read_text("utf-8"))
    return np.array([found["proportions"][domain] for domain in DOMAINS])


def gradient(
    space: Any, seen: Seen, step: int, form: str, weights: Sequence[float], sharp: float | None = None
) -> dict[str, Any]:
    """Return the gradient of a step's weighted loss, in float64, by a loop over its rows.

    paper: sum_i w_i x mean loss of domain i's tokens, w normalised over the domains present. official: sum of w x loss
    over sum of w, over tokens. Both times T / N: tokens that are targets over those that Transformers divides by.
    sharp: a row's losses are first multiplied by the weight of `linupper` over the step's rows at this temperature, and
    the product of both factors is brought back to the mean that the domains' factor has over the rows.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(space.tiny.model)
    model.load_state_dict(seen.begun[step])
    model.double().train()
    losses: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    rows = []
    for domain, tokens, labels in seen.step(step):
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        found = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="none")
        rows.append((domain, [loss for loss, label in zip(found, labels[1:], strict=True) if label != -100]))
    means = [float(sum(row).detach()) / len(row) for _, row in rows]
    factors = linupper(means, sharp) if sharp else [1.0] * len(rows)
    if sharp and form == "paper":
        tokens = [sum(len(row) for d, row in rows if d == domain) for domain, _ in rows]
        others = [weights[domain] / count for (domain, _), count in zip(rows, tokens, strict=True)]
        both = [factor * other for factor, other in zip(factors, others, strict=True)]
        factors = [factor * sum(others) / sum(both) for factor in factors]
    for (domain, row), factor in zip(rows, factors, strict=True):
        losses[domain] += [factor * loss for loss in row]
    present = [d for d in losses if losses[d]]
    total: Any
    if form == "paper":
        total = sum(weights[d] * sum(losses[d]) / len(losses[d]) for d in present) / sum(weights[d] for d in present)
    else:
        total = sum(weights[d] * sum(losses[d]) for d in present) / sum(weights[d] * len(losses[d]) for d in present)
    targets = sum(len(several) for several in losses.values())
    counted = sum(label != -100 for _, _, labels in seen.step(step) for label in labels)
    (total * targets / counted).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Compare all numbers together, by the norm."""
    assert found.keys() == expected.keys()
    apart = sum(float((found[k].double() - expected[k]).square().sum()) for k in found) ** 0.5
    size = sum(float(expected[k].square().sum()) for k in expected) ** 0.5
    assert apart <= tolerance * size, (apart, size)


def test_featurize_computes_the_references_losses_of_every_row(space: Any) -> None:
    summary = json.loads((space.folder / "out" / "proxy" / "dataflex_featurize.json").read_text("utf-8"))
    assert (summary["computed"], summary["rows"], summary["gradients"]) == (24, 24, 0)


@pytest.mark.parametrize(("batch", "accumulation"), [pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_a_proxy_run_is_the_method_in_plain_loops(space: Any, seen: Seen, batch: int, accumulation: int) -> None:
    """Alpha, its mean, and the gradient of every step; the losses are read, and none is computed in training."""
    name = f"proxy-{batch}x{accumulation}"
    keys = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    summary = space.run("train", proxy(space, name, keys))
    assert (summary["computed"], summary["reused"], summary["tokens"]) == (0, 24, 0)
    expected = alphas(seen, token_losses(space.folder / "out" / "reference"), accumulation)
    np.testing.assert_allclose(history(space, name), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(space, name), np.mean(expected[1:], axis=0), rtol=1e-5)
    assert np.ptp(expected[-1]) > 0.02
    assert {tuple(line["proportions"].values()) for line in logged(space, name)} == {(1 / 3,) * 3}
    for step in range(4):  # alpha of the steps before weighs a step's loss
        assert_close(seen.grads[step], gradient(space, seen, step, "paper", expected[step]), 2e-5)


def test_the_weights_act(space: Any, seen: Seen) -> None:
    """On the same rows an unweighted run ends elsewhere, and both its gradient and that of equal weights are plain."""
    space.run("train", write(space, "plain", component_name="uniform"))
    space.run("train", proxy(space, "weighted"))
    rows = seen.trained
    assert rows[:4] == rows[4:]
    plain, weighted = space.weights("plain"), space.weights("weighted")
    assert max(float((plain[k] - weighted[k]).abs().max()) for k in plain) > 1e-4
    for step in range(4):
        assert_close(seen.grads[step], gradient(space, seen, step, "official", [1 / 3] * 3), 2e-5)
    later = gradient(space, seen, 7, "official", [1 / 3] * 3)
    with pytest.raises(AssertionError):
        assert_close(seen.grads[7], later, 1e-2)


def test_in_stage_sft_the_loss_is_the_papers_exactly(space: Any, seen: Seen) -> None:
    """All that Transformers counts is a target: the gradient is that of sum_i alpha_i x mean loss, without a factor."""
    tiny = space.tiny
    keys = {
        "stage": "sft",
        "template": "qwen3_nothink",
        "dataset_dir": str(tiny.dataset_dir),
        "dataset": ",".join(tiny.targets),
        "cutoff_len": 128,
        "packing": None,
        "train_step": 1,
        "per_device_train_batch_size": 3,
    }
    space.run("train", proxy(space, "sft", keys, reference_model_path=str(tiny.model), reference="live"))
    labels = [label for _, _, labels in seen.step(0) for label in labels]
    assert labels.count(-100) > len(labels) / 3
    assert all(labels[0] == -100 for _, _, labels in seen.step(0))
    assert sorted(domain for domain, _, _ in seen.step(0)) == [0, 1, 2]
    assert_close(seen.grads[0], gradient(space, seen, 0, "paper", [1 / 3] * 3), 2e-5)


@pytest.mark.slow
def test_the_official_loss_divides_by_what_is_drawn(space: Any, seen: Seen) -> None:
    drawn = [0.5, 0.25, 0.25]
    space.run(
        "train", proxy(space, "official", {"init_mixture_proportions": drawn}, loss="official", average="official")
    )
    expected = alphas(seen, token_losses(space.folder / "out" / "reference"), 1)
    np.testing.assert_allclose(history(space, "official"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(space, "official"), np.mean(expected, axis=0), rtol=1e-5)
    for step in (0, 3):
        weights = [a / p for a, p in zip(expected[step], drawn, strict=True)]
        assert_close(seen.grads[step], gradient(space, seen, step, "official", weights), 2e-5)
    assert [d for step in seen.trained for d, _, _ in step].count(0) == 8


def test_exact_weighs_a_step_by_its_own_losses(space: Any, seen: Seen) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    space.run("train", proxy(space, "exact", keys, exact=True))
    assert seen.calls == len(seen.trained)  # seen once, ahead
    expected = alphas(seen, token_losses(space.folder / "out" / "reference"), 2)
    np.testing.assert_allclose(history(space, "exact"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(space, "exact"), np.mean(expected[1:], axis=0), rtol=1e-5)
    for step in (0, 3):
        assert_close(seen.grads[step], gradient(space, seen, step, "paper", expected[step + 1]), 2e-5)


@pytest.mark.parametrize("exact", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_weights_of_domains_and_of_examples_multiply(space: Any, seen: Seen, exact: bool) -> None:
    """Alpha goes by plain losses, and both factors are in the gradient."""
    name, weighter = f"both-{exact}", {"name": "loss", "params": {"normalisation": "batch", "temperature": 0.3}}
    path = proxy(space, name, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, exact=exact)
    space.run("train", path, f"dataflex.weighter={json.dumps(weighter)}")
    expected = alphas(seen, token_losses(space.folder / "out" / "reference"), 2)
    np.testing.assert_allclose(history(space, name), expected, rtol=1e-5)
    for step in (1, 3):
        alpha = expected[step + exact]
        assert_close(seen.grads[step], gradient(space, seen, step, "paper", alpha, 0.3), 2e-5)
        with pytest.raises(AssertionError):
            assert_close(seen.grads[step], gradient(space, seen, step, "paper", alpha), 1e-2)


def test_the_target_run_takes_what_came_out(space: Any, seen: Seen) -> None:
    space.run("train", proxy(space, "steep", reweight_eta=20.0))
    file = space.folder / "out" / "steep" / "mixture_proportions.json"
    keys = {"component_name": "static", "params": {"proportions": str(file)}, "train_step": 8}
    space.run("train", write(space, "target", **keys))
    wanted = outcome(space, "steep")
    assert np.ptp(wanted) > 0.05
    drawn = np.bincount([d for step in seen.trained[4:] for d, _, _ in step], minlength=3)
    assert np.abs(drawn - 32 * wanted).max() < 1  # exact to one row
    np.testing.assert_allclose([logged(space, "target")[0]["proportions"][d] for d in DOMAINS], wanted, rtol=1e-12)


def test_a_live_reference_equals_the_stored_one(space: Any) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    space.run("train", proxy(space, "stored", keys))
    summary = space.run("train", proxy(space, "live", keys, reference="live"))
    assert (summary["computed"], summary["reused"]) == (0, 0)
    np.testing.assert_allclose(history(space, "live"), history(space, "stored"), rtol=1e-6)
    stored, live = space.weights("stored"), space.weights("live")
    for name in stored:
        torch.testing.assert_close(live[name], stored[name], rtol=0, atol=2e-5)  # Adam moved by up to 4e-3


@pytest.mark.parametrize("reference", ["stored", pytest.param("live", marks=pytest.mark.slow)])
def test_odm_is_rewarded_by_what_the_reference_could_learn(space: Any, seen: Seen, reference: str) -> None:
    """At every step, for the rows of that step; what is stored is read, and the training forward is the only one."""
    out = str(space.folder / "out" / "reference")
    params = {"reference_model_path": out, "reference": reference}
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = write(space, f"odm-{reference}", component_name="odm", params=params, **keys)
    summary = space.run("train", run)
    assert (summary["computed"], summary["reused"]) == (0, 24 if reference == "stored" else 0)
    by_token = token_losses(space.folder / "out" / "reference")
    found = [line for line in logged(space, f"odm-{reference}") if line["step"]]
    assert len(found) == 3
    for step, line in enumerate(found):
        excess: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
        for call, domain, tokens, losses in seen.rows:
            if call // 2 == step:
                excess[DOMAINS[domain]] += [max(a - b, 0.0) for a, b in zip(losses, by_token(tokens), strict=True)]
        expected = {d: math.exp(sum(e) / len(e)) if e else None for d, e in excess.items()}
        assert line["rewards"] == {d: None if e is None else pytest.approx(e, rel=1e-5) for d, e in expected.items()}
    assert any(loss > 1.01 for loss in found[-1]["rewards"].values() if loss)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("reference", "exact"), [("stored", False), ("live", True)])
def test_two_processes_come_to_the_weights_of_one(space: Any, reference: str, exact: bool) -> None:
    """They compute the reference's losses as well, into a store of their own."""
    name = f"{reference}-{exact}"
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    space.run("train", proxy(space, f"one-{name}", keys, reference=reference, exact=exact))
    keys = keys | {"gradient_accumulation_steps": 1}
    store = f"dataflex.store={space.folder / f'store-{name}'}"
    dataflex("train", proxy(space, f"two-{name}", keys, reference=reference, exact=exact), store, **TWO)
    np.testing.assert_allclose(history(space, f"two-{name}"), history(space, f"one-{name}"), rtol=1e-5)
    np.testing.assert_allclose(outcome(space, f"two-{name}"), outcome(space, f"one-{name}"), rtol=1e-5)
    one, two = space.weights(f"one-{name}"), space.weights(f"two-{name}")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_an_adapter_is_a_live_reference(space: Any, seen: Seen) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(space.tiny.model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = space.folder / "adapter"
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(space.tiny.model).save_pretrained(folder)
    merged = space.folder / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    keys = {"train_step": 2}
    space.run("train", proxy(space, "beside", keys, reference_model_path=str(folder), reference="live"))
    expected = alphas(seen, token_losses(merged), 1)
    np.testing.assert_allclose(history(space, "beside"), expected, rtol=1e-5)
    assert np.ptp(expected[1]) > 1e-3


@pytest.mark.parametrize(
    ("interval", "step", "exact"), [pytest.param(1, 2, False, marks=pytest.mark.slow), (2, 3, True)]
)
def test_resumed_it_ends_as_the_uninterrupted_run(
    space: Any, seen: Seen, interval: int, step: int, exact: bool
) -> None:
    """Between updates and inside a round: the same rows, weights equal to the bit, the same alphas."""
    name = f"whole-{interval}-{exact}"
    saving = {
        "train_step": 5,
        "save_strategy": "steps",
        "save_steps": step,
        "update_step": interval,
        "update_times": -1,
    }
    space.run("train", proxy(space, name, saving, exact=exact))
    shutil.copytree(space.folder / "out" / name, space.folder / "out" / f"{name}-again")
    again = space.folder / "out" / f"{name}-again"
    for later in range(step + 1, 6):
        shutil.rmtree(again / f"checkpoint-{later}", ignore_errors=True)
    (again / "model.safetensors").unlink()
    (again / "mixture_proportions.json").unlink()
    space.run("train", proxy(space, f"{name}-again", saving, exact=exact))
    assert seen.trained[5:] == seen.trained[step:5]
    before, after = space.weights(name), space.weights(f"{name}-again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert outcome(space, f"{name}-again").tolist() == outcome(space, name).tolist()
    alpha = {line["step"]: line["alpha"] for line in logged(space, name)}
    assert {line["step"]: line["alpha"] for line in logged(space, f"{name}-again")} == alpha


@pytest.mark.parametrize("reference", ["stored", pytest.param("live", marks=pytest.mark.slow)])
def test_what_the_reference_has_no_loss_of_is_left_out(space: Any, seen: Seen, reference: str) -> None:
    """NaN for one word: a row with it has no stored losses; live, its tokens from that one on have none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(space.tiny.model)
    model: Any = AutoModelForCausalLM.from_pretrained(space.tiny.model, tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.detach().clone()
    base, broken = space.folder / f"untied-{reference}", space.folder / f"broken-{reference}"
    for folder in (base, broken):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer("+")["input_ids"]] = torch.nan
            model.lm_head.weight *= 0.5
    run = proxy(
        space,
        f"nan-{reference}",
        {"model_name_or_path": str(base), "train_step": 3},
        reference_model_path=str(broken),
        reference=reference,
    )
    space.run("train", run, "dataflex.nonfinite_limit=1.0")
    by_token = token_losses(broken)

    def by_row(tokens: Sequence[int]) -> list[float]:
        found = by_token(tokens)
        return found if np.isfinite(found).all() else [math.nan] * len(found)

    expected = alphas(seen, by_row if reference == "stored" else by_token, 1)
    assert np.isfinite(expected).all()
    assert np.ptp(expected[-1]) > 1e-3
    np.testing.assert_allclose(history(space, f"nan-{reference}"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(space, f"nan-{reference}"), np.mean(expected[1:], axis=0), rtol=1e-5)
    assert any(not np.isfinite(by_token(tokens)).all() for _, _, tokens, _ in seen.rows)


def test_an_unsuitable_reference_is_an_error_at_the_start(space: Any, seen: Seen) -> None:
    from transformers import AutoTokenizer

    from examples.quickstart.model import new_model, save, train_tokenizer

    with pytest.raises(ConfigError, match=r"reference_model_path.*a folder that exists"):
        space.run("train", proxy(space, "none", reference_model_path=str(space.folder / "nowhere")))
    with pytest.raises(ConfigError, match=r"reference_model_path"):
        space.run("train", write(space, "none", component_name="doremi"))
    other, wide = space.folder / "other", space.folder / "wide"
    tokenizer: Any = train_tokenizer(["zebra zebra quagga"] * 3, 300)
    save(new_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, other)
    for reference in ("stored", "live"):
        with pytest.raises(MismatchError, match=r"of the run's \d+ tokens are others"):
            space.run("train", proxy(space, "none", reference_model_path=str(other), reference=reference))
    tokenizer = AutoTokenizer.from_pretrained(space.tiny.model)
    save(new_model(tokenizer, hidden=32, layers=1, seed=0), tokenizer, wide)
    with pytest.raises(MismatchError, match="its weights are not those of this run"):
        space.run("train", proxy(space, "none", reference_model_path=str(wide)))
    weights = wide / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        MismatchError, match=r"model.safetensors: cannot be read .*expected the weights of a checkpoint"
    ):
        space.run("train", proxy(space, "none", reference_model_path=str(wide)))
    weights.unlink()
    with pytest.raises(MismatchError, match="found neither adapter_model"):
        space.run("train", proxy(space, "none", reference_model_path=str(wide)))
    assert not seen.trained
    (wide / "tokenizer_config.json").unlink()
    with pytest.raises(MismatchError, match="found no tokenizer"):
        _check_vocabulary(str(wide), tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(MismatchError, match="<new>"):
        _check_vocabulary(str(space.tiny.model), tokenizer)
    _check_vocabulary(str(space.tiny.model), AutoTokenizer.from_pretrained(space.tiny.model))
