"""Digests of what a user gives: equal content, equal digest, wherever it is.

A file is read once as long as its size and its time of change stay the same.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meft_bench.shared.own import DIGEST_LENGTH

PIECE_BYTES = 1 << 20


def of_json(value: Any) -> str:
    """Return the digest of a JSON value, whatever its layout in a file."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def of_file(path: Path) -> str:
    """Return the sha256 of the bytes of a file."""
    found = path.stat()
    return _of_file(path, found.st_mtime_ns, found.st_size)


def of_files(root: Path, paths: Iterable[Path]) -> str:
    """Return the digest of some files, with their names relative to a folder."""
    return of_json({path.relative_to(root).as_posix(): of_file(path) for path in paths})


def value(beginning: str, name: str, digest: str) -> str:
    """Return what a cell holds: `peft:lora-3f2a91bc0d12`.

    Args:
        beginning: the kind, with its colon.
        name: a name from the content.
        digest: the digest of the content.
    """
    shown = "".join(c if c.isalnum() or c in "._" else "_" for c in name) or "_"
    return f"{beginning}{shown}-{digest[:DIGEST_LENGTH]}"


@functools.cache
def _of_file(path: Path, _changed_ns: int, _size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
