"""Check of a root of stores by its text alone, which is a path or a URL that fsspec knows."""

from __future__ import annotations

from dataflex.errors import ConfigError

LOCAL = ("file", "local")
"""Protocols that name a path of this machine."""
BUCKETS = {
    "s3": "dataflex[s3]", "s3a": "dataflex[s3]", "gs": "dataflex[gcs]", "gcs": "dataflex[gcs]",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
"""Protocol of URLs that begin with a bucket -> what to install for it."""


def malformed(root: str) -> str | None:
    """Say what is wrong with a URL; None for a path, and for a URL whose protocol fsspec lists."""
    protocol, separator, where = root.partition("://")
    if not separator:
        return None
    if not where.strip("/"):
        return f"found {root!r}; expected a URL with a bucket or folder, as {protocol or 's3'}://bucket/folder"
    if protocol not in LOCAL and _is_unknown(protocol):
        return f"found {root!r}; expected a path, or a URL that fsspec knows, as s3://bucket/folder"
    return None


def missing_package(root: str) -> str | None:
    """Say which package a well-formed URL needs and this environment lacks, or None."""
    protocol, separator, _ = root.partition("://")
    if not separator or protocol in LOCAL:
        return None
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = BUCKETS.get(protocol, "")
        advice = f"\n  pip install '{package}', or name another root (dataflex.store)" if package else ""
        return f"{root} cannot be reached from here: {error}{advice}"
    return None


def refuse_unreachable(root: str) -> None:
    """Refuse a root that no store can be in.

    Raises:
        ConfigError: it is malformed, or a package is missing.
    """
    if text := malformed(root) or missing_package(root):
        raise ConfigError(f"root of the stores: {text}")


def _is_unknown(protocol: str) -> bool:
    import fsspec  # 0.1 s, needed for URLs alone

    return protocol not in fsspec.available_protocols()
