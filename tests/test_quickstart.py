"""The quickstart's data are right: the same files every time, and LLaMA-Factory reads them as meant."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from examples.quickstart import build, demo, pool, tasks
from tests import held

if TYPE_CHECKING:
    from conftest import Tiny

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "seed": 3,
    "rows": {"pool": 6, "target": 2, "test": 2},
    "pretrain": {"rare": 1, "common": 5},
    "model": {"vocabulary": 320, "hidden": 32, "layers": 1, "steps": 2},
}


def draw(source: str, count: int = 300, seed: int = 0) -> list[pool.Row]:
    return pool.split(source, seed, pool=count, target=0, test=0, pretrain=0).pool


@pytest.mark.parametrize("source", pool.SOURCES)
def test_split_is_disjoint_and_repeatable(source: str) -> None:
    split = pool.split(source, 5, pool=240, target=40, test=40, pretrain=420)
    parts = [split.pool, split.target, split.test, split.pretrain]
    assert [len(part) for part in parts] == [240, 40, 40, 420]
    assert len({(row["instruction"], row["input"]) for part in parts for row in part}) == 740
    assert all(row["output"].strip() and row["source"] == source for part in parts for row in part)
    assert split == pool.split(source, 5, pool=240, target=40, test=40, pretrain=420)
    assert split.pool == pool.split(source, 5, pool=240, target=1, test=0, pretrain=0).pool
    assert split.pool != pool.split(source, 6, pool=240, target=1, test=0, pretrain=0).pool


def test_used_up_source_is_an_error() -> None:
    with pytest.raises(ValueError, match="source units has 1960 different questions"):
        pool.split("units", 0, pool=3000, target=0, test=0, pretrain=0)


def test_arithmetic_is_right() -> None:
    for row in draw("arithmetic"):
        boxes, each, gone = map(int, re.findall(r"\d+", row["instruction"]))
        assert row["output"].endswith(f"The answer is {boxes * each - gone}.")


def test_roman_is_right() -> None:
    values = dict(zip("IVXLCDM", (1, 5, 10, 50, 100, 500, 1000), strict=True))
    for row in draw("roman"):
        both = row["instruction"] + " " + row["output"]
        number, numeral = int(re.findall(r"\d+", both)[0]), re.findall(r"\b[IVXLCDM]+\b", both)[0]
        digits = [values[letter] for letter in numeral]
        signs = [-1 if a < b else 1 for a, b in zip(digits, [*digits[1:], 0], strict=True)]
        assert sum(a * b for a, b in zip(digits, signs, strict=True)) == number
        assert not re.search(r"(.)\1{3}", numeral)


def test_dates_are_right() -> None:
    for row in draw("dates"):
        if row["input"]:
            day = datetime.datetime.strptime(row["input"], "%Y-%m-%d")
            assert row["output"] == f"{row['input']} was a {day.strftime('%A')}."
        else:
            ahead, written = re.findall(r"is (\d+) days after (.*)\?", row["instruction"])[0]
            answer = re.findall(r"It is (.*), a", row["output"])[0]
            first, then = (datetime.datetime.strptime(text, "%d %B %Y") for text in (written, answer))
            assert (then - first).days == int(ahead)


def test_units_are_right() -> None:
    seconds = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    checked = 0
    for row in draw("units"):
        left, right = (side.split() for side in row["output"].split(" = "))
        if left[1] in seconds:
            assert int(left[0]) * seconds[left[1]] == int(right[0]) * seconds[right[1]]
            checked += 1
    assert checked > 30


def test_words_and_records_are_right() -> None:
    for row in draw("words"):
        assert set(row["output"].lower().split()) <= set(row["input"].split())
        if row["instruction"].startswith("Sort"):
            assert row["output"].split() == sorted(row["input"].split())
    for row in draw("records"):
        ((field, value),) = json.loads(row["output"]).items()
        assert json.loads(row["input"])[field] == value


def test_code_is_cut_from_valid_functions() -> None:
    for row in draw("code", 100):
        compile(row["input"] + "\n" + row["output"], "row", "exec")


def test_generated_sources_are_golden() -> None:
    assert next(tasks.stream("roman", 0)) == ("Write 1489 as a Roman numeral.", "", "MCDLXXXIX")
    assert next(tasks.stream("units", 0)) == ("Convert 780 inches to feet.", "", "780 inches = 65 feet")


def test_llamafactory_encodes_as_pretrained(tiny: Tiny) -> None:
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    size = len(tokenizer)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen3_nothink"))
    assert len(tokenizer) == size == 512
    for row in json.loads((tiny.dataset_dir / "pool.json").read_text("utf-8"))[:60]:
        question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
        prompt, answer = template.encode_oneturn(tokenizer, messages)
        assert tokenizer.decode(prompt + answer) == "".join(pool.turns(row))
        assert [prompt, answer] == [tokenizer(text)["input_ids"] for text in pool.turns(row)]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "".join(pool.turns(row))


def test_tiny_model_is_as_described(tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    assert model.config.num_hidden_layers == 2
    assert {p.dtype.itemsize for p in model.parameters()} == {4}
    info = json.loads((tiny.dataset_dir / "dataset_info.json").read_text("utf-8"))
    assert {tiny.pool, *tiny.targets, tiny.text, tiny.text_target} == set(info)
    rows = {
        name: json.loads((tiny.dataset_dir / entry["file_name"]).read_text("utf-8")) for name, entry in info.items()
    }
    assert [len(rows[name]) for name in (tiny.pool, *tiny.targets, tiny.text, tiny.text_target)] == [63, 8, 8, 8, 24, 4]
    assert [row["output"] for row in rows[tiny.pool][-2:]] == [None, ""]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PLAN", SMALL)
        assert build.build(folder)
    return folder


def test_build_leaves_intact_files_alone(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PLAN", SMALL)
    times = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    assert not build.build(built)
    assert times == {path: path.stat().st_mtime_ns for path in built.rglob("*")}


@pytest.mark.parametrize("harm", ["changed", "removed", "added", "unfinished"])
def test_build_repairs_to_the_same_bytes(built: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(build, "PLAN", SMALL)
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    if harm == "changed":
        (built / "data" / "pool.json").write_text("[]", "utf-8")
    elif harm == "removed":
        (built / "model" / "model.safetensors").unlink()
    elif harm == "added":
        (built / "data" / "more.json").write_text("[]", "utf-8")
    else:
        (built / "model" / "built.json").unlink()
    assert build.build(built)
    assert before == {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}


def test_pool_is_mixed_and_targets_are_apart(built: Path) -> None:
    rows = {path.stem: json.loads(path.read_text("utf-8")) for path in (built / "data").glob("*.json")}
    assert {row["source"] for row in rows["pool"][:24]} > {row["source"] for row in rows["pool"][:2]}
    questions = {(row["instruction"], row["input"]) for row in rows["pool"]}
    assert len(rows["pool"]) == 6 * len(pool.SOURCES)
    for source in pool.SOURCES:
        for name in (f"target_{source}", f"test_{source}"):
            assert len(rows[name]) == 2
            assert not questions & {(row["instruction"], row["input"]) for row in rows[name]}
    assert set(rows["dataset_info"]) == set(rows) - {"dataset_info"}


def test_answer_loss_counts_answer_tokens_only(built: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.quickstart import measure

    rows = json.loads((built / "data" / "test_words.json").read_text("utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(built / "model")
    losses = []
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in pool.turns(row))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0].double()
        table = torch.log_softmax(logits, dim=-1)
        losses += [-table[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    plain = measure.answer_loss(built / "model", None, rows)
    assert plain == pytest.approx(float(np.mean(losses)), rel=1e-5)

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(built.parent / "adapter"))
    assert measure.answer_loss(built / "model", built.parent / "adapter", rows) != pytest.approx(plain, rel=1e-3)


def test_shares_are_read_from_a_journal(tmp_path: Path) -> None:
    from dataflex.rows import KEY_DTYPE
    from dataflex.schedule import Round
    from dataflex.trainers.journal import Journal
    from dataflex.trainers.rounds import DecidedRound
    from examples.quickstart import measure

    rows = [{"source": "a" if i < 3 else "b"} for i in range(10)]
    keys = np.arange(10, dtype=np.uint64).repeat(2).view(KEY_DTYPE)
    journal = Journal(tmp_path / "rounds")
    chosen = [[0, 1, 5, 6], [2, 2, 1, 9], [9, 8, 7, 6]]
    for number, picked in enumerate(chosen):
        round = Round(number, "update" if number else "warmup", 2 * number, 2, 0, number)
        decided = DecidedRound(round, np.array(picked), np.full(4, np.nan), np.full(4, -1, np.int32), {})
        journal.write(decided, replace(held.pool(10), keys=keys))
    summary = tmp_path / "dataflex_summary.json"
    summary.write_text(json.dumps({"rows": 10}), "utf-8")
    assert dict(measure.shares(tmp_path, rows, "a")) == {"warm-up": 0.5, "update 1": 0.75, "update 2": 0.0}
    summary.write_text(json.dumps({"rows": 9}), "utf-8")
    with pytest.raises(ValueError, match="trained on 9 rows, the pool has 10"):
        dict(measure.shares(tmp_path, rows, "a"))


def test_show_lays_out_columns(capsys: pytest.CaptureFixture[str]) -> None:
    demo.show("Title", ["name", "loss"], ["a", "1.25"], ["longer", "13.5"])
    assert capsys.readouterr().out == "\nTitle\nname    loss\n------  ----\na       1.25\nlonger  13.5\n"


def test_demo_shows_what_is_logged_and_says_where_a_failure_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import logging; from dataflex import cli; cli.options(); logging.getLogger('dataflex.x').info('10 rows')"
    logged = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr
    assert [found[1] for line in logged.splitlines() if (found := demo.SAID.match(line))] == ["10 rows"]
    log = tmp_path / "validate.log"
    with pytest.raises(SystemExit, match=r"dataflex validate failed with exit code 2; all of its output is in .*\.log"):
        demo.run(["validate", "absent.yaml"], log, "first: ")
    assert "absent.yaml" in log.read_text("utf-8")
    said = capsys.readouterr()
    assert "absent.yaml" in said.err
    assert said.out.startswith("first: dataflex validate absent.yaml")


def test_run_files_differ_only_in_the_method() -> None:
    less, random = (
        OmegaConf.to_container(OmegaConf.load(ROOT / build.FOLDER / f"{name}.yaml")) for name in ("less", "random")
    )
    assert isinstance(less, dict)
    assert isinstance(random, dict)
    assert {key for key in less | random if less.get(key) != random.get(key)} == {
        "component_name",
        "output_dir",
        "dataflex",
    }
    assert less["dataflex"]["store"] == random["dataflex"]["store"] == str(demo.OUTPUT / "store")
    assert less["model_name_or_path"] == str(build.FOLDER / "model")
    assert less["dataset_dir"] == str(build.FOLDER / "data")
    assert less["eval_dataset"] == f"target_{build.TARGET}"
    for name, folder in demo.RUNS.items():
        assert {"less": less, "random": random}[name.lower()]["output_dir"] == str(demo.OUTPUT / folder)
