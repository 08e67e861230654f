"""`init` and `cp` write run files that can be read, and over nothing; `ls NAME` says all that is known of a method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

from dataflex.components.registry import MIXERS, SELECTORS, WEIGHTERS
from dataflex.config import load
from dataflex.config.description import described
from dataflex.config.examples import example, folder, of_method
from dataflex.config.methods import TRAIN_TYPES
from tests.command import python, run
from tests.example import EXAMPLES

METHODS = [f"{registry.kind}.{name}" for registry in (SELECTORS, MIXERS, WEIGHTERS) for name in registry.builtins]


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    return Draft7Validator(json.loads((EXAMPLES / "run.schema.json").read_text("utf-8")))


@pytest.mark.usefixtures("run_folder")
@pytest.mark.parametrize("method", METHODS)
def test_what_init_writes_is_right_once_it_names_model_and_data(
    method: str, validator: Draft7Validator, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "init", "begun.yaml", "--method", method)
    assert (code, out) == (0, "wrote begun.yaml: name your model and data in it, then `dataflex validate begun.yaml`\n")
    Path("chosen.parquet").touch()
    Path("saves/reference").mkdir(parents=True)
    text = Path("begun.yaml").read_text("utf-8")
    assert not list(validator.iter_errors(yaml.safe_load(text)))
    (about,) = described(method)
    kind, _, name = method.partition(".")
    data = ["dataset=pool,target", "warmup_step=0"] if kind == "mixer" else ["dataset=pool"]
    targets = ["eval_dataset=target"] if "\neval_dataset: my_target" in text else []
    settings = load("begun.yaml", ["model_name_or_path=model", *data, *targets])
    assert settings.component is not None
    assert (settings.train_type, settings.component_name) == (TRAIN_TYPES[kind], name)
    assert bool(targets) == (settings.component.needs_targets or any(n.of == "targets" for n in settings.needs))
    assert settings.params == type(settings.params).model_validate(about.starter)
    # Every parameter is in sight; where it is a comment, what stands behind it is its default.
    section = text.partition("  params:")[2]
    shown = dict(re.findall(r"^    #?(\w+): (.+)$", section, re.MULTILINE))
    acting = {k: f for k, f in type(settings.params).model_fields.items() if f.json_schema_extra != {"acts": False}}
    assert acting.keys() <= shown.keys()
    defaults = {param["name"]: param["default"] for param in about.params}
    for key in acting.keys() - about.starter.keys():
        assert yaml.safe_load(shown[key]) == defaults[key]


def test_init_writes_over_nothing_and_asks_which(capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
    before = run_file.read_text()
    code, out, err = run(capsys, "init")
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: found run.yaml; expected a name that is free")
    assert run_file.read_text() == before
    Path("linked.yaml").symlink_to("nowhere.yaml")
    assert run(capsys, "init", "linked.yaml")[0] == 2
    assert not Path("nowhere.yaml").exists()
    code, _, err = run(capsys, "init", "new.yaml", "--method", "random")
    assert (code, Path("new.yaml").exists()) == (2, False)
    assert "expected selector.random or mixer.random" in err
    code, _, err = run(capsys, "init", "new.yaml", "--method", "les")
    assert (code, Path("new.yaml").exists()) == (2, False)
    assert "did you mean 'less'?" in err
    assert err.count("\n") == 1
    code, out, _ = run(capsys, "init", "new/run.yaml", "--method", "tsds", "--json")
    assert (code, json.loads(out)) == (0, {"file": "new/run.yaml", "method": "selector.tsds"})
    assert run(capsys, "init", "model/config.json/run.yaml")[0] == 2


def test_init_takes_a_class_of_ones_own(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    assert run(capsys, "init", "own.yaml", "--method", "./plugin.py:Plain")[0] == 0
    names = ["model_name_or_path=model", "dataset=pool"]
    required = "\n    #cache_dir: null\n    depth: null\n    #width: 3\n"
    text = Path("own.yaml").read_text("utf-8")
    assert required in f"{text}\n"
    Path("own.yaml").write_text(text.replace("depth: null", "depth: 2"))
    assert load("own.yaml", names).params.root["depth"] == 2
    code, out, _ = run(capsys, "ls", "./plugin.py:Plain", "--json")
    (found,) = json.loads(out)
    assert (code, found["kind"], found["example"], found["features"]) == (0, "selector", None, None)
    code, _, err = run(capsys, "ls", "./plugin.py:Missing")
    assert code == 2
    assert err.startswith("dataflex: found no method './plugin.py:Missing'")


def test_cp_copies_all_but_the_way_to_the_schema(capsys: pytest.CaptureFixture[str], run_folder: Path) -> None:
    code, listed, _ = run(capsys, "cp")
    assert (code, listed) == (0, run(capsys, "ls", "examples")[1])
    assert [line.split()[0] for line in listed.splitlines()] == sorted(
        path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.yaml")
    )
    for name, target, file in (
        ("rds_plus", None, "rds_plus.yaml"),
        ("selectors/less.yaml", "mine.yaml", "mine.yaml"),
        ("mixers/doremi/2_proxy", "data", "data/2_proxy.yaml"),
        ("plain", "deeper/down/it.yaml", "deeper/down/it.yaml"),
    ):
        code, out, _ = run(capsys, "cp", name, *([target] if target else []))
        assert (code, out.startswith(f"wrote {file}: ")) == (0, True)
        first, *rest = Path(file).read_text("utf-8").splitlines()
        assert first == f"# yaml-language-server: $schema={(EXAMPLES / 'run.schema.json').as_uri()}"
        assert rest == example(name).path.read_text("utf-8").splitlines()[1:]
    code, out, err = run(capsys, "cp", "rds_plus")
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: found rds_plus.yaml; expected a name that is free")
    assert run(capsys, "cp", "less")[1].startswith("wrote less.yaml: ")  # the method's; demos have one as well
    assert example("less").name == "selectors/less"
    assert "expected one of mixers/random, " in run(capsys, "cp", "random")[2]
    assert "did you mean 'selectors/nice'?" in run(capsys, "cp", "selectors/nise")[2]
    assert json.loads(run(capsys, "cp", "--json")[1])[0].keys() == {"name", "path", "says", "method"}


def test_every_method_has_an_example() -> None:
    assert folder() == EXAMPLES
    for method in METHODS:
        kind, _, name = method.partition(".")
        assert (found := of_method(TRAIN_TYPES[kind], name)), method
        assert found.method == name
    assert described("less")[0].example == "selectors/less"


def test_ls_says_all_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "ls", "less")
    assert code == 0
    for line in (
        "less  (selector, dataflex.selectors.less:Less)",
        "    Score = aggregate over target sets of the mean cosine between a row's step and the set's gradients.",
        "    proj_dim: int, default 8192. numbers kept per gradient; cosine error is about 1/sqrt(proj_dim)",
        "    gradient (adam, sjlt to 8192) of the training rows, of the model in training",
        "    gradient (sgd, sjlt to 8192) of the targets, of the model in training",
        "target rows: needed (eval_dataset)",
        "    dataflex cp selectors/less",
        "    docs/methods.md, in a clone of DataFlex",
    ):
        assert line in out.splitlines()
    (found,) = json.loads(run(capsys, "ls", "less", "--json")[1])
    assert found["features"][0] == {
        "feature": "gradient (adam, sjlt to 8192)",
        "of": "training rows",
        "state": "of the model in training",
    }
    assert (found["compares_with_targets"], found["example"]) == (True, "selectors/less")
    assert {"name": "proj_dim", "type": "int", "required": False, "default": 8192}.items() <= found["params"][2].items()


def test_ls_tells_kinds_apart_and_knows_what_it_cannot_tell(capsys: pytest.CaptureFixture[str]) -> None:
    assert {each["kind"] for each in json.loads(run(capsys, "ls", "loss", "--json")[1])} == {"selector", "weighter"}
    (found,) = json.loads(run(capsys, "ls", "weighter.loss", "--json")[1])
    assert (found["kind"], found["features"]) == ("weighter", [])
    assert "features: none" in run(capsys, "ls", "weighter.loss")[1]
    assert "features: not known before a run" in run(capsys, "ls", "doremi")[1]
    assert "features: with reward as in a new run file" in run(capsys, "ls", "nice")[1]
    code, out, err = run(capsys, "ls", "mixer.less")
    assert (code, out) == (2, "")
    assert err.startswith("dataflex: found no method 'mixer.less'; expected one of those that `dataflex ls` lists")


def test_they_import_nothing_heavy(run_folder: Path) -> None:
    calls = ["'init', 'a.yaml'", "'cp', 'plain'", "'ls', 'less'"]
    tries = "".join(f"try: main([{call}])\nexcept SystemExit as end: assert not end.code\n" for call in calls)
    ran = python("-c", f"import sys\nfrom dataflex.cli import main\n{tries}print(*sys.modules)")
    assert ran.returncode == 0, ran.stderr
    assert not {"torch", "transformers", "llamafactory"} & set(ran.stdout.splitlines()[-1].split())
