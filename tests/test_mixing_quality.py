"""The benchmarks of mixing and of the trainers' overhead measure all alike, on tiny data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import trainer_overhead
from benchmarks.mixing_quality import Outcome, Study, held_out_losses, intended, interval, line, prepare
from dataflex.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def data(tiny: Any, tmp_path: Path) -> Path:
    """Two domains of pre-training text, as the benchmarks take them; one text has a line separator of Unicode's."""
    texts = [row["text"] for row in json.loads((tiny.dataset_dir / f"{tiny.text}.json").read_text("utf-8"))]
    texts[0] += "\u2028" + texts[0]
    for part, kind in (("train", slice(0, 20)), ("heldout", slice(20, 24))):
        (tmp_path / "pt" / part).mkdir(parents=True)
        for number, name in enumerate(("first", "second")):
            lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts[kind][number::2]]
            (tmp_path / "pt" / part / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return tmp_path


def test_every_method_trains_as_long_and_is_measured_alike(data: Path, tiny: Any) -> None:
    domains, texts = prepare(data, tiny.model, data / "study")
    study = Study(data / "study", domains, texts, steps=4, batch=2, cutoff=32, rate=1e-3)
    for method, runs in (("natural", 0), ("doremi", 2), ("odm", 0)):
        outcome = study.outcome(method, 42)
        assert outcome.before_tokens == runs * 4 * 2 * 32
        assert (outcome.before_seconds > 0) == (runs > 0)
        for shares in (outcome.realised, outcome.intended):
            assert list(shares) == domains
            assert sum(shares.values()) == pytest.approx(1)
        out = study.folder / "out" / f"{method}-42"
        assert outcome.losses == pytest.approx(held_out_losses(out, texts, 32, batch=1), rel=1e-6)
        assert outcome.losses == pytest.approx(one_by_one(out, texts, 32), rel=1e-5)
    assert len(study.seconds) == 4  # the reference is the natural run
    proportions = json.loads((study.folder / "out" / "proxy-42" / "mixture_proportions.json").read_text("utf-8"))
    assert study.outcome("doremi", 42).intended == pytest.approx(proportions["proportions"])
    assert max(abs(outcome.realised[d] - outcome.intended[d]) for d in domains) < 0.5


def test_ado_acts_or_is_refused(data: Path, tiny: Any) -> None:
    domains, texts = prepare(data, tiny.model, data / "study")
    study = Study(data / "study", domains, texts, steps=52, batch=1, cutoff=32, rate=1e-3)
    with pytest.raises(ConfigError, match="first fit comes after 52"):
        study.outcome("ado", 42)
    study.steps = 60
    study.outcome("ado", 42)
    lines = (study.folder / "out" / "ado-42" / "mixture.jsonl").read_text("utf-8").splitlines()
    shares = [list(json.loads(line)["proportions"].values()) for line in lines]
    assert shares[52] == shares[0]
    assert shares[-1] != shares[0]


def test_random_draws_ten_mixtures(data: Path, tiny: Any) -> None:
    domains, texts = prepare(data, tiny.model, data / "study")
    study = Study(data / "study", domains, texts, steps=20, batch=1, cutoff=32, rate=1e-3)
    study.outcome("random", 42)
    assert len((study.folder / "out" / "random-42" / "mixture.jsonl").read_text("utf-8").splitlines()) == 10


def one_by_one(folder: Path, texts: Any, cutoff: int) -> dict[str, float]:
    """Return held-out losses from single blocks and torch's own cross-entropy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    found = {}
    for name, some in texts.items():
        ids = [
            i for text in some for i in [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ]
        losses: list[float] = []
        for start in range(0, len(ids), cutoff):
            block = torch.tensor(ids[start : start + cutoff])
            with torch.no_grad():
                logits = model(input_ids=block[None]).logits[0, :-1]
            losses += torch.nn.functional.cross_entropy(logits, block[1:], reduction="none").tolist()
        found[name] = float(np.mean(losses))
    return found


def test_proportions_are_averaged_over_steps(tmp_path: Path) -> None:
    lines = [{"steps": 1, "proportions": {"a": 0.2, "b": 0.8}}, {"steps": 3, "proportions": {"a": 0.6, "b": 0.4}}]
    (tmp_path / "mixture.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    assert intended(tmp_path / "mixture.jsonl") == pytest.approx({"a": 0.5, "b": 0.5})


def test_a_line_has_means_intervals_and_pairs() -> None:
    def outcome(a: float, b: float) -> Outcome:
        return Outcome({"a": a, "b": b}, {"a": 0.25, "b": 0.75}, {"a": 0.3, "b": 0.7}, 10.0, 20.0, 4000)

    found = line("m", [outcome(1.0, 3.0), outcome(2.0, 4.0)], [outcome(1.0, 2.0), outcome(2.0, 3.0)])
    assert "1.500 (25.0 / 30.0) | 3.500 (75.0 / 70.0) | 2.500 ± 6.353 | 3.500 ± 6.353 b | 0.500 ± 0.000" in found
    assert interval([1.0, 2.0]) == "1.500 ± 6.353"  # t of one degree of freedom, 12.706, times 1 / 2


def test_trainings_take_turns(data: Path, tiny: Any) -> None:
    names = ["plain", "mix: odm"]
    found = trainer_overhead.measure(data, tiny.model, data / "study", names, rounds=2, batch=2, cutoff=32)
    assert {name: len(steps) for name, steps in found.items()} == dict.fromkeys(names, 2)
    assert all(step.cpu > 0 and step.wall > 0 for steps in found.values() for step in steps)
    assert "| plain |" in trainer_overhead.table(found)


def test_interval_of_a_median() -> None:
    """Of 10 values the second and the ninth: 1 - 2 x 11 / 1024 = 0.979."""
    assert trainer_overhead.median_interval(np.arange(1.0, 11.0)) == (2.0, 9.0)
    assert trainer_overhead.median_interval(np.arange(5.0)) == (-np.inf, np.inf)
