"""Policy gradients: weights and gradients against closed forms and autograd, and what a run keeps of them."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataflex.access.policy_source import PolicySource
from dataflex.access.responses import ResponseStore, RewardStore
from dataflex.errors import ConfigError, DataflexError, UnavailableError
from dataflex.features.engine import FeatureEngine
from dataflex.features.generation import Job
from dataflex.features.policy import policy_gradients, response_weights
from dataflex.features.spec import GradientSpec, Projection
from dataflex.live.sharding import Sharding
from dataflex.rewards import Reward
from dataflex.rows import Status
from dataflex.stores.root import StoreRoot
from tests.looked_at import problems

THETA = np.array([0.3, -1.2, 0.9, 0.1, -0.4])
REWARD = np.array([1.0, 0.2, -0.7, 0.4, 2.5])
PI = np.exp(THETA) / np.exp(THETA).sum()
GRADIENT = PI * (REWARD - PI @ REWARD)
"""Of the expected reward of a softmax policy over five actions."""
ACTIONS = range(5)
IDENTITY = Projection(type="identity")


def nll_gradient(action: int) -> np.ndarray:
    """Return the gradient of -log pi(action) at THETA."""
    return PI - np.eye(5)[action]


def expectation(estimator: Any, count: int, reward: np.ndarray = REWARD) -> tuple[np.ndarray, float]:
    """Enumerate all groups of responses; return the mean of g / C and the trace of its covariance."""
    mean, square = np.zeros(5), 0.0
    for actions in itertools.product(ACTIONS, repeat=count):
        weights = response_weights(estimator, reward[list(actions)])
        g = sum(w * nll_gradient(a) for w, a in zip(weights, actions, strict=True)) / count
        chance = math.prod(PI[a] for a in actions)
        mean += chance * g
        square += chance * float(g @ g)
    return mean, square - float(mean @ mean)


@pytest.mark.parametrize(
    ("estimator", "count"), [("vanilla", 1), ("vanilla", 3), ("loo_baseline", 2), ("loo_baseline", 4)]
)
def test_bandit_has_the_exact_gradient(estimator: str, count: int) -> None:
    """Both are unbiased, whatever constant is added to the reward; the sign is that of a loss."""
    for shift in (0.0, 10.0):
        mean, _ = expectation(estimator, count, REWARD + shift)
        np.testing.assert_allclose(mean, -GRADIENT, rtol=0, atol=1e-12)


def test_baseline_has_less_variance_under_an_offset() -> None:
    assert expectation("loo_baseline", 3, REWARD + 10)[1] < 0.1 * expectation("vanilla", 3, REWARD + 10)[1]
    np.testing.assert_allclose(
        expectation("loo_baseline", 3, REWARD + 10)[1], expectation("loo_baseline", 3)[1], rtol=1e-9
    )


def test_baseline_takes_no_notice_of_an_offset() -> None:
    rewards = np.array([0.1, 0.9, 0.4, 0.4])
    loo, vanilla = response_weights("loo_baseline", rewards), response_weights("vanilla", rewards)
    np.testing.assert_allclose(response_weights("loo_baseline", rewards + 1e3), loo, atol=1e-9)
    np.testing.assert_array_equal(response_weights("vanilla", rewards + 1e3), vanilla + 1e3)
    for c, r in enumerate(rewards):
        assert loo[c] == pytest.approx(r - np.delete(rewards, c).mean(), abs=1e-15)
    assert not response_weights("loo_baseline", np.full(5, 0.1)).any()  # nor rounding of equal rewards
    assert response_weights("vanilla", np.full(5, 0.1)).all()


@pytest.mark.parametrize(
    ("estimator", "reference", "k", "expected"),
    [
        ("rejection", np.nan, 10, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
        ("hard_rejection", 1.0, 10, [1 / 2, 0, 0, 0, 1 / 2]),
        ("hard_rejection", 2.0, 10, [0, 0, 0, 0, 0]),
        ("hard_rejection", -1.0, 10, [1 / 5, -1 / 5, 0, 0.5 / 5, 1 / 5]),
        ("hard_rejection", np.nan, 10, [0, 0, 0, 0, 0]),
        ("topk", np.nan, 1, [1, 0, 0, 0, 0]),
        ("topk", np.nan, 3, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
        ("topk", np.nan, 10, [1 / 3, 0, 0, 0.5 / 3, 1 / 3]),
    ],
)
def test_rejection(estimator: Any, reference: float, k: int, expected: list[float]) -> None:
    found = response_weights(estimator, np.array([1.0, -1.0, 0.0, 0.5, 1.0]), reference, k)
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("estimator", ["vanilla", "loo_baseline", "rejection", "hard_rejection", "topk"])
def test_what_was_not_scored_is_left_out(estimator: Any) -> None:
    rewards = np.array([1.0, np.nan, 0.5, np.nan, 2.0])
    found, some = response_weights(estimator, rewards, 0.5), response_weights(estimator, rewards[[0, 2, 4]], 0.5)
    np.testing.assert_array_equal(found, [some[0], 0, some[1], 0, some[2]])
    assert not response_weights(estimator, np.full(3, np.nan), 0.5).any()
    assert not response_weights("loo_baseline", np.array([1.0, np.nan])).any()  # nothing to compare with


class Bandit(nn.Module):
    """Gives every next token the probabilities PI."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Linear(1, 5, bias=False)
        self.theta.weight.data = torch.tensor(THETA, dtype=torch.float32)[:, None]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, return_dict: bool) -> Any:
        return SimpleNamespace(logits=self.theta(torch.ones(*input_ids.shape, 1)))


