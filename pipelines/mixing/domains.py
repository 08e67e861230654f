"""The domains of a run: its datasets by name, and the rows of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from dataflex.errors import ConfigError
from dataflex.mixers.base import Domains
from dataflex.rows import Rows


class MixtureManager:
    """The domains as a mixer of the classic interface knows them.

    Attributes:
        names: of the domains, in order.
        sizes: rows of each.
        initial_proportions: as the run begins.
    """

    def __init__(self, dataset: Any, domains: Domains, members: list[np.ndarray], initial: np.ndarray):
        self._dataset, self._members = dataset, members
        self.names, self.sizes, self.initial_proportions = list(domains.names), domains.rows.tolist(), initial.tolist()

    @property
    def sources(self) -> dict[str, Any]:
        """Processed rows by domain."""
        return {n: self._dataset.select(m) for n, m in zip(self.names, self._members, strict=True)}


def domains_of(rows: Rows, names: Sequence[str], unit: Literal["rows", "tokens"]) -> tuple[list[np.ndarray], Domains]:
    """Return the rows of each domain that have something to learn from, and the domains.

    Args:
        rows: training rows.
        names: of the training datasets, in order.
        unit: of the proportions.

    Raises:
        ConfigError: a domain has none, or a tokenized dataset does not tell which row came from which.
    """
    if unknown := [name for name in names if name not in rows.names]:
        raise ConfigError(
            f"tokenized_path: a tokenized dataset does not tell which rows are of {', '.join(unknown)}; remove the key"
        )
    numbers = [rows.names.index(name) for name in names]
    members = [np.flatnonzero((rows.dataset == number) & (rows.supervised > 0)) for number in numbers]
    if empty := [name for name, found in zip(names, members, strict=True) if not len(found)]:
        raise ConfigError(
            f"dataset: found no row with a supervised token in {', '.join(empty)}; check the data, template, "
            "cutoff_len and dataflex.exclude_targets, or leave it out"
        )
    counts = np.array([len(found) for found in members], np.int64)
    tokens = np.array([rows.supervised[found].sum() for found in members], np.int64)
    return members, Domains(tuple(names), counts, tokens, unit)
