"""The notebook under examples/ runs from its first cell to its last, as Jupyter would run it, and holds no outputs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "python.ipynb"


def outputs(notebook: Any) -> list[str]:
    """Return what each cell printed and showed; of a picture, its type."""
    found = []
    for cell in notebook.cells:
        texts = []
        for each in cell.get("outputs", ()):
            data = each.get("data", {})
            texts.append(each.get("text", "") + data.get("text/plain", "") + ("image/png" * ("image/png" in data)))
        if cell.cell_type == "code":
            found.append("\n".join(texts))
    return found


def test_it_is_kept_without_outputs() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
def test_it_runs(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    quickstart = tmp_path / "examples" / "quickstart"
    quickstart.mkdir(parents=True)
    shutil.copy(NOTEBOOK.parent / "quickstart" / "less.yaml", quickstart)
    shutil.copytree(tiny.dataset_dir, quickstart / "data")
    shutil.copytree(tiny.model, quickstart / "model")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    in_its_folder = {"metadata": {"path": str(tmp_path / "examples")}}
    NotebookClient(notebook, timeout=110, kernel_name="python3", resources=in_its_folder).execute()
    said = outputs(notebook)
    [print("-----", x) for x in said]
    assert "20 optimizer steps" in said[1]
    assert "'rows': 62, 'computed': 69, 'reused': 0" in said[2]
    assert "Running tokenizer" not in said[2]  # libraries are quiet
    assert "llamafactory.model" not in said[2]
    assert "RunResults('saves/python': less, finished, 3 rounds)" in said[4]
    assert "image/png" in said[6]
    cosines, scores = re.findall(r"\[[\d. ]+\]", said[7])
    assert cosines == scores
    assert "num_rows: 80" in said[8]
    assert pq.read_metadata(tmp_path / "saves" / "python" / "chosen.parquet").num_rows == 80
