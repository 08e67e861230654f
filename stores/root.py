"""A root: a folder or URL with one store per recipe, and the kept model states."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dataflex.errors import ConfigError, ConflictError, CorruptionError, MismatchError, UnavailableError
from dataflex.fingerprint import difference, digest
from dataflex.stores.files import Files, LocalFiles
from dataflex.stores.parquet import ParquetStore
from dataflex.stores.part_cache import part_cache
from dataflex.stores.record import claim, find_record, read_records
from dataflex.stores.remote_files import RemoteFiles
from dataflex.stores.states import StateStore
from dataflex.stores.urls import LOCAL, refuse_unreachable
from dataflex.stores.values import Layout

_log = logging.getLogger(__name__)
_LIBRARIES = ("dataflex", "llamafactory", "numpy", "peft", "pyarrow", "torch", "transformers")
NAME = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{32}")
"""What a store's folder is called: its kind and the digest of its recipe."""
REMOVING = "removing.json"
"""Lies in a store's folder from the moment that its removal begins until nothing of it is left."""


def open_files(root: str | os.PathLike[str]) -> Files:
    """Return the files under a local folder or an fsspec URL.

    Raises:
        ConfigError: no such URL can be reached.
    """
    url = os.fspath(root)
    refuse_unreachable(url)
    protocol, separator, path = url.partition("://")
    if separator and protocol not in LOCAL:
        files = RemoteFiles(url)
        files.cache = part_cache()
        return files
    return LocalFiles(path if separator else url)


def existing_files(root: str | os.PathLike[str], named_by: str | None) -> Files:
    """Return the files under a root that is looked at, not written to.

    Args:
        root: a local folder or an fsspec URL.
        named_by: option or variable that named it, for the error; None for the default root, which need not exist yet.

    Raises:
        ConfigError: it is named and not there.
    """
    files = open_files(root)
    if named_by is not None and not files.exists():
        what = "nothing" if "://" in files.url else "a file" if os.path.lexists(files.url) else "no such folder"
        raise ConfigError(f"{named_by}: found {what} at {files.url}; expected a root of stores; check the spelling")
    return files


def refuse_unusable(root: str | os.PathLike[str], seconds: float = 10.0) -> None:
    """Refuse a root that no store can be in. One on an object store is listed, for a bounded time; nothing is written.

    Raises:
        ConfigError: it is malformed, a package, the bucket or the right to list it is missing.
        UnavailableError: the server does not answer within that time.
    """
    files = open_files(root)
    if not isinstance(files, RemoteFiles):
        return
    files.patience = seconds / 3  # so that most of what is wrong has been said by then
    faults: list[BaseException] = []

    def look() -> None:
        try:
            files.exists()
        except BaseException as error:
            faults.append(error)

    # Clients wait for a connection, for an answer, for credentials of a machine, each with time limits of its own.
    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(seconds)
    if looking.is_alive():
        raise UnavailableError(
            f"{files.url}: no answer within {seconds:.0f} s\n  see that the server runs and that the address is right "
            "(dataflex.store, its endpoint), and that this machine has a network"
        )
    for error in faults:
        raise error


