"""Random numbers as a pure function of (seed, role, name, counter): the same in any order, block size or device.

A stream is a SplitMix64 sequence whose start is a digest of (seed, role, name); a word of it is found by its counter
alone. All arithmetic is on 64-bit integers, so CPU and GPU agree to the last bit.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import torch
from torch import Tensor

from dataflex.fingerprint import canonical

CHUNK = 1 << 22
"""Entries to make at a time: 32 MiB of words."""
# With these in a name, the same weights under DDP, torch.compile or another adapter would be projected otherwise.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_ADAPTER = re.compile(r"\.(lora_[AB]|modules_to_save)\.[^.]+(?=\.)")


def canonical_name(name: str) -> str:
    """Return a parameter's name without what wrappers add: DDP, compile and PEFT prefixes, adapter name, `base_layer`.

    `base_model.model.model.layers.0.q_proj.lora_A.default.weight` is `model.layers.0.q_proj.lora_A.weight`, so an
    adapter loaded under another name is projected by the same matrix.
    """
    bare = _WRAPPERS.sub("", name).replace("._orig_mod.", ".").replace(".base_layer.", ".")
    return _ADAPTER.sub(r".\1", bare)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


@lru_cache(maxsize=65536)
def stream(seed: int, role: str, name: str) -> int:
    """Return the start of the stream of (seed, role, name), as a signed 64-bit integer."""
    raw = hashlib.blake2b(canonical([seed, role, name]), digest_size=8, person=b"dataflex-rand-v1").digest()
    return int.from_bytes(raw, "little", signed=True)


def words(start: int, counters: Tensor) -> Tensor:
    """Return the 64-bit words of a stream at `counters` (int64, any shape), as signed integers.

    `>>` on int64 keeps the sign, hence the masks: they make it the logical shift that SplitMix64 asks for.
    """
    z = (counters + 1) * _GOLDEN + start
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX_1
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX_2
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def upper(word: Tensor) -> Tensor:
    """Return the upper 32 bits of each word, as an int64 in [0, 2^32)."""
    return (word >> 32) & 0xFFFFFFFF


def order(start: int, size: int, device: torch.device) -> Tensor:
    """Return a random permutation of `size` positions (int64)."""
    # Not `torch.randperm`: torch does not promise the same numbers on a CPU and a GPU, whatever the seed.
    return torch.argsort(words(start, torch.arange(size, device=device)), stable=True)
