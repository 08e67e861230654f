"""The `dataflex` command. What a verb needs is imported when it runs, so that `--help` takes no time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dataflex import distributed, stop
from dataflex.errors import Cancelled, ConfigError, CorruptionError, DataflexError, Interrupted, MismatchError
from dataflex.faults import of_user_code, told

if TYPE_CHECKING:
    from dataflex.config import Settings

log = logging.getLogger(__name__)

app = typer.Typer(
    name="dataflex",
    help="Featurize a training set once; select from it while training with LLaMA-Factory.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)
store_app = typer.Typer(help="Look at stores of features, and make room.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(store_app, name="store")
mix_app = typer.Typer(help="Find proportions of domains.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(mix_app, name="mix")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file: LLaMA-Factory's keys and DataFlex's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Each takes the place of the file's value; dotted keys reach into mappings."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Root = Annotated[str | None, typer.Option(help="Path or URL; default: as for a run file that names no store.")]
ByRun = Annotated[bool, typer.Option("--by-run", help="By the runs that refer to them.")]
Runs = Annotated[list[str] | None, typer.Option("--run", metavar="RUN", help="Output folder or id; repeatable.")]
Unreferenced = Annotated[bool, typer.Option("--unreferenced", help="What no run refers to.")]
Leftovers = Annotated[bool, typer.Option("--leftovers", help="Files of crashes that no reader opens.")]
Older = Annotated[bool, typer.Option("--older-engine", help="What an older version computed and no run refers to.")]
Finished = Annotated[bool, typer.Option("--include-finished", help="The runs named may be finished ones.")]
Grace = Annotated[float, typer.Option(metavar="HOURS", help="What is younger is taken to be in use.")]
Delete = Annotated[bool, typer.Option("--delete", help="Remove; without it, only say what would go.")]
_CALM = {"LLAMAFACTORY_VERBOSITY": "WARNING", "TRANSFORMERS_VERBOSITY": "warning", "TQDM_DELAY": "5"}
"""Of the libraries below, where nobody has set it and --verbose is not given."""
Name = Annotated[str, typer.Argument(metavar="STORE", help="Name of a store, or how it begins.")]

RunTable = Annotated[Path, typer.Argument(metavar="RUNS.csv", help="CSV or .parquet, columns mix.* and metric.*.")]
Weights = Annotated[str | None, typer.Option(metavar="METRIC=WEIGHT,...", help="Default: all metrics equal.")]
Prior = Annotated[str | None, typer.Option(help="natural, uniform, or a JSON file; default: natural by --sizes.")]
Kl = Annotated[float, typer.Option(help="Weight of KL(x || prior), in units of the metrics per nat.")]
Sizes = Annotated[Path | None, typer.Option(metavar="JSON", help="Tokens of each domain.")]
Tokens = Annotated[float | None, typer.Option(help="Tokens of the run that the proportions are for.")]
Cap = Annotated[float | None, typer.Option(help="Most epochs over a domain; default: 4 where --tokens is given.")]
Proportions = Annotated[Path | None, typer.Option("--output", metavar="JSON", help="File of proportions to write.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit; what people can act on prints its text and no traceback (`--verbose` shows it)."""
    try:
        try:
            _refuse_empty(sys.argv[1:] if arguments is None else arguments)
            if arguments is None:  # as a command, and not called by a program
                stop.last()
            app(args=arguments, prog_name="dataflex")
        finally:
            _flush()
    except (Exception, Interrupted) as error:  # libraries in Rust raise a bare Exception for a full disk
        if (what := told(error)) is None:
            raise
        if isinstance(error, Interrupted):
            for number in stop.SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # a launcher that sees one process end asks the others again
        log.debug("where it was raised:", exc_info=error)
        text, exit_code = what
        if not (isinstance(error, DataflexError) and error.everywhere) or distributed.is_main():
            _leave_bars()
            print(f"dataflex: {text}", file=sys.stderr)
        sys.exit(exit_code)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse a text without anything in it: as a path it would be the working folder, as a name it would fit any."""
    for before, argument in zip(["dataflex", *arguments], arguments, strict=False):
        option, sign, value = argument.partition("=")
        is_option = argument.startswith("--") and bool(sign)
        if not argument.strip() or (is_option and not value.strip()):
            where = option if is_option else f"behind {before}"
            raise ConfigError(
                f"command line: found an empty text ({where}); expected a value, or no such option; see whether a "
                "variable is unset"
            )


def _leave_bars() -> None:
    """Close the progress bars that are still drawn, so that an error stands on a line of its own below them."""
    if shown := sys.modules.get("dataflex.display"):
        shown.close()
    if tqdm := sys.modules.get("tqdm.std"):
        for bar in list(getattr(tqdm.tqdm, "_instances", ())):
            bar.close()


def _flush() -> None:
    """Flush standard output now, while a full disk can still be reported; Python's own flush at exit comes too late."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


