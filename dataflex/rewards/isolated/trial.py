"""Run as a script: run the tests of a reward against a response whose code runs in another process.

Standard input has the code and the tests; standard output gets a line when both processes have begun, then the verdict;
the environment has the numbers of the two pipes to the other process. What an answer may be, and what it may decide, is
in `proxies.py`.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import importlib
import inspect
import json
import os
import sys
import types
from typing import Any

from proxies import Response, Verdict

_PYTHONS_OWN = {*dir(builtins), *sys.stdlib_module_names}


class Names(dict[str, Any]):
    """The global names of the tests; what they do not bind themselves is looked up in the response.

    A name of Python's own (`abs`, `math`) is the response's only if the tests use no other name, of it or of Python: a
    function under test may be called `sum`, but a response must not lend the tests its own `abs` to compare with.
    """

    def __init__(self, response: Response, used: set[str]):
        super().__init__(__name__="__main__")
        self._response = response
        self._is_own_kept = len(used) > 1
        # Class bodies look names up past __missing__.
        for name in used:
            try:
                found = self[name]
            except KeyError:
                continue
            if callable(found) or isinstance(found, types.ModuleType):
                self[name] = found

    def __missing__(self, name: str) -> Any:
        is_own = name in _PYTHONS_OWN
        if is_own and (self._is_own_kept or name.startswith("__")):
            return self._own(name)
        try:
            return self._response.named(name)
        except KeyError:
            if is_own:
                return self._own(name)
            raise

    def _own(self, name: str) -> Any:
        return getattr(builtins, name) if hasattr(builtins, name) else importlib.import_module(name)


def used_names(tree: ast.Module) -> set[str]:
    """Return the names that the tests use and do not bind."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return {node.id for node in names} - bound


def tests_something(tree: ast.Module) -> bool:
    """Say whether running the tests does anything but define and import names; a test that waits to be run counts."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for statement in tree.body:
        if isinstance(statement, definitions):
            is_case = isinstance(statement, ast.ClassDef) and bool(statement.bases)
            if is_case or statement.name.startswith("test"):
                return True
        elif any(isinstance(node, ast.Call | ast.Assert | ast.Raise) for node in ast.walk(statement)):
            return True
    return False


def run(tests: str, response: Response) -> None:
    """Run the tests, and those that they define for unittest and pytest.

    Raises:
        Verdict: the tests cannot be run.
        Exception: a test fails.
    """
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise response.end(None, f"the reference is no Python: {error}") from error
    if not tests_something(tree):
        raise response.end(None, "the reference tests nothing: it defines names, and calls or asserts nothing")
    if "unittest" in tests:
        import unittest

        unittest.main = lambda *_, **__: None  # type: ignore[assignment]  # they are run below
    used = {name for name in used_names(tree) if not name.startswith("__")}
    # A test of `sum` alone is one of the response's `sum`; of `sum` and `abs` either could be what is tested.
    if used and used <= _PYTHONS_OWN and len(used) > 1:
        text = f"the reference uses {', '.join(sorted(used))}: all are Python's own, so it is not said which is tested"
        raise response.end(None, text)
    names = Names(response, used)
    # As a function of their global names, which are no plain dict.
    types.FunctionType(compile(tree, "tests.py", "exec"), names)()
    defined = [value for value in names.values() if getattr(value, "__module__", None) == "__main__"]
    for value in defined:
        if isinstance(value, types.FunctionType) and value.__name__.startswith("test"):
            if not inspect.signature(value).parameters:
                value()
        elif "unittest" in sys.modules and isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            if not result.wasSuccessful():
                raise AssertionError("\n".join(text for _, text in [*result.failures, *result.errors])[-300:])


def verdict(response: Response, code: str, tests: str) -> tuple[float | None, str]:
    """Return the reward, and why it is not 1."""
    try:
        response.ask("the code", code=code)
        run(tests, response)
    except Verdict:
        pass
    except SystemExit as error:
        if error.code:
            response.end(0.0, f"the tests exit with {error.code!r:.80}")
    except BaseException as error:  # a failing test raises whatever it likes
        response.end(0.0, f"{type(error).__name__}: {error!s:.200}")
    found = response.verdict
    return (found.reward, found.reason) if found else (1.0, "")


def main() -> None:
    """Read what to run, and write the verdict."""
    sys.path.remove(os.path.dirname(__file__))  # no module of this folder hides one that is imported later
    undumpable = 4
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(undumpable, 0, 0, 0, 0)  # closed to other processes of the same user
    response = Response(*(int(number) for number in os.environ["DATAFLEX_PIPES"].split()))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what tests print is no verdict
    if not response.has_begun():
        os._exit(1)
    out.write("\n")  # from here on time counts
    out.flush()
    given = json.load(sys.stdin)
    reward, reason = verdict(response, given["code"], given["tests"])
    out.write(json.dumps({"reward": reward, "reason": reason}))
    out.flush()
    os._exit(0)  # a thread of the tests may still run


if __name__ == "__main__":
    main()
