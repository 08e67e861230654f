"""The verbs that help to write a run file: what methods there are, and what may stand in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dataflex.answer import Json, answer
from dataflex.errors import ConfigError

Listed = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]", help="A method, KIND.NAME where several kinds have it, module:Class; or examples."
    ),
]
Copied = Annotated[str | None, typer.Argument(metavar="[EXAMPLE]", help="As listed: selectors/less, or rds_plus.")]
Target = Annotated[Path | None, typer.Argument(metavar="[TARGET]", help="New file, or a folder; default: its name.")]
NewFile = Annotated[Path, typer.Argument(metavar="[RUN.yaml]", help="New file.")]
Method = Annotated[str, typer.Option(metavar="NAME", help="Whose recipe; KIND.NAME where several kinds have it.")]
Field = Annotated[
    str | None, typer.Option("--field", metavar="KEY", help="One key's part; a method's parameters: selector.less.")
]


def list_methods(name: Listed = None, as_json: Json = False) -> None:
    """List the methods with their parameters and defaults; all of one of them; or the examples."""
    from dataflex.config.description import described
    from dataflex.config.methods import methods, table

    if name == "examples":
        _list_examples(as_json)
        return
    if name is not None:
        chosen = described(name)
        lines = [line for each in chosen for line in ["", *each.lines()]]
        answer([each.plain() for each in chosen], as_json, lines[1:])
        return
    found = methods()
    answer(found, as_json, table(found))


def copy_example(name: Copied = None, target: Target = None, as_json: Json = False) -> None:
    """Copy an example run file into a new file; without a name, list them."""
    if name is None:
        _list_examples(as_json)
        return
    from dataflex.config.examples import copied, example

    file = copied(example(name), target)
    advice = "its data and tiny model are made in a clone of DataFlex; put yours in their place, or see `dataflex init`"
    answer({"file": str(file)}, as_json, [f"wrote {file}: {advice}"])


def init(
    run: NewFile = Path("run.yaml"),
    method: Method = "less",
    as_json: Json = False,
) -> None:
    """Write a run file to be filled in: LLaMA-Factory's keys, and a method with all its parameters."""
    from dataflex.config.beginning import first_file
    from dataflex.config.description import described
    from dataflex.config.examples import written

    found = described(method)
    if len(found) > 1:
        names = " or ".join(each.full_name for each in found)
        raise ConfigError(f"--method: found {method!r}, which several kinds have; expected {names}")
    file = written(first_file(found[0]), run)
    lines = [f"wrote {file}: name your model and data in it, then `dataflex validate {file}`"]
    answer({"file": str(file), "method": found[0].full_name}, as_json, lines)


def schema(field: Field = None) -> None:
    """Print a JSON schema of run files, which editors complete and check by."""
    from dataflex.config.schema import as_text, field_schema, run_file_schema

    whole = run_file_schema()
    print(as_text(whole if field is None else field_schema(field, whole)), end="")


def _list_examples(as_json: bool) -> None:
    from dataflex.config.examples import examples

    found = examples()
    width = max(len(each.name) for each in found)
    about = [{"name": e.name, "path": str(e.path), "says": e.says, "method": e.method or None} for e in found]
    answer(about, as_json, [f"{each.name:<{width}}  {each.says}" for each in found])