def gradients(
    responses: list[list[list[int]]], weights: list[list[float]], **keys: Any
) -> tuple[np.ndarray, np.ndarray]:
    prompts = [np.array([1, 2, 3][: 1 + row % 3]) for row in range(len(responses))]
    texts = [[np.array(ids, np.int64) for ids in row] for row in responses]
    engine = FeatureEngine(Bandit(), pad_token_id=0)
    return policy_gradients(engine, prompts, texts, [np.array(w) for w in weights], IDENTITY, **keys)


def test_the_engine_gives_the_bandits_gradient() -> None:
    """Each action once, weighted by its probability, is the expectation."""
    vectors, status = gradients([[[a] for a in ACTIONS]], [list(PI * REWARD)])
    np.testing.assert_allclose(vectors[0], -GRADIENT, atol=1e-6)
    assert status.tolist() == [Status.OK]


def test_a_step_towards_the_best_token_scores_positive() -> None:
    vectors, _ = gradients([[[a] for a in ACTIONS]], [response_weights("loo_baseline", REWARD).tolist()])
    best = int(np.argmax(REWARD))
    assert vectors[0] @ nll_gradient(best) > 0
    assert vectors[0] @ -nll_gradient(best) < 0


def test_a_response_twice_as_long_counts_twice_unless_the_mean_is_taken() -> None:
    responses: list[list[list[int]]] = [[[4]], [[4, 4]]]
    weights = [[1.5], [1.5]]
    for normalisation, factor in (("sum", 2), ("mean", 1)):
        vectors, _ = gradients(responses, weights, normalisation=normalisation)
        np.testing.assert_allclose(vectors[0], 1.5 * nll_gradient(4), atol=1e-6)
        np.testing.assert_allclose(vectors[1], factor * vectors[0], atol=1e-6)


def test_prompts_without_a_signal_are_said_to_have_none() -> None:
    responses: list[list[list[int]]] = [[[1], [2]], [[], []], [[1], []], [[3], [3]], [[1], [2]]]
    vectors, status = gradients(responses, [[0, 0], [1, 1], [1, 1], [1, -1], [1, 1]])
    assert status.tolist() == [Status.NO_LABELS, Status.NO_LABELS, Status.OK, Status.NO_LABELS, Status.OK]
    assert np.isfinite(vectors).all()
    assert not vectors[status != Status.OK].any()
    np.testing.assert_allclose(vectors[2], nll_gradient(1), atol=1e-6)
    none, status = gradients([], [])
    assert (none.shape, status.shape) == ((0, 5), (0,))


def test_equal_responses_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[int] = []
    compute = FeatureEngine.compute

    def counting(self: FeatureEngine, examples: Any, *args: Any) -> Any:
        run.append(len(examples))
        return compute(self, examples, *args)

    monkeypatch.setattr(FeatureEngine, "compute", counting)
    once, _ = gradients([[[1, 2], [3]]], [[3.0, 1.0]])
    twice, _ = gradients([[[1, 2], [3], [1, 2]]], [[1.0, 1.0, 2.0]])
    assert run == [2, 2]
    np.testing.assert_allclose(twice, once, rtol=1e-6)


