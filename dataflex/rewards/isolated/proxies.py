"""What the tests find under the names of a response: stand-ins that have the response's own process do the work."""

from __future__ import annotations

import builtins
import json
import os
from typing import Any

from literals import NotLiteral, decode, encode

_LONGEST = 32 << 20  # bytes of an answer


class Verdict(BaseException):
    """The tests are at their end. No Exception, so that a test that expects one does not take it for it."""

    def __init__(self, reward: float | None, reason: str):
        super().__init__(reason)
        self.reward = reward
        self.reason = reason


class Response:
    """The process with the response's code, reached by two pipes.

    Attributes:
        verdict: the first that it gave cause for, kept because a test may swallow it.
    """

    def __init__(self, asked: int, answers: int):
        self._asked = os.fdopen(asked, "wb", buffering=0)
        self._answers = os.fdopen(answers, "rb")
        self._exceptions: dict[str, type[Exception]] = {}
        self.verdict: Verdict | None = None

    def end(self, reward: float | None, reason: str) -> Verdict:
        """Return the verdict, to be raised."""
        self.verdict = self.verdict or Verdict(reward, reason)
        return self.verdict

    def ask(self, about: str, **asked: Any) -> dict[str, Any]:
        """Have something done, and return what came of it.

        Raises:
            Verdict: the process has ended, or answers with what may not cross.
            Exception: what the code raised, as one of Python's own exceptions.
        """
        try:
            self._asked.write(json.dumps(asked).encode() + b"\n")
            line = self._answers.readline(_LONGEST)
            answer = json.loads(line)
        except (OSError, ValueError, RecursionError) as error:
            raise self.end(0.0, f"{about} ends its process, or answers with what is no JSON-like literal") from error
        odd = answer.get("odd") if isinstance(answer, dict) else "what is no answer"
        if odd is not None:
            raise self.end(0.0, f"{about} returns {odd!s:.200}")
        if "raised" in answer:
            raise self._exception(about, answer)
        return dict(answer)

    def value(self, about: str, found: Any) -> Any:
        """Return the value that crossed.

        Raises:
            Verdict: it is no literal.
        """
        try:
            return decode(found, self._known)
        except (NotLiteral, RecursionError, OverflowError) as error:
            raise self.end(0.0, f"{about} returns {error}") from error

    def named(self, name: str) -> Any:
        """Return what stands for a name of the code.

        Raises:
            KeyError: it has none such.
        """
        answer = self.ask(name, do="describe", name=name)
        if "exception" in answer:
            return self._own_exception(answer["exception"])
        if "callable" in answer:
            return Function(self, name)
        if "value" not in answer:
            raise KeyError(name)
        return self.value(name, answer["value"])

    def call(self, about: str, on: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Call something: `on` is a name or the number of an instance, `name` its attribute or nothing."""
        try:
            given = [encode(item, self._outgoing) for item in arguments]
            by_name = {key: encode(item, self._outgoing) for key, item in keywords.items()}
        except (NotLiteral, RecursionError) as error:
            raise self.end(None, f"the reference gives {about} {error}") from error
        answer = self.ask(about, do="call", on=on, name=name, arguments=given, keywords=by_name)
        after = answer.get("arguments", [])
        for argument, found in zip(arguments, after if isinstance(after, list) else [], strict=False):
            if found is not None:
                self._changed(about, argument, found)
        if "argument" in answer and answer["argument"] in range(len(arguments)):
            return arguments[answer["argument"]]
        return NotImplemented if "not implemented" in answer else self.value(about, answer.get("value"))

    def _changed(self, about: str, argument: Any, found: Any) -> None:
        """Make an argument what the code has made of it."""
        value = self.value(about, found)
        if isinstance(argument, list | bytearray) and isinstance(value, list | bytearray):
            argument[:] = value
        elif isinstance(argument, dict | set) and isinstance(value, dict | set):
            argument.clear()
            argument.update(value)

    def _outgoing(self, value: Any) -> Any:
        if isinstance(value, Instance):
            return {"made": object.__getattribute__(value, "_number")}
        if isinstance(value, Function):
            return {"name": value._name}
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return {"builtin": name}
        raise NotLiteral(f"a {type(value).__name__}, which is no JSON-like literal")

    def _known(self, kind: str, held: Any) -> Any:
        if kind == "made" and isinstance(held, int):
            return Instance(self, held)
        raise NotLiteral(f"a {kind}, which is no JSON-like literal")

    def _exception(self, about: str, answer: dict[str, Any]) -> BaseException:
        """Return what the code raised, or the nearest that Python has; not what would end the tests."""
        for name in answer["raised"]:
            kind = self._exceptions.get(name) or getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                made = kind.__new__(kind)
                made.args = tuple(self.value(about, answer.get("arguments", [])))
                return made
        return self.end(0.0, f"{about} raises {answer['raised'][:1]}")

    def _own_exception(self, lineage: Any) -> type[Exception]:
        """Return an exception that stands for one which the code defines."""
        bases = (getattr(builtins, str(name), None) for name in lineage)
        base = next(b for b in bases if isinstance(b, type) and issubclass(b, Exception))
        return self._exceptions.setdefault(str(lineage[0]), type(str(lineage[0]), (base,), {}))


class Function:
    """Stands for a function or class of the response."""

    def __init__(self, response: Response, name: str):
        self._response = response
        self._name = name
        self.__name__ = name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it."""
        return self._response.call(self._name, self._name, "", *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return attribute(self._response, self._name, self._name, name)

    def __instancecheck__(self, value: Any) -> bool:
        if not isinstance(value, Instance):
            return False
        return bool(self._response.call(self._name, self._name, "__instancecheck__", value))


class Instance:
    """Stands for an instance that the tests have made of a class of the response. Its operators are the response's.

    Two instances can be compared, as the class says. A comparison with a value would be the response's to decide, so it
    gets no reward.
    """

    def __init__(self, response: Response, number: int):
        self._response = response
        self._number = number

    def __getattr__(self, name: str) -> Any:
        return attribute(self._response, "an instance", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_response", "_number"):
            object.__setattr__(self, name, value)
        else:
            self._response.call("an instance", self._number, "__setattr__", name, value)


def attribute(response: Response, about: str, on: Any, name: str) -> Any:
    """Return an attribute: a value, or a function that calls it."""
    answer = response.ask(f"{about}.{name}", do="attribute", on=on, name=name)
    if "callable" not in answer:
        return response.value(f"{about}.{name}", answer.get("value"))
    return lambda *arguments, **keywords: response.call(f"{about}.{name}", on, name, *arguments, **keywords)


def _operator(name: str) -> Any:
    def operate(self: Instance, *arguments: Any) -> Any:
        response, number = self._response, self._number
        if name in _COMPARISONS and not isinstance(arguments[0], Instance):
            text = "the tests compare an instance with a value, which its own comparison would decide"
            raise response.end(0.0, text)
        found = response.call(f"an instance's {name}", number, name, *arguments)
        return iter(found) if name == "__iter__" else found

    return operate


_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_OPERATORS = (
    "len str repr hash int float bool abs neg iter next enter exit call getitem setitem delitem contains add radd sub "
    "rsub mul rmul truediv floordiv mod pow and or xor iadd isub"
).split()
for _name in (*_COMPARISONS, *(f"__{name}__" for name in _OPERATORS)):
    setattr(Instance, _name, _operator(_name))
