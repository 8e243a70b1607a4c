"""Which distributions are installed."""

import importlib.metadata


def installed(name: str) -> str | None:
    """The version of a distribution, or None; nothing of it is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
