"""Where a dataset comes from, as `dataset_info.json` says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory.data.parser import get_dataset_list

from dataflex.errors import ConfigError, DataflexError
from dataflex.explanation import explained, shown
from dataflex.llamafactory import data_file
from dataflex.llamafactory.columns import odd_record


@dataclass(frozen=True)
class Place:
    """Where a dataset comes from.

    Attributes:
        name: the dataset's name in the run file.
        where: path of its file or folder, or its place on the Hub or in a cloud.
        is_file: whether `where` is a path.
        attributes: LLaMA-Factory's, of the dataset.
    """

    name: str
    where: str
    is_file: bool
    attributes: Any

    def __str__(self) -> str:
        return f"dataset {self.name} ({self.where})"

    def check(self) -> None:
        """Look at the file before it is loaded.

        Raises:
            DataflexError: it cannot be loaded, and the loader would not say so.
        """
        if self.is_file and (found := data_file.unsafe(self.where)) is not None:
            raise DataflexError(f"{self}: {found}")

    def about(self, index: int, record: Mapping[str, Any]) -> str:
        """Say which record this is, what is odd about it, and how it begins."""
        odd = odd_record(record, self.attributes) or "found a record that cannot be used"
        return f"{self}, record {index}: {odd}\n  The record: {shown(record)}"

    def fault(self) -> str | None:
        """Return what is wrong with the file; None if nothing is seen."""
        return data_file.fault(self.where) if self.is_file else None


def place_of(name: str, dataset_dir: str) -> Place:
    """Look a dataset up as LLaMA-Factory does.

    Args:
        name: the dataset.
        dataset_dir: LLaMA-Factory's argument: a folder, `ONLINE`, or `REMOTE:` and a repository.

    Raises:
        ConfigError: it is not registered, or not so that it can be loaded.
        UnavailableError: the registration lies on a server that does not answer.
    """
    with explained(f"dataset {name} ({dataset_dir}, dataset_info.json)", refusal=ConfigError):
        attributes = get_dataset_list([name], dataset_dir)[0]
    where = str(attributes.dataset_name)
    if attributes.load_from == "file":
        return Place(name, os.path.join(dataset_dir, where), True, attributes)
    return Place(name, f"{attributes.load_from} {where}", False, attributes)
