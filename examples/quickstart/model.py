"""A tiny Qwen2 model and its tokenizer: made from random weights, then taught the shape of the tasks.

Legend: B blocks per step, T tokens per block.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

logger = logging.getLogger(__name__)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
POSITIONS = 512


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with single digits and the special tokens of the ChatML templates.

    LLaMA-Factory's `template: qwen3_nothink` then adds no token to the vocabulary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        model_max_length=POSITIONS,
        padding_side="right",
        chat_template=CHATML,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int) -> Qwen2ForCausalLM:
    """Return a randomly initialised float32 model with tied embeddings; sets torch's global seed."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**shape))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, max_new_tokens=96
    )
    return model


def pretrain(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[str],
    *,
    steps: int,
    batch: int = 8,
    block: int = 256,
    rate: float = 4e-3,
    seed: int = 0,
) -> float:
    """Train on all tokens of the shuffled conversations, in blocks; return the mean loss of the last 20 steps (nats).

    Args:
        model: changed in place.
        tokenizer: the model's.
        conversations: whole ChatML texts; repeated when `steps` need more than there are.
        steps: optimizer steps of (batch, block) tokens: B = batch, T = block.
        batch: blocks per step.
        block: tokens per block.
        rate: peak learning rate of AdamW; warmed up over 5 % and brought linearly to zero.
        seed: order of the conversations.
    """
    rng = random.Random(seed)
    ids: list[int] = []
    encoded = tokenizer(list(conversations), add_special_tokens=False)["input_ids"]
    while len(ids) < steps * batch * block:
        ids += [token for text in rng.sample(encoded, len(encoded)) for token in text]
    blocks = torch.tensor(ids[: steps * batch * block]).view(steps, batch, block)  # (steps, B, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 1 - step / steps, 1.0)
    )
    losses = []
    model.train()
    for step, input_ids in enumerate(blocks, start=1):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 50 == 0:
            logger.info("pre-training step %d of %d, loss %.3f", step, steps, sum(losses[-50:]) / 50)
    model.eval()
    tail = losses[-20:]
    return sum(tail) / len(tail)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights (float32 safetensors), configurations and tokenizer as one Hugging Face model folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
