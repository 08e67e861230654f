"""A run's policy gradients are those of what the model wrote, and no response is written or scored twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.access.policy_source import PolicySource
from dataflex.errors import ConfigError, UnavailableError
from dataflex.live.sharding import Sharding
from dataflex.rows import Status
from dataflex.stores.root import StoreRoot
from tests.looked_at import problems
from tests.processes import TWO, dataflex

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
    probe.workspace.run("featurize", probe.write("one"))
    path = probe.write("two")
    kept = {kind: contents(probe.store(kind)) for kind in ("response", "policy_gradient", "reward")}
    path.write_text(path.read_text().replace(str(probe.folder / "store"), str(probe.folder / "other")))
    dataflex("featurize", path, **TWO)
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


def test_zero3_is_refused_by_name() -> None:
    none: Any = None
    state: Any = SimpleNamespace(sharding=Sharding("parameters"))
    with pytest.raises(ConfigError, match="ZeRO-3"):
        PolicySource(none, state, none, none, none)
