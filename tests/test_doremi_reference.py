"""A reference, stored or live, gives the losses that plain loops give; an unsuitable one is refused at the start."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.errors import ConfigError, MismatchError
from dataflex.pipelines.mixing.reference_losses import check_reference
from tests.doremi import DOMAINS, Seen, alphas, history, outcome, proxy, token_losses, write
from tests.workspace import in_force


def test_featurize_computes_the_references_losses_of_every_row(proxies: Any) -> None:
    summary = json.loads((proxies.folder / "out" / "proxy" / "dataflex_featurize.json").read_text("utf-8"))
    assert (summary["computed"], summary["rows"], summary["gradients"]) == (24, 24, 0)


def test_a_live_reference_equals_the_stored_one(proxies: Any) -> None:
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    proxies.run("train", proxy(proxies, "stored", keys))
    summary = proxies.run("train", proxy(proxies, "live", keys, reference="live"))
    assert (summary["computed"], summary["reused"]) == (0, 0)
    np.testing.assert_allclose(history(proxies, "live"), history(proxies, "stored"), rtol=1e-6)
    stored, live = proxies.weights("stored"), proxies.weights("live")
    for name in stored:
        torch.testing.assert_close(live[name], stored[name], rtol=0, atol=2e-5)  # Adam moved by up to 4e-3


@pytest.mark.parametrize("reference", ["stored", pytest.param("live", marks=pytest.mark.slow)])
def test_odm_is_rewarded_by_what_the_reference_could_learn(proxies: Any, seen: Seen, reference: str) -> None:
    """At every step, for the rows of that step; what is stored is read, and the training forward is the only one."""
    out = str(proxies.folder / "out" / "reference")
    params = {"reference_model_path": out, "reference": reference}
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = write(proxies, f"odm-{reference}", component_name="odm", params=params, **keys)
    summary = proxies.run("train", run)
    assert (summary["computed"], summary["reused"]) == (0, 24 if reference == "stored" else 0)
    by_token = token_losses(proxies.folder / "out" / "reference")
    found = [line for line in in_force(proxies, f"odm-{reference}") if line["step"]]
    assert len(found) == 3
    for step, line in enumerate(found):
        excess: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
        for call, domain, tokens, losses in seen.rows:
            if call // 2 == step:
                excess[DOMAINS[domain]] += [max(a - b, 0.0) for a, b in zip(losses, by_token(tokens), strict=True)]
        expected = {d: math.exp(sum(e) / len(e)) if e else None for d, e in excess.items()}
        assert line["rewards"] == {d: None if e is None else pytest.approx(e, rel=1e-5) for d, e in expected.items()}
    assert any(loss > 1.01 for loss in found[-1]["rewards"].values() if loss)


@pytest.mark.slow
def test_an_adapter_is_a_live_reference(proxies: Any, seen: Seen) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(proxies.tiny.model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = proxies.folder / "adapter"
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(proxies.tiny.model).save_pretrained(folder)
    merged = proxies.folder / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    keys = {"train_step": 2}
    proxies.run("train", proxy(proxies, "beside", keys, reference_model_path=str(folder), reference="live"))
    expected = alphas(seen, token_losses(merged), 1)
    np.testing.assert_allclose(history(proxies, "beside"), expected, rtol=1e-5)
    assert np.ptp(expected[1]) > 1e-3


@pytest.mark.parametrize("reference", ["stored", pytest.param("live", marks=pytest.mark.slow)])
def test_what_the_reference_has_no_loss_of_is_left_out(proxies: Any, seen: Seen, reference: str) -> None:
    """NaN for one word: a row with it has no stored losses; live, its tokens from that one on have none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(proxies.tiny.model)
    model: Any = AutoModelForCausalLM.from_pretrained(proxies.tiny.model, tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.detach().clone()
    base, broken = proxies.folder / f"untied-{reference}", proxies.folder / f"broken-{reference}"
    for folder in (base, broken):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer("+")["input_ids"]] = torch.nan
            model.lm_head.weight *= 0.5
    run = proxy(
        proxies,
        f"nan-{reference}",
        {"model_name_or_path": str(base), "train_step": 3},
        reference_model_path=str(broken),
        reference=reference,
    )
    proxies.run("train", run, "dataflex.nonfinite_limit=1.0")
    by_token = token_losses(broken)

    def by_row(tokens: Sequence[int]) -> list[float]:
        found = by_token(tokens)
        return found if np.isfinite(found).all() else [math.nan] * len(found)

    expected = alphas(seen, by_row if reference == "stored" else by_token, 1)
    assert np.isfinite(expected).all()
    assert np.ptp(expected[-1]) > 1e-3
    np.testing.assert_allclose(history(proxies, f"nan-{reference}"), expected, rtol=1e-5)
    np.testing.assert_allclose(outcome(proxies, f"nan-{reference}"), np.mean(expected[1:], axis=0), rtol=1e-5)
    assert any(not np.isfinite(by_token(tokens)).all() for _, _, tokens, _ in seen.rows)


def test_an_unsuitable_reference_is_an_error_at_the_start(proxies: Any, seen: Seen) -> None:
    from transformers import AutoTokenizer

    from examples.quickstart.model import new_model, save, train_tokenizer

    with pytest.raises(ConfigError, match=r"reference_model_path.*a folder that exists"):
        proxies.run("train", proxy(proxies, "none", reference_model_path=str(proxies.folder / "nowhere")))
    with pytest.raises(ConfigError, match=r"reference_model_path"):
        proxies.run("train", write(proxies, "none", component_name="doremi"))
    other, wide = proxies.folder / "other", proxies.folder / "wide"
    tokenizer: Any = train_tokenizer(["zebra zebra quagga"] * 3, 300)
    save(new_model(tokenizer, hidden=64, layers=2, seed=0), tokenizer, other)
    for reference in ("stored", "live"):
        with pytest.raises(MismatchError, match=r"of the run's \d+ tokens are others"):
            proxies.run("train", proxy(proxies, "none", reference_model_path=str(other), reference=reference))
    tokenizer = AutoTokenizer.from_pretrained(proxies.tiny.model)
    save(new_model(tokenizer, hidden=32, layers=1, seed=0), tokenizer, wide)
    with pytest.raises(MismatchError, match="its weights are not those of this run"):
        proxies.run("train", proxy(proxies, "none", reference_model_path=str(wide)))
    weights = wide / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(
        MismatchError, match=r"model.safetensors: cannot be read .*expected the weights of a checkpoint"
    ):
        proxies.run("train", proxy(proxies, "none", reference_model_path=str(wide)))
    weights.unlink()
    with pytest.raises(MismatchError, match="found neither adapter_model"):
        proxies.run("train", proxy(proxies, "none", reference_model_path=str(wide)))
    assert not seen.trained
    (wide / "tokenizer_config.json").unlink()

    def check(path: Path) -> None:
        method = SimpleNamespace(reference_model_path=str(path))
        trainer = SimpleNamespace(processing_class=tokenizer)
        run: Any = SimpleNamespace(
            methods=[method], trainer=trainer, state=SimpleNamespace(require_whole=lambda path: None)
        )
        check_reference(run)

    check(proxies.tiny.model)
    with pytest.raises(MismatchError, match="found no tokenizer"):
        check(wide)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(MismatchError, match="<new>"):
        check(proxies.tiny.model)
