"""Each reward gives what it says, and no response can hang, fill or outlive the run."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.rewards import REWARDS, build_reward, sandbox


def scores(name: str, pairs: list[tuple[str, str]], **params: Any) -> list[float | None]:
    responses, references = [a for a, _ in pairs], [b for _, b in pairs]
    return build_reward(name, params).score(["?"] * len(pairs), responses, references)


def test_exact_match() -> None:
    pairs = [(" Paris\n", "paris"), ("Paris.", "Paris"), ("ｐａｒｉｓ", "Paris"), ("", "Paris"), ("", "")]
    assert scores("exact_match", pairs) == [1, 0, 1, 0, 1]
    assert scores("exact_match", pairs[:2], case_sensitive=True, punctuation=False) == [0, 1]


def test_regex() -> None:
    pairs = [
        ("Answer: A. No, Answer: b", "Answer: B"),
        ("I say Answer: C", "c"),
        ("B", "B"),
        ("Answer: D", "Answer: C"),
    ]
    assert scores("regex", pairs, pattern=r"Answer: (\w)") == [1, 1, 0, 0]
    assert scores("regex", pairs[:1], pattern=r"Answer: (\w)", which="first") == [0]
    assert scores("regex", [("x 12 y", "12")], pattern=r"\d+") == [1]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("so it is 1,234.50.", "#### 1234.5", 1),
        ("from 1-2", "2", 1),
        ("−3", "-3", 1),
        ("about 3.1415927", "3.14159265", 1),
        ("3.1416", "3.14159265", 0),
        ("1e3", "1000", 1),
        (".5", "0.5", 1),
        ("none at all", "7", 0),
        ("7", "none at all", None),
        ("9" * 5000, "7", 0),
        ("1,2,3", "3", 1),
        ("2e999", "1", 0),
    ],
)
def test_number(response: str, reference: str, expected: float | None) -> None:
    assert scores("number", [(response, reference)]) == [expected]


def test_math_verify() -> None:
    pytest.importorskip("math_verify")
    pairs = [
        (r"so \boxed{\frac12}", "0.5"),
        ("it is $2x + x$", "3x"),
        ("it is $2x$", "3x"),
        (r"$\{1, 2\}$", r"\boxed{\{2,1\}}"),
        ("$9^{9^{9^{9}}}$", "1"),  # would take forever, and all the memory
        ("no answer", "1"),
        ("$1$", ""),
        ("$7$", "7"),
    ]
    begun = time.monotonic()
    assert scores("math_verify", pairs, seconds=3) == [1, 1, 0, 1, 0, 0, None, 1]
    assert time.monotonic() - begun < 60


def test_math_verify_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[rewards\]"):
        build_reward("math_verify", {})


TEST = "assert double(4) == 8\nassert double(-1) == -2"
GOOD = "def double(x):\n    return 2 * x"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, 1),
        (f"Sure!\n```python\n{GOOD}\n```\nDone.", 1),
        (f"```\n{GOOD}", 1),  # cut off before the fence closed
        (f"{GOOD}\nif __name__ == '__main__':\n    input()", 1),
        ("def double(x):\n    return x", 0),
        ("def double(x:", 0),
        ("", 0),
        (f"{GOOD}\nraise SystemExit(0)", 0),
        (f"{GOOD}\nimport os\nos._exit(0)", 0),
        ("while True: pass", 0),
        ("import time; time.sleep(60)", 0),
        ("x = bytearray(8 << 30)", 0),
        ("x = []\nwhile True: x.append(bytes(1 << 20))", 0),
        ("while True: print('x' * 100000)", 0),
        (f"print('x' * 10_000_000)\n{GOOD}", 1),
        ("open('big', 'wb').write(bytes(64 << 20))", 0),
        ("import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass", 0),
        (f"import os\nassert 'SECRET' not in os.environ\n{GOOD}", 1),
    ],
)
def test_unit_tests(response: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    begun = time.monotonic()
    assert scores("unit_tests", [(response, TEST)], seconds=2, isolation=isolation()) == [expected]
    assert time.monotonic() - begun < 20


def isolation() -> str:
    try:
        sandbox.namespaces()
    except ConfigError:
        return "process"
    return "namespaces"


def test_unit_tests_of_many_at_once() -> None:
    pairs = [(GOOD, TEST), ("while True: pass", TEST)] * 3
    assert scores("unit_tests", pairs, seconds=2, workers=4, isolation=isolation()) == [1, 0] * 3


def test_a_prompt_can_be_the_beginning_of_the_code() -> None:
    reward = build_reward("unit_tests", {"include_prompt": True, "isolation": isolation(), "seconds": 10})
    assert reward.score(["def double(x):\n"], ["    return 2 * x\n"], [TEST]) == [1]


ORPHAN = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(4)
        open({path!r}, "w").write("still here")
    os._exit(0)
def double(x):
    return 2 * x
"""


