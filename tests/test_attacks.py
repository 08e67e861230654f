"""A reward of code gives 1 to what is right, and no response gets that otherwise or leaves a trace."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dataflex.errors import DataflexError
from dataflex.rewards import build_reward, sandbox
from tests.trial import TEST, tried

pytestmark = pytest.mark.usefixtures("namespaces")

BAD = "def double(x):\n    return 0\n"
GOOD = "def double(x):\n    return 2 * x\n"


RIGHT: dict[str, tuple[str, str]] = {
    "mbpp": (GOOD, TEST),
    "humaneval": (GOOD, "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n\ncheck(double)"),
    "helper": (
        "import math\ndef poly(xs, x): return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n"
        "def find_zero(xs): return -0.5\n",
        "import copy, math\ndef check(f):\n    xs = [1, 2]\n"
        "    assert math.fabs(poly(xs, f(copy.deepcopy(xs)))) < 1e-4\ncheck(find_zero)",
    ),
    "imports of the code": ("import math\ndef root(x): return math.sqrt(x)", "assert math.isclose(root(2), 2 ** 0.5)"),
    "literals": (
        "def same(x): return x",
        "for x in [None, True, 1.5, -0.0, 10 ** 400, 'ü\\ud800', b'a', (1, (2,)), {1, 2}, frozenset([1]), 1 + 2j,\n"
        "          {'a': [1, {2: None}], (1, 2): 3}, range(3), [], float('inf')]:\n"
        "    assert same(x) == x and type(same(x)) is type(x), x",
    ),
    "subclasses": (
        "from collections import Counter, OrderedDict, defaultdict, namedtuple\nP = namedtuple('P', 'x y')\n"
        "def count(x): return Counter(x)\ndef point(): return P(1, 2)",
        "assert count('aab') == {'a': 2, 'b': 1}\nassert point() == (1, 2)",
    ),
    "named as a builtin": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "in place": ("def order(x): x.sort()\ndef add(d): d['a'] = 1; return d",
                 "x = [2, 1]\norder(x)\nassert x == [1, 2]\nd = {}\nassert add(d) is d and d == {'a': 1}"),
    "error": ("def f(x):\n    raise ValueError('no')", "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n"
              "    assert str(e) == 'no'"),
    "own error": ("class Odd(ValueError): pass\ndef f(x): raise Odd(x)",
                  "import unittest\nclass T(unittest.TestCase):\n    def test_it(self):\n"
                  "        with self.assertRaises(Odd): f(1)\nunittest.main()"),
    "pytest": (GOOD + "def f(): raise KeyError(1)",
               "import pytest\ndef test_it():\n    assert double(1) == 2\n    with pytest.raises(KeyError): f()"),
    "class": (
        "class Stack:\n    limit = 3\n    def __init__(self, xs=()): self.xs = list(xs)\n"
        "    def push(self, x): self.xs.append(x); return self\n    def pop(self): return self.xs.pop()\n"
        "    def __len__(self): return len(self.xs)\n    def __iter__(self): return iter(self.xs)\n"
        "    def __eq__(self, other): return self.xs == other.xs\n    def __str__(self): return str(self.xs)\n"
        "    @staticmethod\n    def twice(x): return 2 * x\n",
        "s = Stack([1])\nassert s.push(2) is not None and s.push(3).pop() == 3 and len(s) == 2 and list(s) == [1, 2]\n"
        "assert s.xs == [1, 2] and str(s) == '[1, 2]' and s == Stack([1, 2]) and not (s == Stack()) and 2 in s\n"
        "assert Stack.limit == 3 and Stack.twice(2) == 4 and isinstance(s, Stack) and not Stack()\n"
        "s.xs = []\nassert s.xs == []",
    ),
    "instances as arguments": (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def longest(ps, n): return max(p.b for p in ps) - n",
        "assert longest([Pair(5, 24), Pair(15, 25)], 2) == 23",
    ),
    "solution": ("class Solution:\n    def two(self, xs: list[int]) -> list[int]: return xs[:2]",
                 "assert Solution().two([1, 2, 3]) == [1, 2]"),
    "functions as arguments": ("def apply(f, xs): return [f(x) for x in xs]\n" + GOOD,
                               "assert apply(str, [1]) == ['1'] and apply(double, [1]) == [2]"),
    "a variable": ("calls = 0\ndef f():\n    global calls\n    calls += 1", "f()\nf()\nassert calls == 2"),
    "numbers of numpy": ("import numpy as np\ndef f(): return np.float64(0.5)", "assert abs(f() - 0.5) < 1e-9"),
    "temporary files": ("import tempfile\ndef f():\n    with tempfile.TemporaryFile('w+') as t:\n        t.write('a')\n"
                        "        t.seek(0)\n        return t.read()", "assert f() == 'a'"),
    "processes": ("import subprocess, sys\ndef f():\n    code = 'print(7)'\n"
                  "    return int(subprocess.run([sys.executable, '-c', code], capture_output=True).stdout)",
                  "assert f() == 7"),
    "threads and loops": ("import asyncio, threading\ndef f():\n    async def g(): return 3\n"
                          "    t = threading.Thread()\n    t.start(); t.join()\n    return asyncio.run(g())",
                          "assert f() == 3"),
}  # fmt: skip

ATTACKS: dict[str, str] = {
    "own file": BAD
    + "import os\nfor p in ('response.py', 'program.py', __file__ if '__file__' in globals() else 'x'):\n"
    "    try: open('verdict', 'w').write(open(p).read())\n    except OSError: pass",
    "exit": BAD + "import os\nos._exit(0)",
    "system exit": BAD + "raise SystemExit(0)",
    "exit when called": "import os\ndef double(x): os._exit(0)",
    "system exit when called": "import sys\ndef double(x): sys.exit(0)",
    "interrupt": "def double(x): raise KeyboardInterrupt",
    "at exit": BAD + "import atexit, os\natexit.register(os._exit, 0)",
    "verdict": BAD + "import os\nfor fd in range(3, 64):\n"
    '    try: os.write(fd, b\'{"reward": 1.0, "reason": ""}\\n\')\n    except OSError: pass',
    "answers": "import os, threading, time\ndef double(x):\n    for fd in range(3, 64):\n"
    '        try: os.write(fd, b\'{"value": {"always": 8}}\\n\')\n        except OSError: pass\n    return 0',
    "equal to all": "class E:\n    def __eq__(self, other): return True\ndef double(x): return E()",
    "number equal to all": "class E(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef double(x): return E(0)",
    "text equal to all": "class E(str):\n    def __eq__(self, other): return True\ndef double(x): return E('')",
    "list that holds one": "class E:\n    def __eq__(self, other): return True\ndef double(x): return [E()]",
    "builtins": BAD + "import builtins\nbuiltins.AssertionError = None\nbuiltins.print = exit\n"
    "builtins.isinstance = lambda *a: True",
    "modules": BAD + "import json, sys\njson.dumps = lambda *a, **k: '{\"value\": 8}'\nsys.modules['literals'] = None",
    "frames": BAD + "import sys, inspect, gc\nfor f in inspect.stack():\n    f.frame.f_globals.clear()\n"
    "for o in gc.get_objects():\n    if isinstance(o, dict) and 'reward' in o: o['reward'] = 1",
    "patched protocol": BAD + "import sys\nm = sys.modules['__main__']\nf = sys._getframe()\n"
    "while f:\n    for k, v in list(f.f_locals.items()):\n        if k == 'answer': v['value'] = 8\n    f = f.f_back",
    "generator": "def double(x): yield 8",
    "module": "import math\ndouble = math",
    "exception": "def double(x): raise AssertionError",
    "no name": "x = 1",
    "syntax": "def double(x:",
    "recursion": "def double(x): return double(x)",
    "nested": "def double(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "huge": "def double(x): return 'x' * (40 << 20)",
    "memory": "def double(x): return len(bytearray(8 << 30))",
    "stop": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + BAD,
    "stop all": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + BAD,
    "stop the first": "import os, signal\nos.kill(1, signal.SIGKILL)\n" + BAD,
    "memory of others": BAD
    + "import os\nfor p in os.listdir('/proc'):\n    if p.isdecimal() and p != str(os.getpid()):\n"
    "        try: open(f'/proc/{p}/mem', 'r+b').close(); raise SystemError(p)\n        except OSError: pass",
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_gets_its_reward(name: str) -> None:
    assert tried(*RIGHT[name]) == (1.0, "")


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_gets_a_reward(name: str) -> None:
    reward, reason = tried(ATTACKS[name])
    assert reward == 0
    assert reason


HELD: dict[str, str] = {
    "network": "import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1)\nexcept OSError: ok = True",
    "unix socket": "import socket\ntry: socket.socket(socket.AF_UNIX).connect({unix!r})\nexcept OSError: ok = True",
    "unix datagrams": "import socket\ntry: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {unix!r})\n"
    "except OSError: ok = True",
    "files outside": "try: open({outside!r}, 'w').write('x')\nexcept OSError: ok = True",
    "links outside": "import os\ntry:\n    os.symlink({outside!r}, 'link')\n    open('link', 'w').write('x')\n"
    "except OSError: ok = True",
    "devices": "import os\nok = set(os.listdir('/dev')) == {{'null', 'zero', 'full', 'random', 'urandom'}}",
    "disk": "try:\n    for i in range(20): open(f'f{{i}}', 'wb').write(bytes(15 << 20))\nexcept OSError: ok = True",
    "many files": "try:\n    for i in range(10000): open(f'f{{i}}', 'w').close()\nexcept OSError: ok = True",
    "mounts": "import ctypes\nok = ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, None) != 0",
    "namespaces": "import ctypes\nok = ctypes.CDLL(None).unshare(0x10000000) != 0",
    "tracing": "import ctypes\nok = ctypes.CDLL(None).ptrace(16, 1, 0, 0) != 0",
    "hidden memory": "import os\ntry: os.memfd_create('x')\nexcept OSError: ok = True",
    "other processes": "import os\nok = sum(p.isdecimal() for p in os.listdir('/proc')) <= 3",
    "environment": "import os\nok = 'SECRET' not in os.environ",
}


@pytest.mark.parametrize("name", HELD)
def test_nothing_outside_is_reached(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    outside, unix = tmp_path / "mark", tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(unix))
        local.listen()
        places = {"port": server.getsockname()[1], "unix": str(unix), "outside": str(outside)}
        assert tried("ok = False\n" + HELD[name].format(**places), "assert ok is True") == (1.0, "")
    assert not outside.exists()


BOMBS = {
    "processes": "import os\nwhile True: os.fork()\n",
    "processes, errors caught": "import os\nfor _ in range(2000):\n    try: os.fork()\n    except OSError: pass\n",
    "threads": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()\n",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_ended_before_others_have_no_process_left(name: str) -> None:
    megabytes = 1023  # by which its processes are known from those of other tests
    found: list[tuple[float | None, str]] = []
    bomb = threading.Thread(
        target=lambda: found.append(sandbox.trial(BOMBS[name] + GOOD, TEST, 120, megabytes, isolated=True))
    )
    bomb.start()
    most = 0
    while bomb.is_alive():
        most = max(most, sum(_threads(p) for p in _processes_with(megabytes)))
    reward, reason = found[0]
    assert reward == 0
    assert "seconds" not in reason  # ended by their number, not by the clock
    assert most < 64 * 3  # each that is admitted may still be on its way


def test_a_few_processes_are_not_a_bomb() -> None:
    assert tried("import os\nfor _ in range(5):\n    if os.fork() == 0: os._exit(0)\n" + GOOD) == (1.0, "")


def test_a_reference_that_cannot_say_gives_no_score(caplog: pytest.LogCaptureFixture) -> None:
    cases = {
        "assert double(": "no Python",
        "METADATA = {}\ndef check(candidate):\n    assert candidate(1) == 2": "tests nothing",
        "assert double(object()) == 1": "gives double a object",
        "assert double(lambda: 1) == 1": "gives double a function",
    }
    for tests, said in cases.items():
        reward, reason = tried(GOOD, tests)
        assert reward is None
        assert said in reason
    with caplog.at_level("INFO", logger="dataflex"):
        reward_of_code = build_reward("unit_tests", {"seconds": 20})
        assert reward_of_code.score(["", ""], [ATTACKS["generator"], GOOD], [TEST, TEST]) == [0, 1]
    assert "no reward for 1 of 2 responses: double returns a generator, which is no JSON-like literal" in caplog.text


def test_names_of_pythons_own_are_not_lent() -> None:
    lies = "def double(x): return 0\ndef abs(x): return 0\nclass math:\n    isclose = staticmethod(lambda *a: True)\n"
    assert tried(lies, "assert abs(double(4) - 8) < 1e-6")[0] == 0
    assert tried(lies, "assert math.isclose(double(4), 8)")[0] == 0


def test_a_comparison_is_not_the_responses_to_decide() -> None:
    lie = "class P:\n    def __eq__(self, other): return True\n    def area(self): return 1\n"
    assert tried(lie, "assert P() == 5")[1].startswith("the tests compare an instance with a value")
    assert tried(lie, "try:\n    assert P() == 5\nexcept: pass")[0] == 0


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = "open('x', 'w').write('x')\nimport os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\n"
    megabytes = 1021  # by which its processes are known from those of other tests
    sandbox.trial(code + GOOD, TEST, 20, megabytes, isolated=True)
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 20  # the kernel ends what is left of a namespace after its first process is gone
    while left := _processes_with(megabytes):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.parametrize("isolated", [True, False], ids=["namespaces", "process"])
def test_what_does_not_begin_is_no_fault_of_the_code(isolated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_WAITED_SECONDS", (0, 0))
    with pytest.raises(DataflexError, match=r"did not begin, 2 times \(.+\)\n  expected .* 4 MiB \(memory_mb\)"):
        sandbox.trial(GOOD, TEST, 20, 4, isolated=isolated)


MANY = "import os\ndef double(x):\n    for _ in range(100):\n        try: os.fork()\n        except OSError: pass\n" + (
    "    return 2 * x\n"
)


def test_who_tries_too_many_processes_never_gets_to_answer() -> None:
    assert [tried(MANY, "assert double(4) == 8")[0] for _ in range(8)] == [0] * 8


def test_nor_where_the_kernel_counts_too() -> None:
    """It counts no process of root's, whose tests these may be: they are run again as a user with nothing."""
    if os.getuid() != 0:
        pytest.skip("not root: the other tests are those of a user whose processes the kernel counts")
    code = (
        "import os, sys\nos.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "if not os.access(sys.executable, os.X_OK) or not os.access(sys.argv[1], os.R_OK): sys.exit(77)\n"
        "from tests.trial import tried\n"
        "found = [tried(sys.argv[2], 'assert double(4) == 8')[0] for _ in range(8)]\n"
        f"sys.exit(found != [0] * 8 or tried({GOOD!r}) != (1.0, ''))\n"
    )
    there = Path(sandbox.__file__)
    done = subprocess.run([sys.executable, "-c", code, str(there), MANY], cwd=there.parents[2], env={"TMPDIR": "/tmp"})
    if done.returncode == 77:
        pytest.skip("other users may not read this interpreter or checkout")
    assert done.returncode == 0


def test_pipes_of_any_number_are_waited_for() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held = [open(os.devnull) for _ in range(1100)]
    try:
        assert tried(GOOD) == (1.0, "")
    finally:
        for each in held:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tests_that_end_their_process_give_nothing() -> None:
    assert tried(GOOD, "import os\nassert double(1) == 2\nos._exit(0)") == (0, "the tests ended their process")


def _processes_with(megabytes: int) -> list[str]:
    return [p for p in os.listdir("/proc") if p.isdecimal() and str(megabytes << 20) in _command(p)]


def _command(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def _threads(process: str) -> int:
    try:
        return len(os.listdir(f"/proc/{process}/task"))
    except OSError:
        return 0
