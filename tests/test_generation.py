"""Responses are drawn from the model itself, the same in any batch; or asked of a server, whose faults are told."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex.errors import DataflexError, UnavailableError
from dataflex.features.generation import Job, ModelGenerator, draw, uniform
from dataflex.features.served import ServerGenerator
from dataflex.features.spec import PolicyGradientSpec
from dataflex.fingerprint import row_key


@pytest.fixture(scope="module")
def tokenizer(tiny: Any) -> Any:
    return AutoTokenizer.from_pretrained(tiny.model)


@pytest.fixture
def model(tiny: Any) -> Any:
    """The tiny model in float64 with an adapter that acts, in training mode, with defaults that must not act."""
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float64)
    base.generation_config.repetition_penalty = 5.0
    base.generation_config.top_k = 1
    base.generation_config.max_length = 3
    base.config.use_cache = False  # as in training
    base.gradient_checkpointing_enable()
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def spec(**keys: Any) -> PolicyGradientSpec:
    if {"temperature", "top_p", "top_k"} & keys.keys():
        keys = {"on_policy": "sampled", **keys}
    return PolicyGradientSpec(**{"reward": {"type": "number"}, "max_new_tokens": 8, **keys})


def jobs(tokenizer: Any, samples: int = 3) -> list[Job]:
    texts = ["What is 2 + 3?", "Say", "A longer question than the others, with many more words in it"]
    out = []
    for text in texts:
        ids = np.array(tokenizer(text)["input_ids"], np.int64)
        out += [Job(ids, text, row_key(ids, np.full(len(ids), -100)), c) for c in range(samples)]
    return out


def generate(generator: Any, asked: Sequence[Job], of: PolicyGradientSpec) -> list[list[int]]:
    found = {i: ids.tolist() for group in generator(asked, of) for i, ids in group}
    assert sorted(found) == list(range(len(asked)))
    return [found[i] for i in range(len(asked))]


def by_hand(model: Any, job: Job, of: PolicyGradientSpec, stop: Sequence[int]) -> list[int]:
    """Draw one token after the other: no batch, no padding, no cache, no `generate`."""
    ids, out = job.prompt.tolist(), list[int]()
    while len(out) < of.max_new_tokens and not (out and out[-1] in stop):
        with torch.no_grad():
            logits = model(torch.tensor([ids + out]), use_cache=False).logits[0, -1]
        weights = (logits / of.temperature).softmax(dim=0).tolist()
        order = sorted(range(len(weights)), key=lambda v: -weights[v])[: of.top_k or None]
        whole, kept, mass = sum(weights[v] for v in order), set[int](), 0.0
        for v in order:
            if of.top_p == 1 or mass < of.top_p:
                kept.add(v)
            mass += weights[v] / whole
        at = uniform(of.seed, job.key, job.sample, len(out)) * sum(weights[v] for v in kept)
        for v, weight in enumerate(weights):
            at -= weight if v in kept else 0.0
            if at < 0:
                out.append(v)
                break
    return out


@pytest.mark.parametrize(
    "keys", [{}, {"seed": 3}, {"temperature": 0.5, "top_p": 0.8}, {"top_k": 7, "temperature": 2.0}]
)
def test_responses_are_those_drawn_by_hand(model: Any, tokenizer: Any, keys: dict[str, Any]) -> None:
    """In any order and batch; nothing of the model is changed."""
    of, asked = spec(**keys), jobs(tokenizer)
    stop = [tokenizer.eos_token_id, *range(20, 120)]  # many, so that some responses end early
    model.eval()
    expected = [by_hand(model, job, of, stop) for job in asked]
    model.train()
    before = [(n, m.training) for n, m in model.named_modules()]
    state = torch.get_rng_state()
    order = np.random.default_rng(0).permutation(len(asked)).tolist()
    for budget in (1, 20, 1000):
        generator = ModelGenerator(model, stop=stop, pad_token_id=0, token_budget=budget)
        assert generate(generator, asked, of) == expected
        assert generate(generator, [asked[i] for i in order], of) == [expected[i] for i in order]
    assert [(n, m.training) for n, m in model.named_modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.get_base_model().generation_config.repetition_penalty == 5.0
    assert all(p.grad is None for p in model.parameters())
    assert len({tuple(ids) for ids in expected}) > len(asked) // 2
    lengths = {len(ids) for ids in expected}
    assert max(lengths) == of.max_new_tokens > min(lengths)
    ended = [ids for ids in expected if len(ids) < of.max_new_tokens]
    assert all(ids[-1] in stop for ids in ended)  # the stop token belongs to the response


def test_more_samples_leave_the_first_as_they_were(model: Any, tokenizer: Any) -> None:
    generator = ModelGenerator(model, stop=[tokenizer.eos_token_id], pad_token_id=0)
    few, many = jobs(tokenizer, 2), jobs(tokenizer, 5)
    found = generate(generator, many, spec())
    where = [i for i, job in enumerate(many) if job.sample < 2]
    assert generate(generator, few, spec()) == [found[i] for i in where]


def test_a_response_has_the_room_that_the_context_leaves(model: Any, tokenizer: Any) -> None:
    model.config.max_position_embeddings = 12
    generator = ModelGenerator(model, stop=[], pad_token_id=0)
    asked = [Job(np.arange(5, 5 + n), "", bytes([n]), 0) for n in (3, 10, 12, 20)]
    assert [len(ids) for ids in generate(generator, asked, spec(max_new_tokens=6))] == [6, 2, 0, 0]


def test_draws_have_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, -math.inf, 0.0]])
    count = 40_000
    at = torch.tensor([uniform(0, b"key", i, 0) for i in range(count)], dtype=torch.float64)
    assert 0 <= at.min() < 1e-3
    assert 1 - 1e-3 < at.max() < 1
    for keys, kept in (({}, [0, 1, 2, 4]), ({"top_k": 2}, [0, 2]), ({"top_p": 0.8}, [0, 2])):
        found = torch.bincount(draw(logits.expand(count, -1), at, **keys), minlength=5) / count
        weights = torch.zeros(5).index_copy(0, torch.tensor(kept), logits[0, kept].exp())
        weights /= weights.sum()
        assert torch.allclose(found, weights, atol=4 * 0.5 / math.sqrt(count))
        assert found[weights == 0].sum() == 0
    last = torch.tensor([1 - 2**-52], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 1.0, -math.inf]]), last).item() == 1
    assert draw(torch.tensor([[-math.inf, 1.0, 0.0]]), torch.zeros(1, dtype=torch.float64)).item() == 1


def test_draws_depend_on_every_argument() -> None:
    base = (0, b"key", 0, 0)
    others = [(1, b"key", 0, 0), (0, b"kez", 0, 0), (0, b"key", 1, 0), (0, b"key", 0, 1)]
    assert len({uniform(*each) for each in [base, *others]}) == 5
    assert uniform(*base) == 0.5984770715933283  # golden: stored responses rest on it


def test_nan_is_an_error() -> None:
    with pytest.raises(DataflexError, match="NaN or infinite"):
        draw(torch.tensor([[0.0, math.nan]]), torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"on_policy": "exact", "temperature": 0.7}, "on_policy: sampled"),
        ({"mc_samples": 1}, "mc_samples of 2 or more"),
        ({"generator": {"type": "openai"}}, "base_url and model"),
        ({"generator": {"base_url": "x"}}, "base_url and model"),
        ({"generator": {"type": "openai", "base_url": "x", "model": "y"}}, "off-policy"),
        ({"reward": ()}, "at least 1"),
        ({"reward": {}}, "reward"),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PolicyGradientSpec(**{"reward": {"type": "number"}, **keys})


def test_specifications_are_equal_by_what_acts() -> None:
    one = spec(reward={"type": "regex", "pattern": "x"})
    assert one == spec(reward=[{"type": "regex", "pattern": "x"}])
    assert hash(one) == hash(spec(reward=[{"type": "regex", "pattern": "x"}]))
    assert one != spec(reward={"type": "regex", "pattern": "y"})
    assert spec(on_policy="sampled").recipe() == spec().recipe()
    assert spec(k=5).recipe() == spec().recipe()
    assert spec(k=5, estimator="topk").recipe() != spec(estimator="topk").recipe()
    assert json.loads(json.dumps(one.recipe())) == one.recipe()


class Server(BaseHTTPRequestHandler):
    """Repeats the question with the seed; says that it was cut off where the question is `long`."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        text = asked["messages"][0]["content"]
        reason = "length" if text == "long" else "stop"
        said = {"choices": [{"message": {"content": f"{text} {asked['seed']}"}, "finish_reason": reason}]}
        self.send_response(200 if self.path == "/v1/chat/completions" else 404)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def served(server: Any, **keys: Any) -> PolicyGradientSpec:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    generator = {"type": "openai", "base_url": url, "model": "writer", "retries": 0, "timeout": 10}
    return spec(generator=generator, on_policy="sampled", max_new_tokens=40, **keys)