def test_nothing_outlives_the_run_and_there_is_no_network(tmp_path: Path) -> None:
    if isolation() == "process":
        pytest.skip("no user namespaces here")
    mark = tmp_path / "mark"
    assert scores("unit_tests", [(ORPHAN.format(path=str(mark)), TEST)], seconds=10) == [1]
    call = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n"
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        reachable = call.format(port=server.server_address[1])
        pair = (f"{reachable}{GOOD}", TEST)
        assert scores("unit_tests", [pair], seconds=10, isolation="process") == [1]
        assert scores("unit_tests", [pair], seconds=10) == [0]
    time.sleep(4.5)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="the kernel does not count root's processes")
def test_processes_are_counted() -> None:
    many = "import os\nfor _ in range(5000):\n    if os.fork() == 0:\n        import time; time.sleep(30)\n"
    few = many.replace("5000", "5")
    if isolation() == "namespaces":
        assert scores("unit_tests", [(many + GOOD, TEST), (few + GOOD, TEST)], seconds=10) == [0, 1]


def test_code_is_not_run_without_namespaces_unless_that_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    sandbox.namespaces.cache_clear()
    try:
        with pytest.raises(ConfigError, match="isolation: process"):
            build_reward("unit_tests", {})
        assert scores("unit_tests", [(GOOD, TEST)], isolation="process", seconds=10) == [1]
    finally:
        sandbox.namespaces.cache_clear()


@pytest.fixture(scope="module", params=["pairs", "chat"])
def reward_model(tiny: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A sequence-classification model with a head of its own, with and without a chat template."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("reward") / str(request.param)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = None
    if request.param == "chat":
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": 1}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**sizes)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_reward_model_gives_the_raw_logit(reward_model: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward = build_reward("reward_model", {"path": str(reward_model), "batch_size": 2, "device": "cpu"})
    prompts, responses = ["What is 1 + 1?", "Say a word.", "x"], ["two", "a much longer answer than that", "y " * 200]
    found = reward.score(prompts, responses, ["", "", ""])
    assert found[2] is None  # longer than what the model can read
    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for prompt, response, value in zip(prompts[:2], responses[:2], found[:2], strict=True):
        inputs = tokenizer(prompt, response, return_tensors="pt")
        if reward_model.name == "chat":
            text = f"<user>{prompt}\n<assistant>{response}\n"
            inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            assert value == pytest.approx(model(**inputs).logits.item(), abs=1e-5)
    assert reward.identity() == build_reward("reward_model", {"path": f"{reward_model}/."}).identity()


def test_a_model_without_a_trained_head_is_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match=r"without score\.weight"):
        scores("reward_model", [("a", "b")], path=str(tiny.model), device="cpu")