class _Stderr(logging.Handler):
    """Writes to the current `sys.stderr`, which progress bars replace so that log lines do not break into them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        print(self.format(record), file=sys.stderr, flush=True)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print what `version` prints.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Warnings and errors only.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more, on every process, and how errors arose.")
    ] = False,
) -> None:
    """Set up logging: rank 0 says what is done, the others only what is wrong."""
    distributed.check_environment(os.environ)
    level = logging.INFO if distributed.is_main() and not quiet else logging.WARNING
    format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=format, datefmt="%H:%M:%S", handlers=[_Stderr()])
    logging.getLogger("dataflex").setLevel(logging.DEBUG if verbose else level)
    if not verbose:
        # Before these are imported: LLaMA-Factory and Transformers then say what is wrong and no more, and a bar of
        # `datasets` shows only where it takes long.
        for name, value in _CALM.items():
            os.environ.setdefault(name, value)
    # As under torchrun's -m, so that modules beside the run file's command are found either way; last, to hide nothing.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


@app.command()
def featurize(
    run: RunFile,
    overrides: Overrides = None,
    worker: Annotated[
        bool, typer.Option("--worker", help="One of many launches: take a share of the rows, and never warm up.")
    ] = False,
) -> None:
    """Compute into the stores what the run's method will ask for; interrupted, it goes on where it stopped.

    Launches that share a store share the work, whatever node they are on: run the same command as often as you like.
    """
    with _started("featurize", run, overrides) as settings:
        from dataflex.pipelines.featurize import featurize

        featurize(settings, is_worker=worker)


@app.command()
def train(run: RunFile, overrides: Overrides = None) -> None:
    """Train with LLaMA-Factory, the rows of every round chosen by the run's method."""
    with _started("train", run, overrides) as settings:
        from dataflex.pipelines.train import train

        train(settings)


@app.command()
def select(
    run: RunFile,
    num: Annotated[int, typer.Option(min=1, help="Rows to choose.")],
    output: Annotated[Path, typer.Option(help="JSON file to write; its registration and a Parquet go beside it.")],
    overrides: Overrides = None,
) -> None:
    """Choose rows once, without training on them, and write them as a dataset of LLaMA-Factory."""
    with _started("select", run, overrides) as settings:
        from dataflex.pipelines.select import select

        select(settings, num, output)


@app.command()
def evaluate(run: RunFile, overrides: Overrides = None) -> None:
    """Measure the model that the run begins with on `dataflex.test_dataset`; `train` does so at its end."""
    with _started("evaluate", run, overrides) as settings:
        from dataflex.pipelines.evaluate import evaluate

        evaluate(settings)


