"""The files of a directory of saved adapters.

`adapters.safetensors` contains every trainable parameter and the buffers that belong to
them, under their names in the model. `adapters.json` identifies the model they belong
to: the configs of our methods, the fields of the backbone's config that define its
function, and digests of all values of the backbone and of the saved tensors. After
`save_pretrained()` the tensors are in the model's file, `model.safetensors`, alone.
"""

import json
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from meft.errors import AdapterFileError

WEIGHTS, CONFIG = "adapters.safetensors", "adapters.json"
MODEL, MODEL_CONFIG = SAFE_WEIGHTS_NAME, CONFIG_NAME
PEFT_WEIGHTS = "adapter_model.safetensors"
FORMAT_VERSION = 4
"""Versions 1 to 3, used in development, had digests of only some of the values, or
other names in the config.
"""


def read_weights(directory: Path, in_model: list[str]) -> dict[str, Tensor]:
    """Return the saved tensors, wherever they are in the directory.

    Args:
        directory: the directory to read from.
        in_model: names of tensors in the file of the model.

    Raises:
        AdapterFileError: a file is missing or damaged.
    """
    path, why = directory / WEIGHTS, ""
    try:
        found = load_file(path) if path.exists() or not in_model else {}
        elsewhere = model_files(directory) if in_model else {}
        for name in in_model:
            why = (
                ". `save_pretrained` writes tensors into the model's file only: keep "
                "the directory whole, or save with `meft.save_adapters`"
            )
            path = elsewhere.get(name, directory / MODEL)
            with safe_open(path, "pt") as file:
                found[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}{why}") from None
    return found


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        AdapterFileError: it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from None


def model_files(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor that the last `save_pretrained()` wrote there.

    Raises:
        AdapterFileError: the index of a model in several files is damaged.
    """
    whole, index = directory / MODEL, directory / f"{MODEL}.index.json"
    found = [path for path in (whole, index) if path.exists()]
    if not found:
        return {}
    # Either may be left over from an earlier save.
    if max(found, key=lambda path: path.stat().st_mtime_ns) == index:
        try:
            names = json.loads(index.read_text())["weight_map"]
            return {name: directory / file for name, file in names.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise AdapterFileError(
                f"{index} is damaged: `weight_map` must be an object with the file of "
                "each tensor. Save the model again"
            ) from error
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