class Judged(BaseHTTPRequestHandler):
    """Answers with the digits that it finds in the response it is shown; fails where it finds `fail`."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(asked | {"key": self.headers.get("Authorization")})  # type: ignore[attr-defined]
        text = asked["messages"][0]["content"]
        shown = text.split("Response:\n")[1].split("\n\nReply")[0]
        body = json.dumps({"choices": [{"message": {"content": f"Score: 1\nNo. Score: {shown}"}}]}).encode()
        code = {"fail once": 503 if len(self.server.seen) == 1 else 200, "refuse": 401}.get(shown, 200)  # type: ignore[attr-defined]
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judged)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server: Any) -> dict[str, Any]:
    return {"base_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "model": "judge"}


def test_judge(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    reward = build_reward("judge", {**address(judge), "api_key_env": "A_KEY"})
    found = reward.score(["q {response}"] * 3, ["7", "-2.5", "nothing"], ["{prompt}"] * 3)
    assert found == [7, -2.5, 1]
    assert judge.seen[0]["key"] == "Bearer secret"
    assert "q {response}" in judge.seen[0]["messages"][0]["content"]
    assert "A_KEY" not in json.dumps(reward.identity())
    assert build_reward("judge", {**address(judge), "pattern": r"grade (\d+)"}).score([""], ["7"], [""]) == [None]


def test_judge_is_asked_again_or_the_run_can_be_resumed(judge: Any) -> None:
    reward = build_reward("judge", {**address(judge), "retries": 1})
    assert reward.score([""], ["fail once"], [""]) == [1]
    with pytest.raises(ConfigError, match="401"):
        reward.score([""], ["refuse"], [""])
    judge.shutdown()
    judge.server_close()
    gone = build_reward("judge", {**address(judge), "retries": 0})
    with pytest.raises(UnavailableError, match="same command goes on") as error:
        gone.score([""], ["1"], [""])
    assert error.value.exit_code == 75


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(prompts, responses, references, at=1):\n    return [len(r) * at or None for r in responses]\n"
    )
    reward = build_reward("function", {"function": f"{path}:score", "arguments": {"at": 2}})
    assert reward.score([""] * 2, ["abc", ""], [""] * 2) == [6, None]
    before = reward.identity()
    path.write_text(path.read_text() + "# changed\n")
    assert reward.identity() != before
    (tmp_path / "short.py").write_text("def score(*texts):\n    return []\n")
    short = build_reward("function", {"function": f"{tmp_path / 'short.py'}:score"})
    with pytest.raises(DataflexError, match="0 values for 1"):
        short.score([""], ["a"], [""])


def test_a_registered_class(tmp_path: Path) -> None:
    path = tmp_path / "registers.py"
    path.write_text(
        "from dataflex.rewards import Parameters, register_reward\n"
        "@register_reward('shortness')\nclass Shortness:\n"
        "    class Params(Parameters):\n        at: float = 1.0\n"
        "    def __init__(self, params): self.at = params.at\n"
        "    def score(self, prompts, responses, references): return [-self.at * len(r) for r in responses]\n"
        "    def identity(self): return {'type': 'shortness', 'at': self.at}\n"
    )
    assert build_reward("shortness", {"at": 2}, [str(path)]).score([""], ["abc"], [""]) == [-6]


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("exact_mach", {}, "did you mean 'exact_match'"),
        ("regex", {}, "pattern: Field required"),
        ("regex", {"pattern": "("}, "no regular expression"),
        ("judge", {"base_url": "x", "model": "y", "pattern": "score"}, "0 groups"),
        ("judge", {"base_url": "x", "model": "y", "template": "{prompt}"}, "must see"),
        ("number", {"tolerence": 1}, "Its parameters: tolerance"),
        ("function", {"function": "json:nothing"}, "no function nothing"),
        ("reward_model", {"path": "nowhere"}, "no model in nowhere"),
    ],
)
def test_what_is_wrong_is_said(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_reward(name, params)


def test_identities_are_plain_and_tell_parameters_apart() -> None:
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("exact_match", {}, {"punctuation": False}),
        ("number", {}, {"tolerance": 0.1}),
        ("regex", {"pattern": "x"}, {"pattern": "y"}),
        ("judge", {"base_url": "x", "model": "y"}, {"base_url": "x", "model": "z"}),
        ("unit_tests", {"isolation": "process"}, {"isolation": "process", "seconds": 9}),
    ]
    for name, one, other in cases:
        identity = build_reward(name, one).identity()
        assert json.loads(json.dumps(identity)) == identity
        assert identity["type"] == name
        assert identity != build_reward(name, other).identity()
    patient = {"base_url": "x", "model": "y", "retries": 9, "workers": 1, "api_key_env": "K"}
    assert build_reward("judge", patient).identity() == build_reward("judge", cases[3][1]).identity()


def test_the_page_lists_every_reward_and_parameter() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text("utf-8")
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `") and "`type`" not in line}
    builtin = {name: place for name, place in REWARDS.places().items() if place.startswith("dataflex.")}
    assert lines.keys() == builtin.keys()
    for name, line in lines.items():
        fields = REWARDS.load(name).Params.model_fields
        assert set(re.findall(r"`(\w+)`", line.rpartition(" | ")[2])) == set(fields)
        shown = re.findall(r"`(\w+)` \(([\w.-]+)", line.rpartition(" | ")[2])
        for key, text in shown:
            default = fields[key].default
            assert default is None or yaml.safe_load(text) == default or float(text) == default, key


def test_the_pages_function(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "own_reward.md").read_text("utf-8")
    path = tmp_path / "my_rewards.py"
    path.write_text(page.split("```python\n")[1].split("```")[0])
    assert build_reward("function", {"function": f"{path}:brevity"}).score([""], ["abcd"], [""]) == [-0.04]
