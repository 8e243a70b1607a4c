"""The files of a directory of saved adapters.

`adapters.safetensors` contains every trainable parameter and the buffers that belong to
them, under their names in the model. `adapters.json` identifies the model they belong
to: the configs of our methods, the fields of the backbone's config that define its
function, and digests of all values of the backbone and of the saved tensors. Next to a
whole model written by `save_pretrained()`, the rows of sparse adapters are in the
model's file only.
"""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME as MODEL

from meft.errors import AdapterFileError

WEIGHTS, CONFIG = "adapters.safetensors", "adapters.json"
FORMAT_VERSION = 4
"""Versions 1 to 3, used in development, had digests of only some of the values, or
other names in the config.
"""
IN_MODEL = "in_model_file"
"""Key of the config: names of tensors in transformers' file of the whole model."""


def read_config(directory: Path) -> dict[str, Any]:
    """Return the contents of the config file.

    Raises:
        AdapterFileError: there is none, or it is damaged or of another format version.
    """
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(
            f"no saved adapters in {directory}: {CONFIG} cannot be read "
            f"({error.strerror}); expected a directory written by `save_adapters()` or "
            f"by a converted model's `save_pretrained()`{_nearby(directory)}"
        ) from None
    except ValueError as error:
        raise AdapterFileError(f"{path} is not valid JSON: {error}") from None
    version = config.get("format_version") if isinstance(config, dict) else None
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} is of format version {version!r}, but this release of meft reads "
            f"version {FORMAT_VERSION}. Load it with the release that wrote it, and "
            "bring the model's `state_dict()` into a model that this release converted"
        )
    return cast(dict[str, Any], config)


def _nearby(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    return f". There are some in {', '.join(found)} inside it" if found else ""


def read_weights(directory: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return the saved tensors, wherever they are in the directory.

    Raises:
        AdapterFileError: a file is missing or damaged.
    """
    path, why = directory / WEIGHTS, ""
    try:
        found = load_file(path)
        elsewhere = model_files(directory) if config.get(IN_MODEL) else {}
        for name in config.get(IN_MODEL, ()):
            why = (
                ". `save_pretrained` writes the rows of sparse adapters into the "
                "model's file only: keep the directory whole, or save with "
                "`meft.save_adapters`"
            )
            path = elsewhere.get(name, directory / MODEL)
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}{why}") from None
    return found


def model_files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor that the last `save_pretrained()` wrote there."""
    whole, index = directory / MODEL, directory / f"{MODEL}.index.json"
    found = [path for path in (whole, index) if path.exists()]
    if not found:
        return {}
    # Either may be left over from an earlier save.
    if max(found, key=lambda path: path.stat().st_mtime_ns) == index:
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    with safe_open(whole, "pt") as file:
        return dict.fromkeys(file.keys(), whole)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file and rename it. Permissions follow the umask."""
    # `tempfile` is not used, because its files are private; those of safetensors are,
    # too.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        write(temporary)
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{path} could not be written: {error}") from None
        raise
