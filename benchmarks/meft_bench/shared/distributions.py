"""Versions of installed distributions."""

import importlib.metadata


def installed(name: str) -> str | None:
    """Return the version of a distribution, or None, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