def test_nonfinite_gradients_are_marked() -> None:
    model = Bandit()
    model.theta.weight.data[1] = math.nan
    engine = FeatureEngine(model, pad_token_id=0)
    prompts = [np.array([1])]
    vectors, status = policy_gradients(engine, prompts, [[np.array([1])]], [np.ones(1)], IDENTITY)
    assert status.tolist() == [Status.NONFINITE]
    assert not vectors.any()


PLUGIN = '''
import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from dataflex.features.spec import PolicyGradientSpec
from dataflex.selectors import Need, Selection, register_selector


@register_selector("policy_probe")
class Probe:
    """Writes down what it is given."""

    class Params(BaseModel):
        spec: dict
        out: str

    def __init__(self, params):
        self.params, self.spec = params, PolicyGradientSpec(**params.spec)

    def needs(self):
        return [Need(self.spec, "targets")]

    def select(self, model, step_id, num_samples, *, context, **kwargs):
        out = {}
        for name in context.targets:
            view = context.features(self.spec, name)
            vectors = np.zeros((len(view.status), 1))
            for rows, block in view.blocks():
                vectors = np.resize(vectors, (len(view.status), block.shape[1])) if vectors.shape[1] == 1 else vectors
                vectors[rows] = block
            out |= {"vectors": vectors, "status": view.status, "reward": view.scalar("reward")}
        np.savez(self.params.out, **out)
        return Selection(np.arange(num_samples))
'''

REWARDS = """
from pathlib import Path


def score(prompts, responses, references, log):
    with open(log, "a") as file:
        file.writelines(f"{len(p)} {len(r)}\\n" for p, r in zip(responses, references))
    return [None if len(r) % 7 == 0 else sum(c in "aeiou" for c in r) for r in responses]  # some are not scored
"""


class Probe:
    """Runs of the selector above over one workspace; the model is trained whole, and asked before its first step."""

    def __init__(self, workspace: Any):
        self.workspace, self.folder = workspace, workspace.folder
        (self.folder / "probe.py").write_text(PLUGIN)
        (self.folder / "rewards.py").write_text(REWARDS)
        self.log = self.folder / "scored.txt"
        self.log.touch()
        self.scoring = {
            "type": "function",
            "function": f"{self.folder / 'rewards.py'}:score",
            "arguments": {"log": str(self.log)},
        }

    def write(self, name: str, keys: dict[str, Any] | None = None, **spec: Any) -> Path:
        spec = {"reward": self.scoring, "max_new_tokens": 12, "projection": {"dim": 64}, **spec}
        section = {
            "store": str(self.folder / "store"),
            "plugins": [str(self.folder / "probe.py")],
            "params": {"spec": spec, "out": str(self.folder / f"{name}.npz")},
            "storage": "float32",
            "fragment_rows": 4,
        }
        whole = {"finetuning_type": "full", "lora_target": None, "lora_rank": None, "lora_dropout": None}
        steps = {
            "warmup_step": 0,
            "update_step": 1,
            "update_times": 1,
            "save_strategy": "no",
            "component_name": "policy_probe",
        }
        return Path(self.workspace.write(name, dataflex=section, **{**whole, **steps, **(keys or {})}))

    def train(self, name: str, keys: dict[str, Any] | None = None, **spec: Any) -> dict[str, np.ndarray]:
        self.workspace.run("train", self.write(name, keys, **spec))
        return dict(np.load(self.folder / f"{name}.npz"))

    def store(self, kind: str, root: str = "store") -> Any:
        (found,) = [store for store in StoreRoot(self.folder / root).stores() if store.kind == kind]
        assert problems(found) == []
        return found

    @property
    def scored(self) -> int:
        return len(self.log.read_text().splitlines())


@pytest.fixture
def probe(workspace: Any) -> Probe:
    return Probe(workspace)


