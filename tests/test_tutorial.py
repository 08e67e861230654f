"""The tutorial, word for word: its files are written, and its commands run in their order, on little data."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.command import ROOT, python, run

TEXT = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [
    shlex.split(line) for language, block in BLOCKS if language == "bash" for line in block.splitlines() if line.strip()
]


def block(language: str, beginning: str) -> str:
    (found,) = (text for kind, text in BLOCKS if kind == language and text.startswith(beginning))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_goes_from_a_file_to_a_trained_model(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    shown = json.loads(block("json", "["))
    for name, source in (("pool", tiny.pool), ("target", tiny.targets[0]), ("test", tiny.targets[1])):
        records = json.loads((tiny.dataset_dir / f"{source}.json").read_text("utf-8"))
        rows = [
            {"question": f"{row['instruction']}\n{row['input']}", "answer": row["output"], "source": row["source"]}
            for row in records
            if row["output"]
        ]
        assert rows[0].keys() == shown[0].keys()
        Path(f"data/{name}.json").write_text(json.dumps(rows))
    Path("data/dataset_info.json").write_text(block("json", "{"))
    Path("run.yaml").write_text(block("yaml", "# run.yaml"))
    small = [
        f"model_name_or_path={tiny.model}",
        "template=qwen3_nothink",
        "use_cpu=true",
        "cutoff_len=128",
        "warmup_step=1",
        "update_step=2",
        "dataflex.params.proj_dim=64",
    ]
    done = []
    for program, verb, *arguments in COMMANDS:
        assert program == "dataflex"
        if verb == "compare":  # each run in a process of its own: two of them
            arguments = ["run.yaml", "--methods", "less,random", "--seeds", "1"]
        keys = small if "run.yaml" in arguments else []
        code, out, err = run(capsys, verb, *arguments, *keys)
        assert code == 0, err
        done.append(verb)
        if verb == "train":
            looked = python("-c", block("python", "# look.py"))
            assert looked.stdout.startswith("update 1: [("), looked.stderr
            assert looked.stdout.count("\n") == 3
            best = python("-c", block("python", "# best.py"))
            assert [line.count(" ") > 2 for line in best.stdout.splitlines() if line[:1] in "-0123456789"] == [True] * 3
        if verb == "show":
            assert len(out.splitlines()) == 5
        if verb == "plan":
            assert "to compute" in out
        if verb == "validate":
            assert "7 optimizer steps" in out
            assert "gradient (adam, sjlt to 64) of the training rows, after the warm-up of 1 step" in out
    assert done == ["validate", "plan", "featurize", "train", "show", "report", "compare", "select"]
    assert "<title>" in Path("saves/report.html").read_text("utf-8")
    assert Path("saves/less/adapter_model.safetensors").is_file()
    assert json.loads(Path("saves/less/dataflex_summary.json").read_text())["test"]
    assert pq.read_table("saves/less/compare.parquet").num_rows == 2
    chosen = json.loads(Path("saves/chosen.json").read_text())
    assert chosen[0].keys() == shown[0].keys()
    assert "chosen" in json.loads(Path("saves/dataset_info.json").read_text())
