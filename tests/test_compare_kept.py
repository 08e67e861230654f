"""A table of finished runs: known by content wherever it lies, whole whoever writes it, refused where it is damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dataflex.config import load
from dataflex.errors import ConfigError, CorruptionError
from dataflex.fingerprint import digest, plain
from dataflex.pipelines.compare import compare
from dataflex.pipelines.comparing.arms import arms_of
from dataflex.pipelines.comparing.kept import Kept
from dataflex.pipelines.comparing.once import Once
from dataflex.pipelines.comparing.trials import trials_of

RECORD: dict[str, Any] = {
    "test": "target_words", "loss": 1.5, "reward": None, "rows": 8, "tokens": 90, "scored": None, "steps": 5,
    "seconds": 3.0, "feature_seconds": 1.0, "computed": 5, "reused": 0, "gradients": 50,
    "gradients_per_chosen_row": 5.0, "chosen": None, "choice_seconds": None, "choice_feature_seconds": None,
    "choice_computed": None, "choice_reused": None, "choice_gradients": None, "device": "cpu: x86_64", "threads": 1,
}  # fmt: skip


def write(workspace: Any, name: str = "run", **more: Any) -> Path:
    section = {"store": str(workspace.folder / "store"), "params": {"proj_dim": 256}, "test_dataset": "target_words"}
    section |= more.pop("dataflex", {})
    return Path(workspace.write(name, dataflex=section, save_strategy="no", update_step=1, **more))


def trials(path: Path, methods: str, once: int | None = None) -> list[Any]:
    base = load(path, [])
    chosen = None if once is None else Once.of(once, base, 1)
    return trials_of(path, [], arms_of(methods.split(","), base), 1, (), 1, base, chosen)


def record(trial: Any, **more: Any) -> dict[str, Any]:
    about = {"arm": trial.arm.name, "target": trial.target, "seed": trial.seed, "target_seed": trial.target_seed}
    return {**about, **RECORD, **more}


def everywhere(trial: Any) -> dict[str, Any]:
    return dict(trial.identity(None, 1, is_portable=True))


def put(path: Path, trial: Any, **more: Any) -> None:
    Kept(path).add(everywhere(trial), [record(trial, **more)], 4.25)


def test_a_run_is_the_same_wherever_its_files_lie(workspace: Any, tmp_path: Path) -> None:
    (here,) = trials(write(workspace), "less", once=10)
    model = shutil.copytree(workspace.tiny.model, tmp_path / "model", copy_function=shutil.copy)
    data = shutil.copytree(workspace.tiny.dataset_dir, tmp_path / "data", copy_function=shutil.copy)
    os.utime(model / "config.json", (1, 1))
    keys = {"model_name_or_path": str(model), "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}
    path = write(workspace, "there", **keys)
    before = everywhere(here)

    def there() -> dict[str, Any]:
        return everywhere(trials(path, "less", once=10)[0])

    assert there() == before
    assert here.identity(None, 1) != trials(path, "less", once=10)[0].identity(None, 1)
    text = json.dumps(plain(before))
    for folder in (workspace.folder, workspace.tiny.model.parent, workspace.tiny.dataset_dir.parent, Path.cwd()):
        assert str(folder) not in text
    for file, change in (
        (model / "model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        (model / "tokenizer.json", lambda raw: raw.replace(b"{", b"{ ", 1)),
        (data / "pool.json", lambda raw: raw.replace(b"0", b"1", 1)),
        (data / "target_words.json", lambda raw: raw.replace(b"a", b"b", 1)),
        (data / "dataset_info.json", lambda raw: raw.replace(b'pool.json"', b'pool.json", "formatting": "alpaca"')),
    ):
        kept = file.read_bytes()
        assert change(kept) != kept
        file.write_bytes(change(kept))
        assert there() != before, file.name
        file.write_bytes(kept)
    assert there() == before


def test_a_file_that_a_parameter_names_is_known_by_what_it_holds(workspace: Any, tmp_path: Path) -> None:
    def named(file: Path) -> dict[str, Any]:
        variant = {"component_name": "static", "dataflex.params": {"path": str(file)}}
        (trial,) = trials(write(workspace, dataflex={"arms": {"mine": variant}}), "mine")
        return everywhere(trial)

    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text("[1, 2, 3]")
    two.write_text("[1, 2, 3]")
    assert named(one) == named(two)
    two.write_text("[1, 2, 4]")
    assert named(one) != named(two)


def test_what_the_table_has_is_not_run(workspace: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dataflex")
    path, table = write(workspace), workspace.folder / "kept" / "table.jsonl"
    for trial, loss in zip(trials(path, "less,random,base"), (1.0, 1.25, float("nan")), strict=True):
        put(table, trial, loss=loss)
    found = {line.arm: line for line in compare(path, [], ["less", "random", "base"], seeds=1, keep=table)}
    assert found["less"].loss is not None
    assert found["less"].gain is not None
    assert (found["less"].loss.mean, found["less"].gain.mean) == (1.0, -0.25)
    assert str(found["base"].loss) == "nan"
    out = workspace.folder / "out" / "run"
    assert "3 runs, 3 of them finished before" in caplog.text
    assert "to train" not in caplog.text
    assert [each.name for each in (out / "compare").iterdir()] == [".lock"]
    assert "-0.2500" in (out / "compare.md").read_text()
    assert len(table.read_text().splitlines()) == 3
    # An arm is another name for the same settings, and the first line of a run counts.
    put(table, trials(path, "random")[0], loss=9.0)
    path = write(workspace, dataflex={"arms": {"mine": {"component_name": "random", "dataflex.params": {}}}})
    (line,) = compare(path, [], ["mine"], seeds=1, keep=table)
    assert line.loss is not None
    assert (line.arm, line.loss.mean) == ("mine", 1.25)


def test_lines_under_other_settings_stay_and_are_told(workspace: Any) -> None:
    table = workspace.folder / "table.jsonl"
    (before,), (after,) = trials(write(workspace), "less"), trials(write(workspace, learning_rate=1e-4), "less")
    put(table, before)
    kept = Kept(table)
    assert kept.find(after, everywhere(after)) is None
    assert kept.others([(before, everywhere(before))]) is None
    said = kept.others([(after, everywhere(after))])
    assert said == f"1 lines of {table} are of other settings, and not used: arguments"
    kept.add(everywhere(after), [record(after, loss=0.5)], None)
    (found,) = Kept(table).find(after, everywhere(after)) or []
    assert found["loss"] == 0.5
    assert [json.loads(line)["wall_seconds"] for line in table.read_text().splitlines()] == [4.2, None]


def test_a_run_that_was_not_measured_on_every_set_is_not_known(workspace: Any) -> None:
    table = workspace.folder / "table.jsonl"
    (trial,) = trials(write(workspace, dataflex={"test_dataset": "target_words,target_records"}), "random")
    put(table, trial)
    assert Kept(table).find(trial, everywhere(trial)) is None
    put(table, trial, test="target_records")
    found = Kept(table).find(trial, everywhere(trial))
    assert found is not None
    assert [each["test"] for each in found] == ["target_words", "target_records"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-40], "line 2: found Invalid JSON"),
        (lambda text: text.replace('"loss":1.5', '"loss":"low"'), "line 1: found loss: Input should be a valid number"),
        (lambda text: text.replace('"seed":42,', "", 1), "line 1: found seed: Field required"),
        (lambda text: "<<<<<<< ours\n" + text, "line 1: found Invalid JSON"),
        (lambda text: text.replace('"identity":"', '"identity":"x'), "line 1: found identity: String should match"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(workspace: Any, change: Any, said: str) -> None:
    path, table = write(workspace), workspace.folder / "table.jsonl"
    (trial,) = trials(path, "random")
    put(table, trial)
    put(table, trial)
    table.write_text(change(table.read_text()))
    with pytest.raises(CorruptionError, match=said):
        compare(path, [], ["random"], seeds=1, keep=table)
    assert not (workspace.folder / "out").exists()


def test_lines_of_several_writers_come_whole(workspace: Any) -> None:
    table = workspace.folder / "table.jsonl"
    (trial,) = trials(write(workspace), "random")
    identity = everywhere(trial)
    put(table, trial)
    table.write_bytes(table.read_bytes().rstrip(b"\n"))  # as some editors leave it
    writers = [Kept(table) for _ in range(8)]

    def add(number: int) -> None:
        found = [record(trial, test=f"{number} {'x' * 9000}"), record(trial, test=f"{number} too")]
        writers[number % 8].add(identity, found, 1.0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(64)))
    lines = [json.loads(text) for text in table.read_text().splitlines()]
    assert len(lines) == 129
    names = [line["test"].split()[0] for line in lines[1:]]
    assert names[::2] == names[1::2]  # both lines of a run, together
    assert {line["identity"] for line in lines} == {digest(plain(identity))}


def test_a_table_that_cannot_be_written_is_refused_first(workspace: Any) -> None:
    with pytest.raises(ConfigError, match="--table: found the folder"):
        compare(write(workspace), [], ["base"], keep=workspace.folder)
    assert not (workspace.folder / "out").exists()
