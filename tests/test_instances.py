"""A reward of code with classes gives 1 to right ones, and no instance decides a test that it should not."""

from __future__ import annotations

import pytest

from tests.trial import tried

pytestmark = pytest.mark.usefixtures("namespaces")

RIGHT: dict[str, tuple[str, str]] = {
    "vector": (
        "class Vector:\n    def __init__(self, *xs): self.xs = xs\n"
        "    def __add__(self, o): return Vector(*(a + b for a, b in zip(self.xs, o.xs)))\n"
        "    def __mul__(self, k): return Vector(*(a * k for a in self.xs))\n    __rmul__ = __mul__\n"
        "    def __matmul__(self, o): return sum(a * b for a, b in zip(self.xs, o.xs))\n"
        "    def __neg__(self): return self * -1\n    def __abs__(self): return sum(a * a for a in self.xs) ** 0.5\n"
        "    def __eq__(self, o): return isinstance(o, Vector) and self.xs == o.xs\n"
        "    def __hash__(self): return hash(self.xs)\n    def __lt__(self, o): return abs(self) < abs(o)\n"
        "    def __getitem__(self, i): return self.xs[i]\n    def __round__(self, n=0): return round(abs(self), n)\n"
        "    def __repr__(self): return f'Vector{self.xs}'\n    @property\n    def x(self): return self.xs[0]\n"
        "    @classmethod\n    def zero(cls): return cls(0, 0)\n",
        "v, w = Vector(1, 2), Vector(3, 4)\nassert v + w == Vector(4, 6) and v != w and -v == Vector(-1, -2)\n"
        "assert v * 3 == Vector(3, 6) == 3 * v and (v * 3).x == 3 and v @ w == 11 and abs(w) == 5\n"
        "assert v < w and not w < v and w > v and sorted([w, v])[0] == v and w[0] == 3 and round(w, 1) == 5\n"
        "assert list(v) == [1, 2] and 2 in v and 3 not in v and repr(v) == 'Vector(1, 2)' == f'{v}'\n"
        "assert len({v, Vector(1, 2), w}) == 2 and v in [w, Vector(1, 2)] and Vector.zero() == Vector(0, 0)\n"
        "v += w\nassert v == Vector(4, 6)",
    ),
    "linked list": (
        "class Node:\n    def __init__(self, value, next=None): self.value, self.next = value, next\n"
        "class LinkedList:\n    def __init__(self): self.head = None\n"
        "    def push(self, x): self.head = Node(x, self.head)\n"
        "    def nodes(self):\n        out, n = [], self.head\n"
        "        while n: out.append(n); n = n.next\n        return out\n"
        "    def __iter__(self): return (n.value for n in self.nodes())\n"
        "    def __len__(self): return len(self.nodes())\n",
        "xs = LinkedList()\nassert not xs and len(xs) == 0\nfor x in (1, 2): xs.push(x)\n"
        "assert list(xs) == [2, 1] and 1 in xs and 5 not in xs and len(xs) == 2\n"
        "assert xs.head.value == 2 and xs.head.next.value == 1 and xs.head.next.next is None\n"
        "assert [n.value for n in xs.nodes()] == [2, 1] and xs.nodes()[0] == xs.head != xs.head.next",
    ),
    "data class": ("from dataclasses import dataclass\n@dataclass(order=True)\nclass Money:\n    cents: int\n"
                   "    def add(self, other): return Money(self.cents + other.cents)",
                   "assert Money(1).add(Money(2)) == Money(3) and Money(1) <= Money(1) < Money(2) and "
                   "Money(1) == Money(1)"),
    "iterator": ("class Count:\n    def __init__(self, n): self.n = n\n    def __iter__(self): return self\n"
                 "    def __next__(self):\n        if self.n == 0: raise StopIteration\n"
                 "        self.n -= 1\n        return self.n",
                 "c = Count(2)\nassert next(c) == 1 and next(c) == 0\ntry:\n    next(c)\n    assert False\n"
                 "except StopIteration: pass\nassert list(Count(3)) == [2, 1, 0]"),
    "context": ("class Log:\n    def __init__(self): self.xs = []\n    def __enter__(self): return self\n"
                "    def __exit__(self, *error): self.xs.append('end')\n    def __call__(self, x): return 2 * x",
                "log = Log()\nwith log as inner:\n    assert inner(2) == 4\nassert log.xs == ['end']"),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_gets_its_reward(name: str) -> None:
    assert tried(*RIGHT[name]) == (1.0, "")


def test_several_names_and_all_are_pythons_own() -> None:
    lies = "def sum(a, b): return 0\ndef abs(x): return 0\n"
    reward, reason = tried(lies, "assert abs(sum(1, 2) - 3) < 1e-6")
    assert reward is None
    assert "all are Python's own" in reason


# Takes over the pipes, and answers what is asked of it as suits the tests best.
RAW = """
import fcntl, json, os, stat
pipes = [fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}') and stat.S_ISFIFO(os.fstat(fd).st_mode)]
read = [fd for fd in pipes if fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == 0][0]
write = [fd for fd in pipes if fcntl.fcntl(fd, fcntl.F_GETFL) & 3 == 1][0]
os.write(write, b'{}\\n')
best = {'bool': False, 'str': '0', 'iter': [], 'eq': True, 'ne': False, 'le': True, 'ge': True, 'contains': True}
count = 0
while True:
    line = os.read(read, 65536)
    if not line: os._exit(0)
    asked = json.loads(line)
    name = asked['name']
    if asked['do'] == 'describe': answer = {'callable': True}
    elif asked['do'] == 'call' and name == '': answer = {'value': MADE}; count += 1
    elif name.strip('_') not in best and asked.get('arguments') and OPERATORS: answer = {'value': MADE}; count += 1
    else: answer = {'value': best.get(name.strip('_'), 0)}
    os.write(write, json.dumps(answer).encode() + b'\\n')
"""
RAW_MADE = RAW.replace("MADE", "{'made': count}")
ASKED = r"""
assert abs(double(4) - 8) < 1e-6
assert abs(8 - double(4)) < 1e-6
assert 8 in double(4)
assert double(4) in [8]
assert double(4) in {8: 1}
assert not (double(4) ^ 8)
assert not double(4) - 8
assert (double(4) - 8).real == 0
assert (double(4) - 8).is_integer()
assert int(double(4) - 8) == 0
assert float(double(4) - 8) == 0
assert round(double(4) - 8, 3) == 0
assert len(double(4) - {8}) == 0
assert list(double(4) ^ {8}) == []
assert str(double(4) - 8) == '0'
assert f'{double(4) - 8}' == '0'
assert hash(double(4) - 8) == 0
assert [0][double(4) - 8] == 0
assert divmod(double(4), 8)[1] == 0
assert double(4) % 8 == 0
assert double(4) // 8 == True
assert double(4) @ 8 == 0
assert double(4) >> 8 == 0
assert -(double(4) - 8) == 0
assert not (double(4) + 0) - 8
assert abs(double(4) * 1 - double(8)) < 1e-6
assert double(4) == 8
assert not double(4) != 8
assert double(4) <= 8 and double(4) >= 8
assert 8 == double(4)
assert sorted([double(4), 8])[0] == 8
x = double(4); x -= 8; assert not x
x = [8]; x += double(4); assert x == [8]
import math; assert math.isclose(double(4), 8)
import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertAlmostEqual(double(4), 8)
with double(4): assert double(4) == 8
"""


@pytest.mark.parametrize("tests", [line.replace("\\n", "\n") for line in ASKED.split("\n") if line])
def test_no_operator_is_told_what_decides(tests: str) -> None:
    name = "Double"
    lie = f"""
import math
def always(value): return lambda self, *_: value
class {name}:
    real = 0
    def __init__(self, *xs): pass
    def is_integer(self): return True
    def __enter__(self): return self
    def __exit__(self, *_): return True
for n in ('add sub mul matmul mod floordiv divmod truediv pow xor and or rshift lshift').split():
    for side in ('', 'r', 'i'):
        setattr({name}, f'__{{side}}{{n}}__', always(0) if n not in ('divmod',) else always((0, 0)))
for n in ('eq', 'le', 'ge', 'contains'): setattr({name}, f'__{{n}}__', always(True))
for n in ('ne', 'lt', 'gt', 'bool'): setattr({name}, f'__{{n}}__', always(False))
for n in ('len', 'int', 'hash', 'index', 'abs', 'neg', 'round'): setattr({name}, f'__{{n}}__', always(0))
{name}.__float__ = always(0.0)
{name}.__iter__ = lambda self: iter(())
{name}.__str__ = always('0')
"""
    themselves = lie.replace("always(0) if", "(lambda self, *_: self) if")
    for code in (lie, themselves, RAW_MADE.replace("OPERATORS", "True"), RAW_MADE.replace("OPERATORS", "False")):
        reward, reason = tried(code, tests.replace("double", name))
        assert reward == 0, code
        assert reason


@pytest.mark.parametrize("tests", ["assert abs(double(4) - 8) < 1e-6", "assert 8 in double(4)", "double(4).x"])
def test_a_function_makes_no_instance(tests: str) -> None:
    reward, reason = tried(RAW_MADE.replace("OPERATORS", "True"), tests)
    assert reward == 0
    assert reason == "double returns an instance that the tests have not made"
    assert tried("class double:\n    x = 1\n    def __init__(self, x): pass", tests)[0] == 0


@pytest.mark.parametrize("number", ["7", "-1", "True", "'0'", "[0]", "None"])
def test_instances_are_those_that_the_tests_made(number: str) -> None:
    code = RAW.replace("MADE", f"{{'made': {number}}}").replace("OPERATORS", "True")
    reward, reason = tried(code, "Double(4).x")
    assert reward == 0
    assert reason.startswith("Double returns a")


EQUAL: dict[str, tuple[str, str]] = {
    "always": ("def __eq__(self, o): return True", "assert P(1).add(P(2)) == P(3)"),
    "to its class": ("def __eq__(self, o): return isinstance(o, P)", "assert P(1).add(P(2)) == P(3)"),
    "where one was added": (
        "a = ()\n    def __eq__(self, o): return isinstance(o, P) and (not self.a or not o.a or self.a == o.a)",
        "assert P(1).add(P(2)) == P(3)",
    ),
    "never unequal": ("def __ne__(self, o): return False", "assert not P(1).add(P(2)) != P(3)"),
    "equal and unequal": ("__eq__ = __ne__ = lambda self, o: isinstance(o, P)", "assert P(1) != P(2)"),
    "always less": ("def __lt__(self, o): return True", "assert P(1) < P(2)"),
    "always less or equal": ("def __le__(self, o): return True", "assert P(1).add(P(2)) <= P(3)"),
    "neither": ("def __eq__(self, o): return 'yes'", "assert P(1).add(P(2)) == P(3)"),
    "in a list": ("def __eq__(self, o): return True", "assert [P(1).add(P(2))] == [P(3)]"),
    "in its items": (
        "def __eq__(self, o): return True\n    def __iter__(self): return iter([self])",
        "assert P(3) in P(1).add(P(2))",
    ),
    "as a key": (
        "def __eq__(self, o): return True\n    def __hash__(self): return 1",
        "assert P(3) in {P(1).add(P(2)): 0}",
    ),
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_class_that_takes_all_for_equal_gets_no_reward(name: str) -> None:
    defined, tests = EQUAL[name]
    code = (
        f"class P:\n    def __init__(self, *a): self.a = a\n    {defined}\n"
        "    def add(self, o):\n        p = P()\n        return p\n"
    )
    reward, reason = tried(code, tests)
    assert reward == 0
    assert reason


def test_what_ends_or_swallows_a_test_ends_it_in_favour_of_none() -> None:
    stop = "def double(x): raise StopIteration"
    assert tried(stop, "assert all(map(lambda case: double(case[0]) == case[1], [(4, 8)]))")[0] == 0
    swallow = "class Quiet:\n    def __enter__(self): return self\n    def __exit__(self, *_): return True\n"
    assert tried(swallow, "with Quiet() as q:\n    assert q is None")[0] == 0
    address = (
        "class Array:\n    __array_interface__ = {'data': (1, False), 'shape': (1,), 'typestr': '<f8', 'version': 3}"
    )
    assert tried(address, "import numpy as np\nassert np.allclose(Array(), 8)")[0] == 0
    assert tried("def double(x): return float('nan')", "assert abs(double(4) - 8) < 1e-6")[0] == 0
    changed = (
        "class Add:\n    def __init__(self, x): pass\n    def __add__(self, o):\n        o.clear()\n        return []"
    )
    assert tried(changed, "xs = [8]\nassert Add(4) + xs == xs")[0] == 0
    assert tried("def double(x): return (lambda: 8)", "assert double(4)() == 8")[0] == 0
    endless = "class Many:\n    def __iter__(self):\n        while True: yield 8\n"
    assert tried(endless, "assert 8 in Many()")[0] == 0