class StoreRoot:
    """Stores under one root.

    Args:
        root: a local folder, an fsspec URL, or files opened already.
    """

    def __init__(self, root: str | os.PathLike[str] | Files):
        self.files = root if isinstance(root, Files) else open_files(root)
        self.states = StateStore(self.files)

    def open(self, kind: str, recipe: Mapping[str, Any], layout: Layout) -> ParquetStore:
        """Return the store of a recipe, created if there is none.

        Raises:
            MismatchError: the store there keeps other columns or another storage type, or a newer DataFlex wrote it.
            ConflictError: it is being removed.
        """
        folder = folder_name(kind, recipe)
        self._refuse_removal(folder)  # first: of a store that is found after this, a removal will see who uses it
        document = find_record(self.files, folder, "recipe")
        if document is None:
            body = {"kind": kind, "recipe": recipe, "layout": layout.plain(), "libraries": libraries()}
            document, _ = claim(self.files, folder, "recipe", body)
        store = recorded_store(self.files, folder, document)
        if store.layout != layout:
            fields = "; ".join(difference(layout.plain(), store.layout.plain()))
            raise MismatchError(
                f"{store.path} keeps other columns than this run asks for (store → run: {fields}); change the run "
                "or use another root"
            )
        return store

    def find(self, kind: str, recipe: Mapping[str, Any]) -> ParquetStore | None:
        """Return the store of a recipe, or None; writes nothing.

        Raises:
            MismatchError: a newer DataFlex wrote it.
        """
        folder = folder_name(kind, recipe)
        document = find_record(self.files, folder, "recipe")
        return None if document is None else recorded_store(self.files, folder, document)

    def stores(self) -> list[ParquetStore]:
        """Return all stores, sorted by name; those whose recipe cannot be read are logged and left out."""
        found = []
        folders = [folder for folder in self.files.names("") if NAME.fullmatch(folder)]
        documents = read_records(self.files, [f"{folder}/recipe.json" for folder in folders])
        for folder, document in zip(folders, documents, strict=True):
            try:
                if not isinstance(document, dict):  # another may stand for one that is damaged or gone
                    document = find_record(self.files, folder, "recipe")
                if document is not None:
                    found.append(recorded_store(self.files, folder, document))
            except (CorruptionError, MismatchError) as error:
                _log.warning("%s; left out", error)
        return found

    def nearest(self, kind: str, recipe: Mapping[str, Any]) -> tuple[ParquetStore, list[str]] | None:
        """Return the store of this kind whose recipe differs least, and the fields that differ, `path: store → run`."""
        found = [(store, difference(recipe, store.recipe)) for store in self.stores() if store.kind == kind]
        return min(found, key=lambda pair: len(pair[1]), default=None)

    def _refuse_removal(self, folder: str) -> None:
        try:
            self.files.read(f"{folder}/{REMOVING}", 1)
        except FileNotFoundError:
            return
        raise ConflictError(
            f"{self.files.name(folder)} is being removed by `dataflex store gc`; run again when that is done. If it "
            "was interrupted, `dataflex store gc --leftovers --grace 0 --delete` finishes it"
        )


def open_store(path: str | os.PathLike[str]) -> ParquetStore:
    """Return a store pinned by its own path; whether its recipe is the one wanted is the caller's question.

    Raises:
        MismatchError: there is no store, or a newer DataFlex wrote it.
        CorruptionError: its recipe is damaged.
    """
    root, _, folder = os.fspath(path).rstrip("/").rpartition("/")
    files = open_files(root or ".")
    document = find_record(files, folder, "recipe")
    if document is None:
        raise MismatchError(f"{files.name(folder)} holds no intact recipe.json: it is no store")
    return recorded_store(files, folder, document, check_name=False)


def folder_name(kind: str, recipe: Mapping[str, Any]) -> str:
    """Return the name of the folder that the store of a recipe has in every root.

    Raises:
        MismatchError: the kind cannot be part of a name.
    """
    folder = f"{kind}-{digest(recipe)}"
    if not NAME.fullmatch(folder):
        raise MismatchError(f"a store cannot be of kind {kind!r}: use small letters, digits and _")
    return folder


def recorded_store(files: Files, folder: str, document: dict[str, Any], check_name: bool = True) -> ParquetStore:
    """Return the store that a recipe's document describes.

    Raises:
        CorruptionError: it is no recipe, or another than the folder is named after.
        MismatchError: it keeps values of a type that DataFlex does not have (yet), or its gradients were projected in a
            way that DataFlex no longer has.
    """
    where = files.name(f"{folder}/recipe.json")
    try:
        store = ParquetStore(files, folder, document)
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{where} is no recipe: {error!r}") from error
    except MismatchError as error:  # the document is whole, so somebody meant it
        raise MismatchError(f"{where}: {error}; was it written by a newer DataFlex? Read it with that") from error
    if check_name and folder != folder_name(store.kind, store.recipe):
        raise CorruptionError(
            f"{where} holds another recipe than its folder is named after; was the folder renamed? Call it "
            f"{folder_name(store.kind, store.recipe)} again, or remove it"
        )
    match store.recipe:
        case {"feature": {"projection": {"type": "normal" | "factorized" as name}}}:
            raise MismatchError(
                f"{where} is of gradients under the projection {name}, which was taken out of DataFlex; expected sjlt "
                "or rademacher. Compute them anew under one of these; `dataflex store gc` makes room"
            )
    return store


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that values may depend on."""
    return versions(_LIBRARIES)


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of the libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
