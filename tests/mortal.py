"""Files whose owner dies at a given operation: every crash that a store, a state or a removal has to outlive.

The operations of `LocalFiles` are overridden where they touch the disk, as a crash strikes between any two of these.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from dataflex.stores.files import LocalFiles


class Killed(BaseException):
    """The process is gone; nothing that it would still do happens."""


class Mortal(LocalFiles):
    """Files whose owner dies at the operation that comes `left`-th, and can do nothing afterwards, not even clean up.

    Nothing is synced: the kernel outlives the process.
    """

    def __init__(self, root: str | os.PathLike[str], left: int = 10**9):
        super().__init__(root)
        self.left = left

    def step(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Killed

    def _create(self, path: Path) -> BinaryIO:
        self.step()
        return super()._create(path)

    def _sync(self, file: BinaryIO) -> None:
        self.step()
        file.flush()

    def _sync_folder(self, folder: Path) -> None:
        self.step()

    def _link(self, temporary: Path, path: Path) -> bool:
        self.step()
        return super()._link(temporary, path)

    def _replace(self, temporary: Path, path: Path) -> None:
        self.step()
        super()._replace(temporary, path)

    def _unlink(self, path: Path) -> None:
        self.step()
        super()._unlink(path)

    def prune(self, folder: str) -> None:
        self.step()
        super().prune(folder)
