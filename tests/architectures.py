"""Small models of the architectures that gradients are checked on, rows for them, and the engine's whole gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dataflex.features.engine import FeatureEngine
from dataflex.features.spec import FeatureValues, GradientSpec, Projection

VOCAB = 61


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


WHOLE = GradientSpec(projection=Projection(type="identity"))


def lora(model: Any, **config: Any) -> Any:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear", **config}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide mistakes in A
            nn.init.normal_(parameter, std=0.2)
    return model


def llama(**config: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config))


def gpt2() -> GPT2LMHeadModel:
    config: dict[str, Any] = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**config))


def opt() -> OPTForCausalLM:
    config: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config |= {"hidden_size": 24, "word_embed_proj_dim": 24, "ffn_dim": 40, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**config))


def mixtral(**config: Any) -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SMALL, **{"num_local_experts": 4, **config}))


def bias_only(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def saved(modules: list[str], more: int = 0, **config: Any) -> Any:
    """LoRA beside whole modules that are trained, of a model with `more` new tokens."""
    model = llama(**config)
    model.resize_token_embeddings(VOCAB + more, mean_resizing=False)
    return lora(model, target_modules=["q_proj", "down_proj"], modules_to_save=modules)


MODELS = {
    "llama_lora": lambda: lora(llama()),
    "llama_lora_bias": lambda: lora(llama(attention_bias=True), lora_bias=True),
    "llama_lora_and_biases": lambda: lora(llama(attention_bias=True), bias="all"),
    "llama_rslora": lambda: lora(llama(), use_rslora=True),
    "llama_modules_to_save": lambda: lora(llama(), target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]),
    # what LLaMA-Factory's additional_target becomes, and what it sets itself for new tokens
    "llama_tied_saved_embedding": lambda: saved(["embed_tokens"], tie_word_embeddings=True),
    "llama_tied_saved_both": lambda: saved(["embed_tokens", "lm_head"], tie_word_embeddings=True),
    "llama_resized_saved_both": lambda: saved(["embed_tokens", "lm_head"], more=3),
    "llama_full_tied": lambda: llama(tie_word_embeddings=True),
    "qwen2_lora": lambda: lora(Qwen2ForCausalLM(Qwen2Config(**SMALL))),
    "qwen2_full": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3_full": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gpt2_lora": lambda: lora(gpt2(), target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    "gpt2_full": gpt2,
    "gpt2_biases": lambda: bias_only(gpt2()),
    "opt_lora": lambda: lora(opt(), target_modules=["q_proj", "v_proj"]),
    "mixtral_lora": lambda: lora(mixtral(), target_modules=["q_proj", "o_proj"]),
}


def rows() -> list[dict[str, list[int]]]:
    """Rows of 2 to 17 tokens: all supervised, none of the prompt, only the last, and holes in between."""
    random, found = np.random.default_rng(0), []
    for length, masked in [(9, 0), (2, 1), (17, 8), (12, 11), (9, 3), (5, 0), (17, 2), (11, 0)]:
        tokens = random.integers(0, VOCAB, length)
        labels = tokens.copy()
        labels[:masked] = -100
        labels[3::4] = -100 if length > 10 and masked < 10 else labels[3::4]
        found.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return found


def build(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def gradients(model: Any, examples: list[dict[str, list[int]]], **settings: Any) -> np.ndarray:
    (values,) = FeatureEngine(model, pad_token_id=0, **settings).compute(examples, [WHOLE])
    return vectors(values)


def vectors(values: FeatureValues) -> np.ndarray:
    assert values.vectors is not None
    assert not values.status.any()
    return values.vectors
