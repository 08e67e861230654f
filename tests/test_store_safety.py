"""A store runs no code that lies in it, imports no torch, and depends on nothing of the process around it."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np

from dataflex.stores.files import LocalFiles
from dataflex.stores.root import StoreRoot
from tests.looked_at import problems, repaired
from tests.test_store import LAYOUT, RECIPE, keys, rounded, some

REPOSITORY = Path(__file__).parent.parent


class Watched(LocalFiles):
    opened: list[str]

    def open(self, path: str):
        self.opened.append(path)
        return super().open(path)


class Bomb:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


def test_planted_pickles_are_never_opened(tmp_path: Path) -> None:
    files = Watched(tmp_path / "root")
    files.opened = []
    root = StoreRoot(files)
    store = root.open("gradient", RECIPE, LAYOUT)
    store.append("a", some(LAYOUT, keys(1)))
    for folder in ("", "data", "log", "derived", "tmp"):
        for name in ("bomb.pkl", "bomb.pt", "optimizer.pt", "bomb.npy"):
            path = Path(store.path, folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert [p.harmless for p in problems(store)] == [True] * 16
    repaired(store)
    store = root.stores()[0]
    assert store.contains(keys(1)).all()
    assert len(store.read(keys(1))) == len(next(store.scan())) == 1
    assert not (tmp_path / "exploded").exists()
    assert {Path(path).suffix for path in files.opened} == {".json", ".parquet"}


def test_no_source_of_the_stores_can_run_foreign_code_or_imports_torch() -> None:
    banned = {"pickle", "torch", "marshal", "shelve", "yaml", "subprocess", "dill", "joblib"}
    for path in (REPOSITORY / "stores").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "__import__", "compile"}, path
            elif isinstance(node, ast.keyword):
                assert node.arg not in {"allow_pickle", "shell"}, path


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PYTHONPATH": str(REPOSITORY), **env}
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, check=False)


def test_the_bare_package_name_is_refused() -> None:
    done = run("import stores")
    assert "import dataflex.stores" in done.stderr
    assert done.returncode == 1


def test_stores_depend_on_no_locale_time_zone_umask_and_import_no_torch(tmp_path: Path) -> None:
    values = some(LAYOUT, keys(1, 2))
    folder = tmp_path / "数据 и данные"
    StoreRoot(folder).open("gradient", RECIPE, LAYOUT).append("a", values)
    code = f"""
import os, sys, json
os.umask(0o777 ^ 0o700)
from dataflex.stores.root import StoreRoot
store, = StoreRoot({str(folder)!r}).stores()
import numpy as np
found = store.read(next(store.scan()).keys)
store.append("b", type(found)(np.array([bytes(16)], "S16").view("V16"), *[
    found.status[:1], {{k: v[:1] for k, v in found.scalars.items()}}, found.vectors[:1]]))
assert not {{"torch", "transformers", "faiss"}} & sys.modules.keys()
print(json.dumps([found.vectors.tolist(), store.version]))
"""
    done = run(code, LC_ALL="C", TZ="Pacific/Kiritimati")
    assert done.returncode == 0, done.stderr
    vectors, version = json.loads(done.stdout)
    assert values.vectors is not None
    np.testing.assert_array_equal(np.array(vectors, np.float32), rounded(values.vectors, "float16"))
    assert StoreRoot(folder).stores()[0].version == version
