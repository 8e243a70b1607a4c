"""The config of a conversion as an entry of `state_dict()`.

Weights of a converted model compute the same function only under the same config, and
many configs have parameters of the same names and shapes. Each module that a conversion
adds therefore returns the fields that define its function from `get_extra_state`, and
compares them in `set_extra_state`. Everything that saves and loads a `state_dict()`
(`torch.save`, safetensors, accelerate, `Trainer.resume_from_checkpoint`) then checks
the config as well.

The entry is the JSON text of the fields with one float32 number per character. Averages
of state dictionaries, which users compute entry by entry, in place and in other
floating-point dtypes, round to the same text.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meft.errors import AdapterFileError

KEY = "_extra_state"
"""Last part of the entry's name, which torch defines."""


def to_tensor(fields: Mapping[str, Any]) -> Tensor:
    """Encode the fields of a config as a one-dimensional tensor on the CPU."""
    codes = list(json.dumps(fields).encode("ascii"))
    return torch.tensor(codes, dtype=torch.float32, device="cpu")


def refuse_other(state: Tensor, fields: Mapping[str, Any]) -> None:
    """Raise an error if the fields of a saved config differ from those of the model.

    Args:
        state: an entry that `to_tensor` has created.
        fields: the fields of the module that the entry is loaded into.

    Raises:
        AdapterFileError: the fields differ, or `state` is not such an entry.
    """
    if state.is_meta:
        return  # meta tensors of parameters do not change anything either
    remedy = (
        "To load the weights without this check, delete the entries of the dictionary "
        f"whose names end in `{KEY}`"
    )
    codes = state.detach().double().round().clamp(0, 127).to("cpu", torch.uint8)
    try:
        saved = json.loads(bytes(codes.tolist()))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise AdapterFileError(
            f"the entry `{KEY}` of this state dictionary does not hold the config of a "
            f"converted model, but other numbers. {remedy}"
        )
    refuse_other_function(
        saved,
        fields,
        what="these weights",
        remedy=f"Convert the model with the config of the saved one. {remedy}",
    )


def refuse_other_function(
    saved: Mapping[str, Any], given: Mapping[str, Any], *, what: str, remedy: str
) -> None:
    """Raise an error that names the fields in which two configs differ, if any.

    Args:
        saved: the fields that define the function of the saved model.
        given: those of the model that it is loaded into.
        what: what was saved, in the plural, for the message.
        remedy: the last sentences of the message.

    Raises:
        AdapterFileError: the fields differ.
    """
    # JSON has no tuples, so `saved` may have lists instead.
    saved, given = (json.loads(json.dumps(fields)) for fields in (saved, given))
    names = [name for name in {**given, **saved} if saved.get(name) != given.get(name)]
    if names:
        raise AdapterFileError(
            f"{what} were saved from a model that was converted with "
            f"{_listed(saved, names)}, but this model was converted with "
            f"{_listed(given, names)}: with it they compute another function. {remedy}"
        )


def forgive_missing(prefix: str, missing_keys: list[str]) -> None:
    """Remove the entry of the module at `prefix` from torch's list of missing keys.

    State dictionaries of parameters alone, and those saved before the entry existed,
    can therefore still be loaded.
    """
    if prefix + KEY in missing_keys:
        missing_keys.remove(prefix + KEY)


def _listed(fields: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"`{name}={fields.get(name)!r}`" for name in names)
