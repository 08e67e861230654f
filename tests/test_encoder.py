"""Embeddings by another model than the run's are what its own library gives, and are known by their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.features.encoder import TextEncoder
from dataflex.features.spec import EmbeddingSpec
from dataflex.fingerprint import text_key
from dataflex.rows import Text
from dataflex.stores.root import StoreRoot
from dataflex.stores.search.faiss_cache import load_or_build


@pytest.fixture(scope="module")
def sentence_model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder around the tiny model."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts  # type: ignore[attr-defined]

    folder = tmp_path_factory.mktemp("sentences") / "encoder"
    transformer = parts.Transformer(str(tiny.model), max_seq_length=64)
    pooling = parts.Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder))
    return folder


def featurize(workspace: Any, name: str, spec: dict[str, Any], **keys: Any) -> Any:
    section = {
        "store": str(workspace.folder / "store"),
        "storage": "float32",
        "features": [{"kind": "embedding", **spec}],
    }
    keys = {"component_name": "random", "eval_dataset": None, **keys}
    summary = workspace.run("featurize", workspace.write(name, dataflex=section, **keys))
    stores = StoreRoot(workspace.folder / "store").stores()
    return summary, stores


def test_a_causal_encoder_embeds_the_text_as_transformers_does(workspace: Any, tiny: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = {"embedding_model_name_or_path": str(tiny.model), "layer": 1}
    summary, (store,) = featurize(workspace, "one", spec)
    pool = json.loads((Path(tiny.dataset_dir) / "pool.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    for record in pool[:3]:
        prompt = "\n".join(part for part in (record["instruction"], record["input"]) if part)
        ids = tokenizer(f"{prompt}\n{record['output']}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[1][0].mean(dim=0).numpy()
        key = np.frombuffer(text_key(prompt, record["output"]), dtype="V16")
        np.testing.assert_allclose(store.read(key).vectors[0], expected, rtol=1e-4, atol=1e-6)
    assert summary["computed"] == 61
    # Another template, cutoff or run model: the same texts, so nothing is computed.
    again, stores = featurize(workspace, "two", spec, cutoff_len=40, template="default", lora_rank=8)
    assert (again["computed"], len(stores)) == (0, 1)
    index = load_or_build(store)
    query = store.read(store_keys(store)[:4])
    scores, keys = index.search(query.vectors, 1)
    assert keys[:, 0].tolist() == query.keys.tolist()
    np.testing.assert_allclose(scores[:, 0], 1.0, rtol=1e-5)


def store_keys(store: Any) -> np.ndarray:
    return np.concatenate([block.keys for block in store.scan(vectors=False)])


def test_rows_that_differ_in_system_prompt_or_tools_are_told_apart(workspace: Any, tiny: Any) -> None:
    """The encoder reads both; what a row has not changes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tools = '[{"name": "look_up", "description": "finds a word", "parameters": {"type": "object", "properties": {}}}]'
    more: list[dict[str, str]] = [
        {},
        {"system": "Be brief."},
        {"tools": tools},
        {"system": "Be brief.", "tools": tools},
    ]
    turns = [{"from": "human", "value": "What is a noun?"}, {"from": "gpt", "value": "A name of a thing."}]
    records = [{"conversations": turns, "system": "", "tools": "", **each} for each in more]
    (workspace.folder / "calls.json").write_text(json.dumps([*records, records[0]]))
    columns = {"messages": "conversations", "system": "system", "tools": "tools"}
    info = {"calls": {"file_name": "calls.json", "formatting": "sharegpt", "columns": columns}}
    (workspace.folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset": "calls", "dataset_dir": str(workspace.folder), "cutoff_len": 512}
    spec = {"embedding_model_name_or_path": str(tiny.model)}
    summary, (store,) = featurize(workspace, "calls", spec, **keys)
    assert (summary["computed"], store.rows) == (4, 4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny.model), AutoTokenizer.from_pretrained(tiny.model)
    for each in more:
        parts = [each.get("system", ""), each.get("tools", ""), "What is a noun?", "A name of a thing."]
        ids = tokenizer("\n".join(part for part in parts if part), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = model(ids, output_hidden_states=True).hidden_states[-1][0].mean(dim=0).numpy()
        key = np.frombuffer(text_key(parts[2], parts[3], parts[0], parts[1]), dtype="V16")
        np.testing.assert_allclose(store.read(key).vectors[0], expected, rtol=1e-4, atol=1e-6)


def test_a_sentence_transformer_pools_as_it_was_trained_to(workspace: Any, tiny: Any, sentence_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    _, (store,) = featurize(workspace, "one", {"embedding_model_name_or_path": str(sentence_model)})
    record = json.loads((Path(tiny.dataset_dir) / "pool.json").read_text())[0]
    prompt = "\n".join(part for part in (record["instruction"], record["input"]) if part)
    expected = SentenceTransformer(str(sentence_model), device="cpu").encode([f"{prompt}\n{record['output']}"])[0]
    key = np.frombuffer(text_key(prompt, record["output"]), dtype="V16")
    np.testing.assert_allclose(store.read(key).vectors[0], expected, rtol=1e-4, atol=1e-6)


def test_blocks_and_rows_without_records_are_read_back_from_their_tokens(workspace: Any, tiny: Any) -> None:
    keys = {"stage": "pt", "dataset": "text", "template": "default", "cutoff_len": 32}
    summary, (store,) = featurize(workspace, "pt", {"embedding_model_name_or_path": str(tiny.model)}, **keys)
    assert 0 < summary["computed"] == store.rows <= summary["rows"]


@pytest.mark.parametrize("which", ["causal", "sentences"])
def test_it_tells_of_every_batch(tiny: Any, sentence_model: Path, which: str) -> None:
    encoder = TextEncoder(tiny.model if which == "causal" else sentence_model, torch.device("cpu"), token_budget=64)
    told: list[tuple[int, int]] = []
    texts = [Text("word " * (1 + number % 7), "answer") for number in range(70)]
    quiet = encoder.compute(texts, [EmbeddingSpec()])[0].vectors
    found = encoder.compute(texts, [EmbeddingSpec()], lambda rows, tokens: told.append((rows, tokens)))[0].vectors
    assert found is not None
    np.testing.assert_array_equal(found, quiet)
    assert len(told) > 1
    assert sum(rows for rows, _ in told) == 70
    assert all(tokens >= rows for rows, tokens in told)
    encoder.compute(texts[:3], [EmbeddingSpec()])
    assert sum(rows for rows, _ in told) == 70  # nobody listens any more


def test_a_model_of_words_alone_can_be_listened_to(tmp_path: Path, tiny: Any) -> None:
    """What goes into it has another form than what goes into a transformer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts  # type: ignore[attr-defined]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    words = parts.StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[words], device="cpu").save(str(tmp_path / "static"))
    encoder = TextEncoder(tmp_path / "static", torch.device("cpu"), token_budget=64)
    told: list[int] = []
    encoder.compute([Text("a word", "or two")] * 5, [EmbeddingSpec()], lambda rows, tokens: told.append(rows))
    assert sum(told) == 5
