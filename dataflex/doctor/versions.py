"""Versions of installed distributions: whether they meet each other's requirements, and the CUDA of their wheels."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

from dataflex.doctor.finding import TESTED, Finding

ROOT = "dataflex"


def version_of(distribution: str) -> str | None:
    """Return the installed version; None where there is none, or its metadata is broken."""
    try:
        return metadata.version(distribution) or None
    except metadata.PackageNotFoundError:
        return None


def disagreements() -> Iterator[Finding]:
    """Yield a warning for each requirement that is not met, of DataFlex and of all that it requires, directly or not.

    Warnings, since declared bounds are often narrower than the truth; whether a run works, `imports` tells. Of
    DataFlex's own extras, those packages count that are installed.
    """
    if version_of(ROOT) is None:
        yield Finding("warning", ROOT, "is not installed as a package, so what it requires is not known", TESTED)
    waiting: list[tuple[str, frozenset[str]]] = [(ROOT, frozenset())]
    seen = set(waiting)
    while waiting:
        name, extras = waiting.pop()
        for requirement in _requirements(name, extras):
            found = version_of(requirement.name)
            if not _is_met(requirement, found):
                wanted = f"{name} {version_of(name)} requires {requirement.name}{requirement.specifier}"
                yield Finding("warning", requirement.name, f"{wanted}; found {found or 'none'}", TESTED)
            following = (canonicalize_name(requirement.name), frozenset(requirement.extras))
            if found and following not in seen:
                seen.add(following)
                waiting.append(following)


def _requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield what a distribution requires here; of DataFlex's extras, what is installed."""
    try:
        about = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return
    optional = set(about.metadata.get_all("Provides-Extra") or ()) if name == ROOT else set()
    for text in about.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:  # of a distribution made long ago; pip reads past it as well
            continue
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement
        elif any(marker.evaluate({"extra": extra}) for extra in optional) and version_of(requirement.name):
            yield requirement


def _is_met(requirement: Requirement, found: str | None) -> bool:
    if found is None:
        return False
    try:
        return requirement.specifier.contains(found, prereleases=True)
    except InvalidVersion:
        return False


def cuda_of(package: str) -> str | None:
    """Return what a wheel of torch's family was made for, such as "cu130" or "cpu", from its `version.py`, unimported.

    Returns:
        None where the package is absent or does not say.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"__version__\s*=\s*['\"][^'\"+]*\+(\w+)", text)
    return found[1] if found else None


def owners(module: str) -> list[str]:
    """Return the distributions that a module comes from; they say so themselves."""
    return sorted(set(metadata.packages_distributions().get(module, ())))


def side_by_side() -> Finding | None:
    """Return an error if several distributions own the module `faiss`, a warning if none does."""
    found = owners("faiss")
    if len(found) > 1:
        both = " and ".join(f"{name} {version_of(name)}" for name in found)
        advice = f"`pip uninstall {' '.join(found)}`, then install one: `pip install {found[0]}`"
        return Finding("error", "faiss", f"{both} are both installed and overwrite each other's files", advice)
    if not found:
        advice = "`pip install faiss-cpu`, or faiss-gpu on Linux with an NVIDIA GPU"
        return Finding("warning", "faiss", "not installed; searches for nearest rows need it", advice)
    return None
