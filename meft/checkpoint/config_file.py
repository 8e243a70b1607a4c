"""The contents of the config file, checked as a whole when it is read.

The file identifies the model that saved adapters belong to. A file that was edited or
damaged is refused here, before anything is compared with the model.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from meft.checkpoint.digests import DIGEST_DTYPES
from meft.checkpoint.files import CONFIG, FORMAT_VERSION
from meft.errors import AdapterFileError, ConfigError
from meft.reversible.config import ReversibleConfig
from meft.sparse.config import SparseConfig
from meft.validate import Expectation, checked

MAX_DEPTH = 32
"""Greatest number of nested objects and lists. The configs of transformers have 4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedConfig:
    """What the config file says about a saved model.

    Attributes:
        reversible: the config of `make_reversible`, if the model was converted by it.
        sparse: the config of `add_sparse_adapters`, if the model was converted by it.
        model_class: name of the model's class.
        backbone: fields of the backbone's config that define its function.
        frozen_dtype: dtypes of the frozen tensors, separated by commas.
        frozen_sha256: for each of `DIGEST_DTYPES`, digests of the frozen tensors by
            name.
        trained_sha256: digest of all saved tensors.
        in_model_file: names of saved tensors that are in the file of the model.
    """

    reversible: ReversibleConfig | None
    sparse: SparseConfig | None
    model_class: str
    backbone: dict[str, Any]
    frozen_dtype: str
    frozen_sha256: dict[str, dict[str, str]]
    trained_sha256: str
    in_model_file: list[str]


def read_config(directory: Path) -> SavedConfig:
    """Return the contents of the config file.

    Raises:
        AdapterFileError: there is none, it is damaged or of another format version. The
            message contains the file, the key, its value and what is expected.
    """
    path = directory / CONFIG
    try:
        config = SavedConfig(**checked(_read(path), _EXPECTED))
        if config.reversible is None and config.sparse is None:
            raise ConfigError(
                "`reversible` and `sparse` are both null, but one of them must be the "
                "config of a conversion"
            )
    except ConfigError as error:
        raise AdapterFileError(
            f"{path} is damaged, restore it or save the adapters again: {error}"
        ) from error
    return config


def _read(path: Path) -> dict[str, Any]:
    """Return the keys of the file, without that of the format version."""
    try:
        keys = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(
            f"no saved adapters in {path.parent}: {CONFIG} cannot be read "
            f"({error.strerror}); expected a directory written by `save_adapters()` or "
            f"by a converted model's `save_pretrained()`{_nearby(path.parent)}"
            f"{_of_peft(path.parent)}"
        ) from None
    except ValueError as error:
        raise AdapterFileError(f"{path} is not valid JSON: {error}") from None
    except RecursionError:
        raise ConfigError(_too_deep("the file")) from None
    if not isinstance(keys, dict):
        raise ConfigError(f"the file must contain an object, got {reprlib.repr(keys)}")
    # Comparing and printing nested values is recursive.
    for name, value in keys.items():
        if _is_deeper(value, MAX_DEPTH - 1):
            raise ConfigError(_too_deep(f"`{name}`"))
    version = keys.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path} is of format version {version!r}, but this release of meft reads "
            f"version {FORMAT_VERSION}. Load it with the release that wrote it, and "
            "bring the model's `state_dict()` into a model that this release converted"
        )
    return keys


def _of_peft(directory: Path) -> str:
    if not (directory / "adapter_config.json").is_file():
        return ""
    return (
        ". This is a directory of peft: load it by `PeftModel.from_pretrained(model, "
        "directory, is_trainable=True)`, and call `meft.make_reversible` on the result"
    )


def _nearby(directory: Path) -> str:
    found = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
    return f". There are some in {', '.join(found)} inside it" if found else ""


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether `value` has more than this number of nested objects and lists."""
    if not isinstance(value, dict | list):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(each, levels - 1) for each in inside)


def _too_deep(what: str) -> str:
    return f"{what} must have at most {MAX_DEPTH} nested objects and lists, got more"


def _conversion(
    kind: type[ReversibleConfig] | type[SparseConfig], name: str, value: Any
) -> ReversibleConfig | SparseConfig | None:
    if value is None:
        return None
    fields = _object(name, value)
    try:
        return kind.from_json(fields)
    except ConfigError as error:
        raise ConfigError(f"`{name}`: {error}") from error


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def _class_name(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _wrong(name, value, "the name of a class")
    return value


def _dtypes(name: str, value: Any) -> str:
    """Expect names as in `torch.float32`; none if every tensor is trained."""
    names = value.split(", ") if isinstance(value, str) and value else []
    known = [
        each.startswith("torch.")
        and isinstance(getattr(torch, each.removeprefix("torch."), None), torch.dtype)
        for each in names
    ]
    if not isinstance(value, str) or not all(known):
        raise _wrong(name, value, "the names of dtypes of torch, such as torch.float32")
    return value


def _sha256(name: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _wrong(name, value, "a sha256 of 64 hexadecimal digits")
    return value


def _digests(name: str, value: Any) -> dict[str, str]:
    return {
        tensor: _sha256(f"{name}.{tensor}", digest)
        for tensor, digest in _object(name, value).items()
    }


def _digests_by_dtype(name: str, value: Any) -> dict[str, dict[str, str]]:
    expected = {
        dtype: lambda dtype, digests: _digests(f"{name}.{dtype}", digests)
        for dtype in DIGEST_DTYPES
    }
    fields = _object(name, value)
    if fields.keys() != expected.keys():
        raise _wrong(name, value, f"an object with the keys {', '.join(expected)}")
    return checked(fields, expected)


def _names(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(name, value, "a list of names of tensors")
    return value


def _wrong(name: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"`{name}` must be {expected}, got {reprlib.repr(value)}")


_EXPECTED: Mapping[str, Expectation] = {
    "reversible": partial(_conversion, ReversibleConfig),
    "sparse": partial(_conversion, SparseConfig),
    "model_class": _class_name,
    "backbone": _object,
    "frozen_dtype": _dtypes,
    "frozen_sha256": _digests_by_dtype,
    "trained_sha256": _sha256,
    "in_model_file": _names,
}
