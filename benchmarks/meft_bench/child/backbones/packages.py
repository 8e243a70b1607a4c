"""Real weights that installed packages contain.

The packages' own code requires libraries that the harness does not need, so the files
are found through the packages' metadata and the packages are never imported. Each
contains one known file.
"""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from meft_bench.child.backbones.files import Files, three_ways
from meft_bench.shared.registry import PACKAGED_BACKBONES
from meft_bench.shared.source import MissingError


@dataclass(frozen=True, kw_only=True, slots=True)
class Packaged:
    """Description of the weights in a package."""

    file: str
    """Name of the file, in any folder of the package."""
    sha256: str
    """SHA-256 of the file."""
    origin: str = "package {package}"
    """Readable description of the weights."""
    requirements: str
    """File that pins the version of the package."""


PACKAGED = {
    "minilm-l6": Packaged(
        file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        requirements="benchmarks/requirements-data.txt",
    ),
    "smollm2-135m": Packaged(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin=(
            "SmolLM2-135M-Instruct, package {package}, 4-bit (Q4_1) de-quantised to "
            "float32"
        ),
        requirements="benchmarks/requirements-llm.txt",
    ),
}
"""The contents of each of `PACKAGED_BACKBONES`."""


def find(backbone: str) -> Files:
    """Find the files of a packaged backbone.

    Raises:
        MissingError: the package is not installed, or its weights are missing.
        ValueError: the weights are not those that were tested.
    """
    package, known = PACKAGED_BACKBONES[backbone], PACKAGED[backbone]
    try:
        version = importlib.metadata.version(package)
        contents = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        problem = f"package {package} is not installed"
        raise MissingError(three_ways(problem)) from None
    weights = [Path(str(f.locate())) for f in contents if f.name == known.file]
    if not weights or not weights[0].is_file():
        raise MissingError(three_ways(f"package {package} has no {known.file}"))
    files = Files(
        directory=weights[0].parent,
        weights=(weights[0],),
        origin=known.origin.format(package=f"{package} {version}"),
    )
    if files.sha256() != known.sha256:
        raise ValueError(
            f"{known.file} of package {package} has sha256 {files.sha256()}, expected "
            f"{known.sha256}: reinstall it from {known.requirements}"
        )
    return files