def autograd(model: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """Return the gradient of the response's summed loss, parameters in the engine's order, in float64."""
    model.zero_grad()
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    (-logits.log_softmax(dim=1)[torch.arange(len(response)), torch.tensor(response)].sum()).backward()
    named = sorted((name, p) for name, p in model.named_parameters())
    return np.concatenate([p.grad.flatten().numpy() for _, p in named])


def test_a_run_gives_the_gradient_of_what_the_model_wrote(probe: Probe, tiny: Any) -> None:
    """Against autograd in float64 over the responses that were kept; and nothing is written or scored twice."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.quickstart.pool import turns

    found = probe.train("one", projection={"type": "identity"})
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    kept = next(probe.store("response").scan())
    responses = [row[:n].astype(int).tolist() for row, n in zip(kept.vectors, kept.scalars["length"], strict=True)]
    assert len(responses) == 8 * 4
    rows = json.loads((Path(tiny.dataset_dir) / f"{tiny.targets[0]}.json").read_text())
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    seen = set()
    for at, row in enumerate(rows):
        prompt = tokenizer(turns(row)[0], add_special_tokens=False)["input_ids"]
        mine = _written_to(model, prompt, responses)
        seen |= set(mine)
        rewards = np.array([
            np.nan if len(texts[i]) % 7 == 0 else sum(c in "aeiou" for c in texts[i]) for i in mine
        ])  # fmt: skip
        scored = [(i, r) for i, r in zip(mine, rewards, strict=True) if not np.isnan(r)]
        expected = np.zeros(found["vectors"].shape[1])
        for i, r in scored:
            others = [q for j, q in scored if j != i]
            if others and r != np.mean(others):
                expected += (r - np.mean(others)) * autograd(model, prompt, responses[i])
        assert found["status"][at] == (Status.OK if expected.any() else Status.NO_LABELS)
        np.testing.assert_allclose(found["vectors"][at], expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))
        if expected.any():
            assert found["reward"][at] == pytest.approx(np.mean([r for _, r in scored]))
    assert len(seen) == 32
    assert (found["status"] == Status.OK).sum() >= 4

    scored_once = probe.scored
    again = probe.train("two", estimator="vanilla", projection={"dim": 128})
    assert again["vectors"].shape[1] == 128
    assert (probe.store("response").rows, probe.scored) == (32, scored_once)
    probe.train("three", mc_samples=6)
    assert probe.store("response").rows == 8 * 6
    probe.train("four", estimator="hard_rejection")
    assert probe.store("response").rows == 8 * 6
    assert scored_once < probe.scored <= 8 * 6 + 8


def _written_to(model: Any, prompt: list[int], responses: list[list[int]]) -> list[int]:
    """Return which responses the seeds give to a prompt: redraw each sample by hand."""
    from dataflex.features.generation import uniform
    from dataflex.fingerprint import row_key

    out = []
    for sample in range(4):
        ids: list[int] = []
        key = row_key(prompt, [-100] * len(prompt))
        while True:
            with torch.no_grad():
                passed = model(torch.tensor([prompt + ids])).logits[0, -1].softmax(dim=0).cumsum(dim=0)
            at = uniform(0, key, sample, len(ids)) * float(passed[-1])
            ids.append(int((passed <= at).sum()))
            if ids in responses:
                out.append(responses.index(ids))
                break
            assert len(ids) < 12, f"no response to sample {sample} was kept"
    return out


class Writer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        said = {"message": {"content": f"{asked['seed']} {asked['messages'][0]['content']}"}, "finish_reason": "stop"}
        is_up = len(self.server.asked) != self.server.fails_at  # type: ignore[attr-defined]
        self.send_response(200 if is_up else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [said]}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def writer() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Writer)
    server.asked, server.fails_at = [], -1  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_run_whose_server_goes_away_goes_on_from_there(probe: Probe, writer: Any, tiny: Any) -> None:
    url = f"http://127.0.0.1:{writer.server_address[1]}/v1"
    generator = {"type": "openai", "base_url": url, "model": "w", "retries": 0, "workers": 1}
    spec: dict[str, Any] = {"generator": generator, "on_policy": "sampled", "max_new_tokens": 64}
    writer.fails_at = 11
    with pytest.raises(UnavailableError):
        probe.train("one", **spec)
    assert probe.store("response").rows == 8
    probe.train("one", **spec)
    assert probe.store("response").rows == 32
    assert 11 + 24 <= len(writer.asked) <= 12 + 24  # one more may have been on its way when the server failed
    rows = json.loads((Path(tiny.dataset_dir) / f"{tiny.targets[0]}.json").read_text())
    questions = {f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"] for row in rows}
    assert {asked["messages"][0]["content"] for asked in writer.asked} == questions


@pytest.mark.slow
def test_two_processes_write_what_one_writes(probe: Probe) -> None:
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root), "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    probe.workspace.run("featurize", probe.write("one"))
    path = probe.write("two")
    kept = {kind: contents(probe.store(kind)) for kind in ("response", "policy_gradient", "reward")}
    path.write_text(path.read_text().replace(str(probe.folder / "store"), str(probe.folder / "other")))
    command = [sys.executable, "-m", "dataflex.cli", "featurize", str(path)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for kind, expected in kept.items():
        found = contents(probe.store(kind, "other"))
        assert found.keys() == expected.keys()
        for key, values in found.items():
            np.testing.assert_allclose(values, expected[key], rtol=1e-4, atol=1e-4)
    assert len(probe.store("policy_gradient", "other").committed_fragments()) == 2


def contents(store: Any) -> dict[bytes, np.ndarray]:
    """Return everything that is kept of each key."""
    return {
        key.tobytes(): np.concatenate([
            [status, *(block.scalars[name][i] for name in sorted(block.scalars))],
            [] if block.vectors is None else block.vectors[i],
        ])
        for block in store.scan()
        for i, (key, status) in enumerate(zip(block.keys, block.status, strict=True))
    }  # fmt: skip


def test_rows_without_a_prompt_are_refused(probe: Probe, tiny: Any) -> None:
    keys = {"stage": "pt", "dataset": tiny.text, "eval_dataset": tiny.text_target, "template": "default"}
    with pytest.raises(ConfigError, match="stage: found 'pt'; expected sft"):
        probe.train("one", keys)


class Scripted(Reward):
    """A reward whose scores are given."""

    def __init__(self, *scores: float | None):
        super().__init__(None)
        self.scores = list(scores)

    def score(self, prompts: Any, responses: Any, references: Any) -> list[float | None]:
        return [self.scores.pop(0) for _ in responses]

    def identity(self) -> dict[str, Any]:
        return {"type": "scripted"}


def test_rewards_are_kept_once_and_for_all(tmp_path: Path) -> None:
    kept = RewardStore(StoreRoot(tmp_path), {}, Scripted(1.0, None, 3.0))
    columns = ["p", "p", "p"], ["a", "b", "a"], ["r", "r", "r"]
    first = kept.get(*columns)
    assert sorted(first[:2].tolist(), key=str) == [1.0, pytest.approx(np.nan, nan_ok=True)]
    np.testing.assert_array_equal(kept.get(*columns), first)
    np.testing.assert_array_equal(kept.get(["p"], ["a"], ["another reference"]), [3.0])
    assert kept.get([], [], []).shape == (0,)


@pytest.mark.parametrize("scores", [[math.nan, 1.0], [1.0, math.inf]])
def test_rewards_that_are_no_numbers_are_refused(tmp_path: Path, scores: list[float]) -> None:
    kept = RewardStore(StoreRoot(tmp_path), {}, Scripted(*scores))
    with pytest.raises(DataflexError, match=r"reward scripted: .* 1 of them not finite"):
        kept.get(["", ""], ["a", "b"], ["", ""])


def test_responses_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    kept = ResponseStore(StoreRoot(tmp_path), {}, 4)
    jobs = [Job(np.array([1]), "", b"k", c) for c in range(3)]
    written = [np.array([(1 << 24) - 1, 0, 7]), np.array([], np.int64), np.array([1, 2, 3, 4])]

    def generate(missing: Any) -> Any:
        yield [(i, written[job.sample]) for i, job in enumerate(missing)][::-1]

    for asked in (jobs[:2], jobs, jobs[::-1] + jobs):
        found = kept.get(asked, generate)
        assert [ids.tolist() for ids in found] == [written[job.sample].tolist() for job in asked]
    assert kept.get([], generate) == []
    written[0] = np.array([1 << 24])
    with pytest.raises(DataflexError, match="below 2\\^24"):
        kept.get([Job(np.array([1]), "", b"other", 0)], generate)


def test_zero3_is_refused_by_name() -> None:
    none: Any = None
    state: Any = SimpleNamespace(sharding=Sharding("parameters"))
    with pytest.raises(ConfigError, match="ZeRO-3"):
        PolicySource(none, state, none, none, none)


def test_a_gradient_of_a_response_is_that_of_a_row() -> None:
    """The generated row is an ordinary row to the engine: labels on the response alone."""
    engine = FeatureEngine(Bandit(), pad_token_id=0)
    example = {"input_ids": [1, 2, 4, 0], "labels": [-100, -100, 4, 0]}
    (found,) = engine.compute([example], [GradientSpec(projection=IDENTITY)])
    vectors, _ = policy_gradients(engine, [np.array([1, 2])], [[np.array([4, 0])]], [np.ones(1)], IDENTITY)
    assert found.vectors is not None
    np.testing.assert_allclose(vectors, 2 * found.vectors, rtol=1e-6)