@app.command()
def compare(
    run: RunFile,
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="Methods, and base, full, random_length:METHOD, ...")
    ],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each method, from the run file's seed on.")] = 3,
    targets: Annotated[str, typer.Option(metavar="NAME,...", help="Target sets, each shown to methods alone.")] = "",
    target_seeds: Annotated[int, typer.Option(min=1, help="Draws of dataflex.target_rows for each.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Train methods alike, measure them on dataflex.test_dataset, and say how far each is from random rows.

    Interrupted, the same command goes on; what is finished is kept.
    """
    from dataflex.pipelines.compare import compare
    from dataflex.pipelines.comparing.table import plain, shown
    from dataflex.status import reported

    settings = _settings(run, overrides)
    _look_at(settings.store_root)
    with reported("compare", settings.llamafactory["output_dir"]):
        table = compare(run, overrides or [], _names(methods), seeds, _names(targets), target_seeds, jobs)
    _print([plain(line) for line in table], as_json, shown(table))


@app.command()
def validate(run: RunFile, overrides: Overrides = None) -> None:
    """Check a run file and say what follows from it; imports neither torch nor LLaMA-Factory."""
    settings = _settings(run, overrides)
    from dataflex.config.overview import summary

    print("\n".join(summary(settings)))
    _look_at(settings.store_root)  # last: without a network, all that can be said of the run file has been said


@app.command("ls")
def list_methods(as_json: Json = False) -> None:
    """List the methods with their parameters and defaults."""
    from dataflex.config.methods import methods, table

    found = methods()
    _print(found, as_json, table(found))


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="Look at what this run needs as well.")
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say whether a run can work here: imports, versions that disagree, FAISS, GPUs, free disk; takes a minute."""
    from dataclasses import asdict

    from dataflex.doctor.examine import examine

    found = []
    for finding in examine(run, overrides or []):
        found.append(finding)
        if not as_json:
            print("\n".join(finding.lines()), flush=True)
    if as_json:
        _print([asdict(finding) for finding in found], True, [])
    if wrong := [finding.about for finding in found if finding.level == "error"]:
        raise DataflexError(f"no run can work before this is mended: {', '.join(dict.fromkeys(wrong))}")


@app.command()
def version() -> None:
    """Print the versions of DataFlex and of what it stands on."""
    from importlib.metadata import PackageNotFoundError, version

    from dataflex import __version__

    print(f"dataflex {__version__}")
    print(f"python {sys.version.partition(' ')[0]}")
    for name in (
        "llamafactory",
        "transformers",
        "torch",
        "accelerate",
        "peft",
        "datasets",
        "pyarrow",
        "faiss-cpu",
        "faiss-gpu",
        "deepspeed",
    ):
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name} not installed")


@store_app.command("ls")
def list_stores(by_run: ByRun = False, root: Root = None, as_json: Json = False) -> None:
    """List the stores: name, rows, bytes."""
    if by_run:
        from dataflex.stores.upkeep.listing import by_runs, lines_of

        listed = by_runs(_files(root))
        _print(listed, as_json, lines_of(listed))
        return
    where, stores = _stores(root)
    found = []
    for store in stores:
        try:
            found.append(_about(store))
        except (CorruptionError, MismatchError) as error:  # of one of them: the rest is listed
            log.warning("%s; left out", error)
    lines = [f"{s['rows']:>12,} rows {s['bytes']:>15,} bytes  {s['storage']:<7}  {s['name']}" for s in found]
    _print(found, as_json, lines or [f"no stores under {where}"])


@store_app.command("show")
def show_store(name: Name, root: Root = None, as_json: Json = False) -> None:
    """Show a store's recipe: everything but the row that its values depend on."""
    import json

    where, stores = _stores(root)
    names = [store.folder for store in stores]
    matching = [store for store in stores if store.folder.startswith(name)]
    if len(matching) != 1:
        found = f"{len(matching)} stores called {name}..." if matching else f"no store {name}"
        raise MismatchError(f"{found} under {where}; expected one of {', '.join(names) or 'none'}")
    about = _about(matching[0]) | {"recipe": matching[0].recipe}
    _print(about, as_json, [json.dumps(about, indent=2, ensure_ascii=False)])


@store_app.command("verify")
def verify_stores(root: Root = None, as_json: Json = False) -> None:
    """Read every byte under the root; exit with 4 if any is not what was committed."""
    from dataflex.stores.upkeep.inspection import inspect, refuse
    from dataflex.stores.upkeep.listing import inspected, lines_of_inspection

    with _unwarned():
        parts = list(inspect(_files(root)))
    _print(inspected(parts), as_json, lines_of_inspection(parts))
    refuse(parts)


@store_app.command("repair")
def repair_stores(root: Root = None, as_json: Json = False) -> None:
    """Remove what is damaged, so that the next run computes it again; exit with 4 if something cannot be mended."""
    from dataflex.stores.upkeep.inspection import refuse, repair
    from dataflex.stores.upkeep.listing import lines_of_repair, repaired

    with _unwarned():
        parts = list(repair(_files(root)))
    _print(repaired(parts), as_json, lines_of_repair(parts))
    refuse(parts, after_repair=True)


@store_app.command("gc")
def collect_garbage(
    run: Runs = None,
    unreferenced: Unreferenced = False,
    leftovers: Leftovers = False,
    older_engine: Older = False,
    include_finished: Finished = False,
    grace: Grace = 24.0,
    delete: Delete = False,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """Remove stores, kept states and unused files: what --run, --unreferenced, --older-engine and --leftovers name.

    Without --delete it only says what would go. What a finished run refers to stays unless the run is named and
    --include-finished is given; what a running one refers to stays always.
    """
    from dataflex.features.spec import ENGINE_VERSION
    from dataflex.stores.upkeep.gc import Scope, plan
    from dataflex.stores.upkeep.listing import lines_of_removal
    from dataflex.stores.upkeep.removal import carry_out

    files = _files(root)
    scope = Scope(tuple(run or ()), unreferenced, leftovers, include_finished, older_engine, grace)
    items = plan(files, scope, ENGINE_VERSION)
    if delete:
        items = carry_out(files, items, scope)
    about = [{"kind": i.kind, "name": i.name, "bytes": i.bytes, "goes": i.goes, "why": i.why} for i in items]
    _print({"deleted": delete, "items": about}, as_json, lines_of_removal(items, delete))


@mix_app.command("fit")
def fit_proportions(
    runs: RunTable,
    weights: Weights = None,
    prior: Prior = None,
    kl: Kl = 0.05,
    sizes: Sizes = None,
    tokens: Tokens = None,
    cap: Cap = None,
    output: Proportions = None,
    as_json: Json = False,
) -> None:
    """Fit how metrics follow from mixtures to finished runs, and solve for the best mixture; trains nothing."""
    from dataflex.fitting.fit import fit_mixture, lines_of, write
    from dataflex.fitting.goal import read_goal
    from dataflex.fitting.table import read_runs

    read = read_runs(runs)
    if read.unused:
        log.info("%s: columns not used: %s", runs, ", ".join(read.unused))
    found = fit_mixture(read, read_goal(read, weights, prior, kl, sizes, tokens, cap))
    for warning in found["fit"]["warnings"]:
        log.warning("%s: %s", runs, warning)
    if output is not None:
        write(found, runs, output)
    _print(found, as_json, lines_of(found))


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _look_at(root: str) -> None:
    """Refuse a root on an object store that cannot be used; of a local one the configuration says what is wrong."""
    if "://" in root:
        from dataflex.stores.root import refuse_unusable

        refuse_unusable(root)


def _settings(run: Path, overrides: list[str] | None) -> Settings:
    from dataflex.config import load
    from dataflex.launch import check

    settings = load(run, overrides or [])
    check(os.environ, needs_processes=bool(settings.llamafactory.get("deepspeed")))
    return settings


@contextlib.contextmanager
def _started(verb: str, run: Path, overrides: list[str] | None) -> Iterator[Settings]:
    """Give the settings in every process of the run; the process that was called becomes their launcher."""
    from dataflex.config.outputs import refuse_misplaced
    from dataflex.launch import launch
    from dataflex.status import reported

    settings = _settings(run, overrides)
    _look_at(settings.store_root)  # in every process: one that ends alone leaves the others waiting for it
    # After the run file is checked: what is wrong with it is then said once, and in a second.
    launch(sys.argv[1:], needs_processes=bool(settings.llamafactory.get("deepspeed")))
    for note in settings.notes if distributed.is_main() else ():
        log.warning("%s: %s", run, note)
    try:
        with _leaving(), reported(verb, settings.llamafactory.get("output_dir")), _staying(verb):
            if distributed.local_rank() == 0 and settings.llamafactory.get("output_dir"):
                refuse_misplaced(settings.llamafactory["output_dir"])
            distributed.prepare()
            yield settings
    except KeyboardInterrupt as interrupt:  # behind the pipelines' imports it says more: `trainers.stopping`
        rest = "the same command begins where this one would have"
        raise Cancelled(f"Ctrl-C: {verb} stopped; what is committed stays, and {rest}") from interrupt


@contextlib.contextmanager
def _staying(verb: str) -> Iterator[None]:
    """Refuse a `sys.exit` of code that a command runs, such as a component: the command would seem to be done."""
    try:
        yield
    except SystemExit as error:
        where = of_user_code(error) or f"SystemExit: {error.code}"
        raise DataflexError(f"{verb} was ended by code that it ran, before it was done: {where}") from error


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
    """End the process group of a run that went well, or that all processes have left at the same place."""
    try:
        yield
    except Interrupted as interrupted:
        if interrupted.is_together:
            interrupted.__traceback__ = None  # its frames hold the trainer, which must be gone first
            distributed.leave()
        raise
    distributed.leave()


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Keep the stores from warning of what is reported in full afterwards."""
    logger = logging.getLogger("dataflex.stores")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stores(root: str | None) -> tuple[str, list[Any]]:
    from dataflex.stores.root import StoreRoot

    files = _files(root)
    return files.url, StoreRoot(files).stores()


def _files(root: str | None) -> Any:
    from dataflex.config import store_root
    from dataflex.stores.root import existing_files

    named_by = "--root" if root is not None else "DATAFLEX_HOME" if os.environ.get("DATAFLEX_HOME") else None
    return existing_files(store_root(root), named_by)


def _about(store: Any) -> dict[str, Any]:
    layout = store.layout
    return {
        "name": store.folder,
        "kind": store.kind,
        "rows": store.rows,
        "bytes": store.bytes,
        "fragments": len(store.committed_fragments()),
        "width": layout.width,
        "storage": layout.storage,
        "path": store.path,
    }


def _print(value: Any, as_json: bool, lines: Sequence[str]) -> None:
    import json

    print(json.dumps(value, indent=2, default=str, ensure_ascii=False) if as_json else "\n".join(lines))


if __name__ == "__main__":
    main()
