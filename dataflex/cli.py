"""The `dataflex` command. What a verb needs is imported when it runs, so that `--help` takes no time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dataflex import distributed, mix_verbs, run_file_verbs, run_verbs, stop, store_verbs
from dataflex.answer import Json, answer
from dataflex.environment import QUIET
from dataflex.errors import ConfigError, DataflexError, Interrupted
from dataflex.faults import told

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
app.command("ls")(run_file_verbs.list_methods)
app.command("cp")(run_file_verbs.copy_example)
app.command()(run_file_verbs.init)
app.command()(run_file_verbs.schema)
app.command()(run_verbs.show)
app.command()(run_verbs.report)
app.add_typer(store_verbs.app, name="store")
app.add_typer(mix_verbs.app, name="mix")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file: LLaMA-Factory's keys and DataFlex's.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Each takes the place of the file's value; dotted keys reach into mappings."
    ),
]


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
        """Write a line. Names of data are anybody's: what would steer the terminal is written as a blank."""
        text = "".join(c if c.isprintable() or c in "\n\t" else " " for c in self.format(record))
        print(text, file=sys.stderr, flush=True)


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
        for name, value in QUIET.items():
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
def plan(
    run: RunFile,
    overrides: Overrides = None,
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Look at N records of each dataset, drawn at random.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what featurize and train will need and cost; nothing is computed, and nothing written into the store."""
    settings = _settings(run, overrides)
    _look_at(settings.store_root)
    with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory and DeepSpeed log to it
        from dataflex.pipelines.plan import plan
        from dataflex.pipelines.planning.shown import lines

        found = plan(settings, sample)
    answer(found, as_json, lines(found))


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
    once: Annotated[
        int | None,
        typer.Option(min=1, metavar="NUM", help="Choose NUM rows once, and train a fresh model on them."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON Lines that finished runs are added to; what it has is not run again."),
    ] = None,
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
        found = compare(run, overrides or [], _names(methods), seeds, _names(targets), target_seeds, jobs, once, table)
    answer([plain(line) for line in found], as_json, shown(found))


@app.command()
def validate(run: RunFile, overrides: Overrides = None) -> None:
    """Check a run file and say what follows from it; imports neither torch nor LLaMA-Factory."""
    settings = _settings(run, overrides)
    from dataflex.config.overview import summary

    print("\n".join(summary(settings)))
    _look_at(settings.store_root)  # last: without a network, all that can be said of the run file has been said


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="Look at what this run needs as well.")
    ] = None,
    overrides: Overrides = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Only: do padding and the rest of a batch move the run's gradients?")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say whether a run can work here: imports, versions that disagree, FAISS, GPUs, free disk; takes a minute."""
    from dataclasses import asdict

    if gradients:
        _look_at_gradients(run, overrides, as_json)
        return
    from dataflex.doctor.examine import examine

    found = []
    for finding in examine(run, overrides or []):
        found.append(finding)
        if not as_json:
            print("\n".join(finding.lines()), flush=True)
    if as_json:
        answer([asdict(finding) for finding in found], True, [])
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


def _look_at_gradients(run: Path | None, overrides: list[str] | None, as_json: bool) -> None:
    if run is None:
        raise ConfigError("--gradients: found no run file; expected one, whose model and rows are looked at")
    with _started("doctor", run, overrides) as settings:
        with contextlib.redirect_stdout(sys.stderr):  # some library greets there, and programs read the answer
            from dataflex.doctor.gradients import refuse, report

            findings, plain = report(settings)
        if distributed.is_main():
            answer(plain, as_json, [line for finding in findings for line in finding.lines()])
        refuse(findings)


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
    from dataflex.launch import launch
    from dataflex.running import running

    settings = _settings(run, overrides)
    _look_at(settings.store_root)  # in every process: one that ends alone leaves the others waiting for it
    # After the run file is checked: what is wrong with it is then said once, and in a second.
    launch(sys.argv[1:], needs_processes=bool(settings.llamafactory.get("deepspeed")))
    for note in settings.notes if distributed.is_main() else ():
        log.warning("%s: %s", run, note)
    with running(verb, settings):
        yield settings


if __name__ == "__main__":
    main()
