"""The verbs that help to write a run file: what methods there are, and what may stand in the file."""

from __future__ import annotations

from typing import Annotated

import typer

from dataflex.answer import Json, answer

app = typer.Typer(rich_markup_mode=None)

Field = Annotated[
    str | None, typer.Option("--field", metavar="KEY", help="One key's part; a method's parameters: selector.less.")
]


@app.command("ls")
def list_methods(as_json: Json = False) -> None:
    """List the methods with their parameters and defaults."""
    from dataflex.config.methods import methods, table

    found = methods()
    answer(found, as_json, table(found))


@app.command()
def schema(field: Field = None) -> None:
    """Print a JSON schema of run files, which editors complete and check by."""
    from dataflex.config.schema import as_text, field_schema, run_file_schema

    print(as_text(run_file_schema() if field is None else field_schema(field)), end="")
