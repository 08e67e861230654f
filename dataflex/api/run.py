"""A run file in Python: what it says, and the verbs of the command, in this process."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataflex import distributed
from dataflex.api.choice import Choice
from dataflex.api.results import RunResults
from dataflex.config import Settings
from dataflex.config import load as load_settings
from dataflex.environment import QUIET
from dataflex.errors import ConfigError, ConflictError, DataflexError
from dataflex.faults import told
from dataflex.launch import refuse_several
from dataflex.running import running
from dataflex.stores.root import refuse_unusable

log = logging.getLogger(__name__)

_busy = threading.Lock()


def load(run_file: str | os.PathLike[str], /, **overrides: Any) -> Run:
    """Read and check a run file; nothing heavy is imported, and nothing is written.

    `load("run.yaml", learning_rate=5e-5, dataflex={"params": {"proj_dim": 512}})`: a keyword is a key of the run file,
    and its value takes the place of the file's, whole; None means the default. `dataflex` and the `params` in it are
    reached into: what they do not name stays as the file has it. Dotted keys reach further, as on the command line:
    `load("run.yaml", **{"dataflex.refresh.policy": "static"})`.

    Args:
        run_file: YAML or JSON; relative paths in it are relative to the working folder, as for the command.
        overrides: keys and values: text, numbers, booleans, lists, mappings, None, paths.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    run = Run(load_settings(run_file, values=overrides))
    for note in run.settings.notes:
        log.warning("%s: %s", run_file, note)
    return run


class Run:
    """A run as a checked run file describes it; got from `dataflex.load`.

    Each verb does in this process what the command of its name does: the same checks, files, status file and answer to
    signals, and the same resumption where it was interrupted. One works at a time. Several processes, several devices
    and DeepSpeed need the command, and are refused here.

    What every verb raises: `DataflexError` and its kinds (`dataflex.errors`), with the texts of the command;
    `Interrupted` after SIGTERM or SIGUSR1, `Cancelled` after Ctrl-C or the interruption of a notebook's kernel, with
    what was left and where the same call goes on. Other exceptions, as of a full disk or of a component's own code,
    come as they are, with a note that has the command's words.

    Attributes:
        settings: what the run file and the overrides say.
    """

    def __init__(self, settings: Settings):
        self.settings = settings

    def __repr__(self) -> str:
        settings = self.settings
        method = settings.component_name or settings.train_type
        return f"Run({str(settings.path)!r}, {method}, output_dir={settings.llamafactory.get('output_dir')!r})"

    @property
    def folder(self) -> Path:
        """The run's output folder.

        Raises:
            ConfigError: the run file names none.
        """
        if not (folder := self.settings.llamafactory.get("output_dir")):
            raise ConfigError(f"{self.settings.path}: output_dir: found none; expected a folder for the run's output")
        return Path(folder)

    @property
    def results(self) -> RunResults:
        """What the run has left in its folder so far.

        Raises:
            ConfigError: nothing yet.
        """
        return RunResults(self.folder)

    def featurize(self, worker: bool = False) -> dict[str, Any]:
        """Compute into the stores what the run's method will ask for; interrupted, the same call goes on.

        Args:
            worker: one of many launches: take a share of the rows, and never warm up.

        Returns:
            The summary, as `dataflex_featurize.json` has it: `rows`, `computed`, `reused`, `seconds`, `store` and more.

        Raises:
            ConfigError: the method asks for no features, and `dataflex.features` names none.
            CoverageError: a worker finds no kept state of the warm-up's end.
        """
        with self._at_work("featurize"):
            from dataflex.pipelines.featurize import featurize

            featurize(self.settings, is_worker=worker)
        return self._summary("featurize")

    def select(self, n: int, output: str | os.PathLike[str] | None = None) -> Choice:
        """Choose rows once with the run's method, without training on them; missing features are computed first.

        Args:
            n: rows to choose.
            output: JSON file to write them to, as `dataflex select --output` does; None writes none.

        Raises:
            ConfigError: the run has no selector, its rows are not records, or `output` cannot be written.
            CoverageError: fewer than `n` rows can be chosen.
        """
        with self._at_work("select"):
            from dataflex.pipelines.select import select

            found = select(self.settings, n, None if output is None else Path(output))
        return Choice(found.table, found.records)

    def train(self) -> RunResults:
        """Train with LLaMA-Factory, the rows of every round chosen by the run's method; return what came out.

        A training that was interrupted goes on from its newest whole checkpoint, as with the command.
        """
        with self._at_work("train"):
            from dataflex.pipelines.train import train

            train(self.settings)
        return self.results

    def evaluate(self) -> dict[str, Any]:
        """Measure the model that the run begins with on `dataflex.test_dataset`; `train` does so at its end.

        Returns:
            Test set -> `rows`, `tokens`, `loss` (nats per supervised token) and, where the run file names a reward,
            `reward` and `scored`.

        Raises:
            ConfigError: the run file names no test set.
        """
        with self._at_work("evaluate"):
            from dataflex.pipelines.evaluate import evaluate

            evaluate(self.settings)
        return dict(self._summary("evaluate")["test"])

    @contextlib.contextmanager
    def _at_work(self, verb: str) -> Iterator[None]:
        """Surround a verb with all that the command surrounds it with, and leave the process fit for the next one."""
        with _quiet():  # around all of it: to count the devices torch is imported
            distributed.check_environment(os.environ)
            folder = self.folder  # a training that can name none has nothing to return
            refuse_several(verb, needs_processes=bool(self.settings.llamafactory.get("deepspeed")))
            refuse_unusable(self.settings.store_root)
            if not _busy.acquire(blocking=False):
                raise ConflictError(
                    f"{verb} into {folder}: another verb is at work in this process; expected one at a time, as "
                    "LLaMA-Factory's state is the whole process's. Wait for it, or use the command"
                )
            try:
                with _as_before(), _heard(), _told(), running(verb, self.settings):
                    yield
            finally:
                _busy.release()
                _free()

    def _summary(self, verb: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / f"dataflex_{verb}.json").read_text("utf-8")))


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Give the environment, and torch's switches for a whole process, back as they were.

    Transformers sets them where a run asks for TF32 or determinism, and resets them for no run that does not: features
    of the next one would be of another precision than their name says.
    """
    import torch

    environment = dict(os.environ)
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    names = ("fp32_precision", "deterministic", "benchmark")
    held = [(each, name, getattr(each, name)) for each in backends for name in names if hasattr(each, name)]
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        for each, name, value in held:
            if getattr(each, name) != value:
                setattr(each, name, value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Note on an exception that is not ours what the command would say of it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, DataflexError) and (what := told(error)) is not None:
            error.add_note(f"dataflex: {what[0]}")
        raise


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Print our warnings where nobody has set logging up.

    Python does so by itself, but not while there is any handler, such as the one that keeps them in the run's folder.
    """
    logger = logging.getLogger("dataflex")
    last = None if logger.hasHandlers() else logging.lastResort
    if last is None:
        yield
        return
    logger.addHandler(last)
    try:
        yield
    finally:
        logger.removeHandler(last)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let libraries that are imported meanwhile say as little as under the command; the environment stays the user's.

    Where they were imported before, it is as loud as it was made then.
    """
    added = [name for name in QUIET if name not in os.environ]
    os.environ.update({name: QUIET[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _free() -> None:
    """Give back the memory of the model that a verb loaded: it and its trainer refer to each other."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
