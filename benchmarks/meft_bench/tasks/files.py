"""Data files of tasks: where they may lie, and their plain content."""

import gzip
import hashlib

from meft_bench.source import MissingError, Source


def read(source: Source, folder: str, name: str, instead: str) -> tuple[str, str]:
    """The text of `folder/name` in the data directory, plain or as .gz.

    Args:
        source: has the data directory, or is inside of it.
        folder: of the task.
        name: of the file, without .gz.
        instead: how else to come by the data, for the message.

    Returns:
        The text, and the sha256 of its bytes.

    Raises:
        MissingError: there is no such file.
    """
    root = source.data_dir
    places = () if root is None else (root / folder, root.parent / folder)
    for place in places:
        for file in (place / name, place / f"{name}.gz"):
            if file.is_file():
                content = file.read_bytes()
                if file.suffix == ".gz":
                    content = gzip.decompress(content)
                return content.decode(), hashlib.sha256(content).hexdigest()
    looked = f"{root} has no {folder}/{name}" if root else "no data directory was given"
    raise MissingError(
        f"no data: {looked}. Two ways to provide it: `--data DIR` with {folder}/{name},"
        f" plain or .gz; {instead}"
    )
