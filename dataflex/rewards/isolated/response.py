"""Run as a script: run a response's code, then do with its names what the tests ask for, one JSON line each.

The tests are not here, nor what they expect: only names and arguments come in. Whatever the code does to this process,
it can do no more than answer otherwise.
"""

from __future__ import annotations

import builtins
import importlib.util
import itertools
import json
import math
import operator
import os
import sys
import types
from typing import Any

from literals import NotLiteral, decode, encode

_LONGEST = 1_000_000  # items taken of what is iterated over


class Objects:
    """The names of the code, and the instances that the tests have made of its classes."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        self.made: list[Any] = []

    def target(self, where: Any) -> Any:
        """Return what a name or the number of an instance stands for."""
        return self.made[where] if isinstance(where, int) else self.names[where]

    def encoded(self, value: Any, may_make: bool = False) -> Any:
        """Return a value for the tests: a literal, or an instance: one that they have, or a new one if they may."""

        def number(found: Any) -> Any:
            for known, made in enumerate(self.made):  # by identity: `index` would ask the code's own __eq__
                if made is found:
                    return {"made": known}
            if not may_make or isinstance(found, type) or type(found).__module__ != "response":
                raise NotLiteral(f"a {type(found).__name__}, which is no JSON-like literal")
            self.made.append(found)
            return {"made": len(self.made) - 1}

        return encode(value, number)

    def argument(self, kind: str, held: Any) -> Any:
        """Return an argument that is no literal: an instance, a name of the code, or one of Python's own."""
        if kind == "made":
            return self.made[held]
        return getattr(builtins, held) if kind == "builtin" else self.names[held]


def described(objects: Objects, name: str) -> dict[str, Any]:
    """Return what kind of thing a name of the code stands for."""
    if name not in objects.names:
        return {"missing": True}
    value = objects.names[name]
    if isinstance(value, type) and issubclass(value, Exception):
        return {"exception": _lineage(value)}
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if callable(value):
        return {"callable": True}
    return {"value": objects.encoded(value)}


def done(objects: Objects, asked: dict[str, Any]) -> dict[str, Any]:
    """Do one thing, and return what came of it."""
    if asked["do"] == "describe":
        return described(objects, asked["name"])
    owner, may_make = objects.target(asked["on"]), asked["may_make"]
    if asked["do"] == "attribute":
        value = getattr(owner, asked["name"])
        return {"value": objects.encoded(value, may_make)} if _is_value(value) else {"callable": True}
    arguments = [decode(item, objects.argument) for item in asked["arguments"]]
    if asked["do"] == "operate":
        return {"value": objects.encoded(_operated(owner, asked["name"], arguments), may_make)}
    keywords = {key: decode(item, objects.argument) for key, item in asked["keywords"].items()}
    called = getattr(owner, asked["name"]) if asked["name"] else owner
    value = called(*arguments, **keywords)
    answer: dict[str, Any] = {}
    after = [objects.encoded(item) if isinstance(item, list | dict | set | bytearray) else None for item in arguments]
    if any(a is not None and a != b for a, b in zip(after, asked["arguments"], strict=True)):
        answer["arguments"] = after
    same = next((i for i, item in enumerate(arguments) if item is value and after[i] is not None), None)
    if same is not None:
        return answer | {"argument": same}
    return answer | {"value": objects.encoded(value, may_make)}


def _is_value(value: Any) -> bool:
    return not callable(value) or (type(value).__module__ == "response" and not isinstance(value, type))


def _operated(owner: Any, name: str, arguments: list[Any]) -> Any:
    """Return what Python makes of an operator."""
    plain = name.strip("_")
    if plain in ("iter", "reversed"):
        items = list(itertools.islice(getattr(builtins, plain)(owner), _LONGEST + 1))
        if len(items) > _LONGEST:
            raise NotLiteral(f"more than {_LONGEST} items")
        return items
    called = vars(operator).get(name) or getattr(builtins, plain, None) or getattr(math, plain, None)
    if called is not None:
        return called(owner, *arguments)
    reflected: Any = vars(operator).get(f"__{plain[1:]}__", divmod)
    return reflected(*arguments, owner)


def _lineage(kind: type) -> list[str]:
    return [parent.__name__ for parent in kind.__mro__]


def _raised(error: BaseException) -> dict[str, Any]:
    try:
        arguments = [encode(item) for item in error.args]
    except Exception:  # whatever the code's own exception does with its arguments
        arguments = [f"{type(error).__name__}"]
    return {"raised": _lineage(type(error)), "arguments": arguments}


def main() -> None:
    """Answer until there is nothing more to answer."""
    sys.path.remove(os.path.dirname(__file__))  # no module of this folder hides one that is imported later
    asked, answers = os.fdopen(os.dup(0), "r", encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.dont_write_bytecode = True
    # Not as __main__, so that a main block of the code stays as it is; a file, so that tracebacks and `inspect` see it.
    spec = importlib.util.spec_from_file_location("response", os.path.abspath("response.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["response"] = importlib.util.module_from_spec(spec)
    objects = Objects(module.__dict__)
    answers.write("\n")  # ready; no code of the response has run yet
    answers.flush()
    for line in asked:
        found = json.loads(line)
        try:
            if "code" in found:
                with open("response.py", "wb") as file:
                    file.write(found["code"].encode("utf-8", "replace"))
                spec.loader.exec_module(module)
                answer: dict[str, Any] = {}
            else:
                answer = done(objects, found)
        except NotLiteral as odd:
            answer = {"odd": str(odd)}
        except BaseException as error:  # SystemExit too: the code may end its own process only
            answer = _raised(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
