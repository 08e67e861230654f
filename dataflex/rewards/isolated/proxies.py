"""What the tests find under the names of a response: stand-ins that have the response's own process do the work.

That process may answer anything, so nothing that it answers is evidence by itself. What is compared with a value of the
tests is a literal. An instance is no literal: it never decides a comparison with a value, and one that an operator has
told a value of the tests becomes no literal any more, since the answer would suit the value that it was told.
"""

from __future__ import annotations

import builtins
import json
import os
from typing import Any

from literals import NotLiteral, decode, encode

_LONGEST = 32 << 20  # bytes of an answer
_PROBES = 8  # instances made anew to see that a class tells them apart
# What Python's own values have as well: tests that read it of a result may take the result for such a value.
_OF_VALUES = {name for kind in (int, float, complex, str, bytes, list, tuple, dict, set, range) for name in dir(kind)}


class Verdict(BaseException):
    """The tests are at their end. Not an Exception, so that a test that expects some error does not swallow it."""

    def __init__(self, reward: float | None, reason: str):
        super().__init__(reason)
        self.reward = reward
        self.reason = reason


class Response:
    """The process with the response's code, reached by two pipes.

    Attributes:
        verdict: the first verdict that it gave cause for, kept because a test may swallow the exception.
    """

    def __init__(self, asked: int, answers: int):
        self._asked = os.fdopen(asked, "wb", buffering=0)
        self._answers = os.fdopen(answers, "rb")
        self._exceptions: dict[str, type[Exception]] = {}
        self._makers: dict[str, dict[str, tuple[Any, Any]]] = {}  # of each class: the arguments it was called with
        self._classes: list[str] = []  # of each instance
        self._told: set[int] = set()  # instances that an operator has told a value
        self.verdict: Verdict | None = None

    def has_begun(self) -> bool:
        """Wait for the process to be ready for the code, and say whether it is: false if it has ended before."""
        return self._answers.readline() == b"\n"

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

    def value(self, about: str, found: Any, maker: str = "", is_told: bool = False) -> Any:
        """Return the value that crossed.

        Args:
            about: what gave it.
            found: as JSON.
            maker: the class whose instances, not seen before, it may hold; nothing where it may hold none.
            is_told: whether such instances were told a value.

        Raises:
            Verdict: it is no literal, nor an instance that may be here.
        """

        def known(kind: str, held: Any) -> Instance:
            if kind != "made" or type(held) is not int:
                raise NotLiteral(f"a {kind}, which is no JSON-like literal")
            if held == len(self._classes) and maker:
                self._classes.append(maker)
            if held not in range(len(self._classes)):
                raise NotLiteral("an instance that the tests have not made")
            if is_told:
                self._told.add(held)
            return Instance(self, held)

        try:
            return decode(found, known)
        except (NotLiteral, RecursionError, OverflowError) as error:
            raise self.end(0.0, f"{about} returns {error}") from error

    def named(self, name: str) -> Any:
        """Return the value, function, class or exception that stands for a name of the code.

        Raises:
            KeyError: the code has no such name.
        """
        answer = self.ask(name, do="describe", name=name)
        if "exception" in answer:
            return self._own_exception(answer["exception"])
        if "callable" in answer:
            return RemoteFunction(self, name)
        if "value" not in answer:
            raise KeyError(name)
        return self.value(name, answer["value"])

    def call(self, about: str, on: Any, name: str, *arguments: Any, **keywords: Any) -> Any:
        """Call something: `on` is a name or the number of an instance, `name` its attribute or nothing."""
        given, by_name = self._given(about, arguments, keywords)
        maker = self.maker(on)
        operands = [item for item in (*arguments, *keywords.values()) if isinstance(item, Instance)]
        is_told = on in self._told or any(item._number in self._told for item in operands)
        answer = self.ask(about, do="call", on=on, name=name, arguments=given, keywords=by_name, may_make=bool(maker))
        # Changed in place, as a test may look at the list that it gave to a function that sorts.
        after = answer.get("arguments", [])
        for argument, found in zip(arguments, after if isinstance(after, list) else [], strict=False):
            if found is not None:
                self._changed(about, argument, found)
        if "argument" in answer and answer["argument"] in range(len(arguments)):
            return arguments[answer["argument"]]
        value = self.value(about, answer.get("value"), maker, is_told)
        if name == "" and isinstance(on, str) and isinstance(value, Instance):
            self._makers.setdefault(on, {})[json.dumps([given, by_name])] = (given, by_name)
        return value

    def maker(self, on: Any) -> str:
        """Return the class of the instances that a call or an attribute may give, or nothing.

        The response says what is a class, so it is no evidence: a function that the tests take for one, by its name,
        gives no instance.
        """
        if isinstance(on, int):
            return self._classes[on]
        return str(on) if on.lstrip("_")[:1].isupper() else ""

    def operate(self, name: str, on: int, *arguments: Any) -> Any:
        """Have an operator of Python's applied to an instance, and something else.

        What is told a value answers to suit it: so it gives an instance, whose own attributes the tests know, no value.
        """
        about = f"an instance's {name}"
        others = [item for item in arguments if isinstance(item, Instance)]
        is_told = len(others) < len(arguments) or any(
            item._number in self._told for item in (Instance(self, on), *others)
        )
        given, _ = self._given(about, arguments, {})
        answer = self.ask(about, do="operate", on=on, name=name, arguments=given, keywords={}, may_make=True)
        found = self.value(about, answer.get("value"), self._classes[on], is_told)
        if is_told and not isinstance(found, Instance):
            raise self.told(name)
        return found

    def convert(self, name: str, on: int, *arguments: Any) -> Any:
        """Have an instance made another thing, as a number or a list, or index it, which tells what is in brackets."""
        about = f"an instance's {name}"
        if on in self._told:
            raise self.told(name)
        given, _ = self._given(about, arguments, {})
        answer = self.ask(about, do="operate", on=on, name=name, arguments=given, keywords={}, may_make=True)
        return self.value(about, answer.get("value"), self._classes[on])

    def told(self, name: str) -> Verdict:
        """Return the verdict on an instance that was told a value and would become one by this."""
        return self.end(0.0, f"an instance that was given a value by an operator would decide a test by its {name}")

    def compare(self, name: str, one: Instance, other: Any) -> bool:
        """Say what two instances are to each other, as their class says.

        Raises:
            Verdict: one is no instance, the class contradicts itself, or takes all for equal.
        """
        if not isinstance(other, Instance):
            text = "the tests compare an instance with a value, which its own comparison would decide"
            raise self.end(0.0, text)
        if name == "__eq__":
            return self._equal(one, other)
        is_so = self._compared(name, one, other)
        if name == "__ne__":
            is_odd = is_so == self._equal(one, other)
        else:
            is_also = is_so and self._compared(name, other, one)
            is_odd = is_also and (name in ("__lt__", "__gt__") or not self._equal(one, other))
        if is_odd:
            raise self.end(0.0, f"the {name} of a class contradicts itself")
        return is_so

    def _equal(self, one: Instance, other: Instance) -> bool:
        """Say whether the class takes two for equal, where it does not do so with whatever it is given."""
        if not self._compared("__eq__", one, other):
            return False
        if not self._compared("__eq__", other, one):
            raise self.end(0.0, "the __eq__ of a class contradicts itself")
        for instance in (one, other):
            calls = self._makers.get(self._classes[instance._number], {})
            is_all = self._compared("__eq__", instance, None)
            if len(calls) > 1:
                is_all |= all(
                    self._compared("__eq__", instance, made)
                    for made in (self._anew(instance, *call) for call in list(calls.values())[-_PROBES:])
                )
            if is_all:
                raise self.end(0.0, "the __eq__ of a class tells nothing apart, so that two are equal says nothing")
        return True

    def _anew(self, instance: Instance, arguments: Any, keywords: Any) -> Any:
        """Return what the class of an instance makes of arguments that the tests have given it."""
        name = self._classes[instance._number]
        answer = self.ask(name, do="call", on=name, name="", arguments=arguments, keywords=keywords, may_make=True)
        return self.value(name, answer.get("value"), name)

    def _compared(self, name: str, one: Instance, other: Any) -> bool:
        given, _ = self._given(name, (other,), {})
        try:
            answer = self.ask(
                name, do="operate", on=one._number, name=name, arguments=given, keywords={}, may_make=False
            )
        except Exception:  # an error of the response's own class, which may be any; compared with None it is "unequal"
            if other is None:
                return False
            raise
        found = answer.get("value")
        if not isinstance(found, bool):
            raise self.end(0.0, f"the {name} of a class is neither true nor false")
        return found

    def _given(self, about: str, arguments: Any, keywords: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        try:
            given = [encode(item, self._outgoing) for item in arguments]
            return given, {key: encode(item, self._outgoing) for key, item in keywords.items()}
        except (NotLiteral, RecursionError) as error:
            raise self.end(None, f"the reference gives {about} {error}") from error

    def _changed(self, about: str, argument: Any, found: Any) -> None:
        """Change an argument of the tests as the code has changed its copy."""
        value = self.value(about, found)
        if isinstance(argument, list | bytearray) and isinstance(value, list | bytearray):
            argument[:] = value
        elif isinstance(argument, dict | set) and isinstance(value, dict | set):
            argument.clear()
            argument.update(value)

    def _outgoing(self, value: Any) -> Any:
        if isinstance(value, Instance):
            return {"made": value._number}
        if isinstance(value, RemoteFunction):
            return {"name": value._name}
        name = getattr(value, "__name__", "")
        if isinstance(name, str) and getattr(builtins, name, None) is value:
            return {"builtin": name}
        raise NotLiteral(f"a {type(value).__name__}, which is no JSON-like literal")

    def _exception(self, about: str, answer: dict[str, Any]) -> BaseException:
        """Return what the code raised, or the nearest that Python has; not what would end the tests.

        StopIteration would end a `map` of the tests as if all had been compared: it becomes what generators make of it.
        """
        for name in answer["raised"]:
            if name in ("StopIteration", "StopAsyncIteration") and not about.endswith("__next__"):
                name = "RuntimeError"
            kind = self._exceptions.get(name) or getattr(builtins, str(name), None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                made = kind.__new__(kind)  # past the constructor, for which some have fixed arguments
                made.args = tuple(self.value(about, answer.get("arguments", [])))
                return made
        return self.end(0.0, f"{about} raises {answer['raised'][:1]}")

    def _own_exception(self, lineage: Any) -> type[Exception]:
        """Return an exception that stands for one which the code defines."""
        bases = (getattr(builtins, str(name), None) for name in lineage)
        base = next(b for b in bases if isinstance(b, type) and issubclass(b, Exception))
        return self._exceptions.setdefault(str(lineage[0]), type(str(lineage[0]), (base,), {}))


class RemoteFunction:
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
    """Stands for an instance that the tests have made: by calling a class, or a method or an operator of another.

    Two instances can be compared, as the class says. A comparison with a value would be the response's to decide, so it
    gets no reward. `in` looks through the items, without telling what is looked for.
    """

    __slots__ = ("_number", "_response")

    def __init__(self, response: Response, number: int):
        object.__setattr__(self, "_response", response)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_VALUES and self._number in self._response._told:
            raise self._response.told(name)
        return attribute(self._response, "an instance", self._number, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._response.call("an instance", self._number, "__setattr__", name, value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it."""
        return self._response.call("an instance", self._number, "__call__", *arguments, **keywords)

    def __iter__(self) -> Any:
        return iter(list(self._response.convert("__iter__", self._number)))

    def __reversed__(self) -> Any:
        return iter(list(self._response.convert("__reversed__", self._number)))

    def __contains__(self, item: Any) -> bool:
        return any(found is item or found == item for found in self)

    def __enter__(self) -> Any:
        return self._response.call("an instance", self._number, "__enter__")

    def __exit__(self, *_: object) -> None:
        """Leave it as without an error, and keep the error: it may be a failed assertion."""
        self._response.call("an instance", self._number, "__exit__", None, None, None)


def attribute(response: Response, about: str, on: Any, name: str) -> Any:
    """Return an attribute: a value, or a function that calls it.

    Raises:
        AttributeError: it is one of those by which libraries look for what an object can do; some hold addresses.
    """
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(f"{about} has no {name} here")
    answer = response.ask(f"{about}.{name}", do="attribute", on=on, name=name, may_make=bool(response.maker(on)))
    if "callable" not in answer:
        is_told = isinstance(on, int) and on in response._told
        return response.value(f"{about}.{name}", answer.get("value"), response.maker(on), is_told)
    return lambda *arguments, **keywords: response.call(f"{about}.{name}", on, name, *arguments, **keywords)


def _operator(name: str, do: Any) -> Any:
    def operate(self: Instance, *arguments: Any) -> Any:
        return do(self._response, name, self._number, *arguments)

    return operate


def _comparison(name: str) -> Any:
    def compare(self: Instance, other: Any) -> bool:
        return self._response.compare(name, self, other)

    return compare


_CONVERSIONS = "bool len int float complex index str repr bytes hash next abs neg pos invert trunc floor ceil round"
_INDEXED = "getitem setitem delitem"
_BINARY = "add sub mul matmul truediv floordiv mod divmod pow lshift rshift and or xor"
for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(Instance, _name, _comparison(_name))
for _name in f"{_CONVERSIONS} {_INDEXED}".split():
    setattr(Instance, f"__{_name}__", _operator(f"__{_name}__", Response.convert))
for _name in _BINARY.split():
    for _side in ("", "r", "i") if _name != "divmod" else ("", "r"):
        setattr(Instance, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__", Response.operate))