def test_a_servers_answer_becomes_tokens_of_the_training_tokenizer(server: Any, tokenizer: Any) -> None:
    of = served(server, temperature=0.7, top_k=5)
    asked = [Job(np.array([1, 2]), text, text.encode(), c) for text in ("short", "long") for c in range(2)]
    found = generate(ServerGenerator(of, tokenizer, tokenizer.eos_token_id), asked, of)
    assert found == generate(ServerGenerator(of, tokenizer, tokenizer.eos_token_id), asked, of)
    assert len({json.dumps(ids) for ids in found}) == 4  # a seed for each
    for job, ids in zip(asked, found, strict=True):
        assert (ids[-1] == tokenizer.eos_token_id) == (job.text == "short")
        assert tokenizer.decode(ids, skip_special_tokens=True).startswith(job.text)
    sent = server.asked[0]
    assert (sent["model"], sent["temperature"], sent["top_k"], sent["max_tokens"]) == ("writer", 0.7, 5, 40)


def test_a_server_that_goes_away_leaves_what_it_said(server: Any, tokenizer: Any) -> None:
    of = served(server)
    of = of.model_copy(update={"generator": of.generator.model_copy(update={"workers": 2})})
    asked = [Job(np.array([1]), "q", bytes([c]), c) for c in range(100)]
    groups = ServerGenerator(of, tokenizer, None)(asked, of)
    first = next(groups)
    assert [i for i, _ in first] == list(range(8))
    server.shutdown()
    server.server_close()
    with pytest.raises(UnavailableError, match="same command goes on"):
        next(groups)
