"""The repository keeps its shape: packages, links, wheel, imports, and what the package never calls."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from dataflex.stores.urls import BUCKETS

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("pipelines", "stores")
"""Packages of `dataflex` whose folders lie beside it."""
EXAMPLES = {f"dataflex/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "examples").rglob("*.yaml")}
"""Run files, as a wheel has them."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
TOOLS = PROJECT["tool"]
SOURCES = [
    *(p for p in sorted((ROOT / "dataflex").rglob("*.py")) if p.relative_to(ROOT).parts[1] not in OUTSIDE),
    *(p for folder in OUTSIDE for p in sorted((ROOT / folder).rglob("*.py"))),
]


def python(*arguments: str, cwd: Path = ROOT, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this Python in another folder, with `path` in front of the installed packages."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True)


def module_of(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join((("dataflex",) if parts[0] in OUTSIDE else ()) + parts).removesuffix(".__init__")


def test_package_list_equals_folders() -> None:
    found = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    assert sorted(TOOLS["setuptools"]["packages"]) == sorted(found | {"dataflex.examples"})
    assert {module_of(path).rpartition(".")[0] for path in SOURCES} <= found | {""}, "a folder lacks its __init__.py"
    assert TOOLS["setuptools"]["package-dir"] == {f"dataflex.{name}": name for name in (*OUTSIDE, "examples")}


@pytest.mark.parametrize("name", OUTSIDE)
def test_links(name: str) -> None:
    link = ROOT / "dataflex" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_a_checkout_without_links_says_so(tmp_path: Path) -> None:
    """As git makes one where links are switched off: each link is a file that holds its target."""
    shutil.copytree(ROOT / "dataflex", tmp_path / "dataflex", symlinks=True)
    for name in OUTSIDE:
        (tmp_path / "dataflex" / name).unlink()
        (tmp_path / "dataflex" / name).write_text(f"../{name}")
    installed = "import sys; sys.meta_path = [each for each in sys.meta_path if 'editable' not in repr(each)]"
    command = ("-c", f"{installed}; from dataflex.cli import main; main()", "store", "verify")
    ran = python(*command, cwd=tmp_path, path=tmp_path)
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.count("\n") <= 3
    assert "dataflex/stores: found a file; expected a link to ../stores" in ran.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel of a copy of what is packaged, with the backend that pip would call."""
    copy = tmp_path_factory.mktemp("source tree") / "checkout"  # the space is part of the test
    skipped = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "data", "model")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skipped)
    out = copy.parent / "wheels"
    out.mkdir()
    built = python("-c", f"from setuptools import build_meta as b; b.build_wheel({str(out)!r})", cwd=copy, path=copy)
    assert built.returncode == 0, built.stderr
    return next(out.glob("dataflex-*.whl"))


def test_wheel_holds_exactly_the_packages(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"{module_of(p).replace('.', '/')}.py" for p in SOURCES if p.name != "__init__.py"}
    expected |= {f"{module_of(p).replace('.', '/')}/__init__.py" for p in SOURCES if p.name == "__init__.py"}
    data = {"dataflex/py.typed", "dataflex/examples/__init__.py", "dataflex/examples/run.schema.json"}
    data |= {f"dataflex/pipelines/reporting/page.{suffix}" for suffix in ("css", "html")}
    assert len(EXAMPLES) > 30
    assert names == expected | EXAMPLES | data


def test_wheel_is_importable_elsewhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from dataflex import stores, pipelines; print(stores.__file__); print(pipelines.__file__)"
    ran = python("-c", code, cwd=tmp_path, path=tmp_path / "site")
    assert ran.returncode == 0, ran.stderr
    inside = tmp_path / "site" / "dataflex"
    assert ran.stdout.splitlines() == [str(inside / name / "__init__.py") for name in ("stores", "pipelines")]


def test_wheel_works_outside_the_clone(wheel: Path, tmp_path: Path) -> None:
    """Installed into a new environment that borrows everything but DataFlex from this one."""
    venv.create(tmp_path / "env", with_pip=False)
    found = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", "import site; print(site.getsitepackages()[0])"],
        capture_output=True,
        text=True,
    )
    borrowed = Path(found.stdout.strip()) / "borrowed.pth"  # its folders' own .pth, such as this clone's, are not read
    borrowed.write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    if (tool := shutil.which("uv")) is None:
        pytest.skip("there is no uv to install with; `make` brings one")
    target = ["--python", str(tmp_path / "env" / "bin" / "python")]
    subprocess.run([tool, "pip", "install", *target, "--offline", "--no-deps", "--quiet", str(wheel)], check=True)
    online = ["model_name_or_path=owner/model", "dataset_dir=ONLINE", "dataset=a/pool", "eval_dataset=a/target"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        program, *arguments = command
        command = (str(tmp_path / "env" / "bin" / program), *arguments)
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    files = run("python", "-c", "import dataflex, dataflex.stores; print(dataflex.__file__, dataflex.stores.__file__)")
    assert all(path.startswith(str(borrowed.parent)) for path in files.split())
    assert "featurize" in run("dataflex", "--help")
    assert "proj_dim" in run("dataflex-cli", "ls")
    run("dataflex", "cp", "selectors/less", "run.yaml")
    assert "optimizer steps" in run("dataflex", "validate", "run.yaml", *online)
    run("dataflex", "init", "begun.yaml", "--method", "less")
    for name in ("run.yaml", "begun.yaml"):
        first, *rest = (tmp_path / name).read_text("utf-8").splitlines()
        uri = first.removeprefix("# yaml-language-server: $schema=")
        assert unquote(urlsplit(uri).path) == str(borrowed.parent / "dataflex/examples/run.schema.json")
        if name == "run.yaml":
            assert rest == (ROOT / "examples/selectors/less.yaml").read_text("utf-8").splitlines()[1:]
    assert run("dataflex", "schema") == (ROOT / "examples/run.schema.json").read_text("utf-8")


def test_ruff_sees_syntax_newer_than_the_oldest_python() -> None:
    """So `make check` finds it on any Python."""
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    newer = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "check", "--stdin-filename", "new.py", "-"],
        input='"""New."""\n\ntype Row = int\n',
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert newer.returncode == 1
    assert "Python 3.11" in newer.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_constraints_resolve_for_every_python(version: str) -> None:
    """With wheels alone for what people install; needs the package index, or what uv keeps of it."""
    if (tool := shutil.which("uv")) is None:
        pytest.skip("there is no uv to resolve with; `make` brings one")
    command = [tool, "pip", "compile", "pyproject.toml", "--constraint", "constraints.txt", "--python-version", version]
    for extras in (["--extra", "cpu", "--only-binary", ":all:"], ["--extra", "dev"], ["--extra", "gpu"]):
        ran = subprocess.run([*command, *extras, "--quiet"], cwd=ROOT, capture_output=True, text=True)
        if ran.returncode and ("Failed to fetch" in ran.stderr or "error sending request" in ran.stderr):
            pytest.skip(f"the package index cannot be reached: {ran.stderr.strip().splitlines()[-1]}")
        assert ran.returncode == 0, ran.stderr
        pins = dict(line.split("==") for line in ran.stdout.splitlines() if re.match(r"[\w.-]+==", line))
        assert pins["torch"].startswith("2.13.")
        assert ("faiss-gpu" if "gpu" in extras else "faiss-cpu") in pins


def test_wheel_has_licence_and_commands(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    about = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert b"Apache License" in archive.read(about["LICENSE"])
    commands = archive.read(about["entry_points.txt"]).decode()
    assert "dataflex = dataflex.cli:main" in commands
    assert "dataflex-cli = dataflex.cli:main" in commands


def test_constraints_pin_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["cpu"], *extras["deepspeed"]]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name] in requirement.specifier, requirement


def test_extras_that_messages_name_are_there() -> None:
    named = {package for package in BUCKETS.values() if package.startswith("dataflex[")}
    assert named == {"dataflex[s3]", "dataflex[gcs]"}
    extras = PROJECT["project"]["optional-dependencies"]
    assert all(extras[package.removeprefix("dataflex[").removesuffix("]")] for package in named)


@pytest.mark.parametrize("name", OUTSIDE)
def test_bare_name_is_refused(name: str) -> None:
    ran = python("-c", f"import {name}")
    assert ran.returncode == 1
    assert f"import dataflex.{name}" in ran.stderr.splitlines()[-1]
    assert ran.stderr.splitlines()[-1].startswith("ImportError")


@pytest.mark.parametrize("module", ["dataflex", "dataflex.cli", "dataflex.config", "dataflex.stores"])
def test_import_is_light(module: str) -> None:
    ran = python("-c", f"import sys, {module}; print(*sys.modules)")
    assert ran.returncode == 0, ran.stderr
    assert module in ran.stdout.split()
    assert not {"torch", "transformers", "llamafactory", "faiss", "datasets"} & set(ran.stdout.split())


def test_import_contract() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(TOOLS['importlinter']['contracts'])} kept, 0 broken" in ran.stdout


UNSAFE_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.full_load", "yaml.unsafe_load"}


def unsafe(tree: ast.AST) -> Iterator[str]:
    """Yield what could run code from a file or a string: imports, calls and keywords."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from whole & (UNSAFE_CALLS | {"torch.load"})
            if (node.module or "").partition(".")[0] in UNSAFE_MODULES:
                yield f"from {node.module}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE_CALLS:
                yield name
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle") and ast.unparse(keyword.value) != "False":
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
            if name == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
                yield "torch.load without weights_only=True"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "eval(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "os.system(text)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_unsafe_is_seen(code: str) -> None:
    assert len(list(unsafe(ast.parse(code)))) == 1


def test_safe_is_left_alone() -> None:
    code = (
        "model.eval(); subprocess.run(command); np.load(path); torch.load(path, map_location='cpu', weights_only=True)"
    )
    assert not list(unsafe(ast.parse(code)))


def test_package_calls_nothing_unsafe() -> None:
    found = {module_of(path): names for path in SOURCES if (names := list(unsafe(ast.parse(path.read_text("utf-8")))))}
    assert not found


def test_torch_load_is_in_one_place() -> None:
    calls = [
        module_of(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) <= 1, calls


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_examples_parse(path: Path) -> None:
    run = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(run, dict)
    assert {"model_name_or_path", "dataset", "stage", "output_dir", "train_type"} <= set(run)
    assert not run.get("trust_remote_code")
