"""What a sweep takes from its user: a method, a backbone or a task of their own.

A cell holds the content of such a thing as a digest, and never a path, so that the same
content is the same cell on any machine:

    peft:ia3                     a type of PEFT with its usual values
    peft:lora-3f2a91bc0d12       a config file of PEFT, with its type
    python:shift-9e107d9d372b    a function, with its name
    dir:bert-e3b0c44298fc        a directory of weights, with its `model_type`
    random:bert-cf83e1357eef     the file of a config, likewise
    trained:vit-tiny-8d1f5a...   a backbone that the sweep itself trains first
    data:options-7d865e959b24    files of rows and how they are read, with their kind

The parent makes these values when it reads a sweep (`meft_bench.parent.own`), and a
child is given the places instead.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meft_bench.shared.cell import Cell
from meft_bench.shared.registry import VIRTUAL

PYTHON = "python:"
"""Beginning of a method, a task or a metric that is code of the user."""
DATA = "data:"
"""Beginning of a task whose rows are in files of the user."""
EVALUATE = "evaluate:"
"""Beginning of a metric that is a class of `evaluate.Metric`."""
PEFT_CONFIG = "adapter_config.json"
"""Name of a config of PEFT in a folder."""
OF_THE_FILE = ("peft_version", "auto_mapping", "base_model_name_or_path", "revision")
"""Fields of a config of PEFT that describe where it comes from, and change nothing."""
DIGEST_OF_WEIGHTS = "weights.sha256"
"""Name of the file with the digest of the weights of a trained backbone."""
DIGEST_LENGTH = 12
"""Number of characters of a digest that a value has."""
_VALUE = re.compile(
    r"(peft|peft-checkpointing|python|dir|random|trained|data):[\w.]+-[0-9a-f]{12}"
    r"|(peft|peft-checkpointing):[a-z0-9_]+"
)
OWN_SCORE = "own:"
"""Beginning of the names of scores of a user's metric, which may be any number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """A method, a backbone or a task of the user."""

    value: str
    """What cells hold."""
    place: str
    """What the child is given instead, with an absolute path.

    Of a trained backbone, what it is trained from; `trained_in` is given where there
    are weights.
    """
    alias: str = ""
    """A short name for tables; empty where the user gives none."""
    spelt: str = ""
    """What the sweep says, without folders."""
    model_type: str = ""
    """Of a backbone: its `model_type`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Values of fields of a cell that it sets."""
    rows: dict[str, Any] | None = None
    """Of a task: where its rows are and how they are read (`child.tasks.own_rows`)."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of a backbone that the sweep trains first: fields of the cell that does so."""
    trained_in: str = ""
    """Of such a backbone: the absolute path of its weights in a run."""
    trained_by: str = ""
    """Of such a backbone: the id of the cell that trains it."""


def is_value(text: str) -> bool:
    """Return whether a text has the form of what a cell holds of such a thing."""
    return _VALUE.fullmatch(text) is not None


def located(cell: Cell, own: Mapping[str, Own]) -> Cell:
    """Return the cell as a child is given it, with places in the place of digests.

    Args:
        cell: the cell.
        own: things of the user, by what cells hold.
    """
    changes: dict[str, Any] = {
        name: _place(own[value], cell)
        for name in ("method", "reference", "backbone", "task")
        if (value := getattr(cell, name)) in own and own[value].rows is None
    }
    return dataclasses.replace(cell, **changes)


def _place(one: Own, cell: Cell) -> str:
    # A virtual device needs the shape only.
    is_real = not cell.device.startswith(VIRTUAL)
    return f"dir:{one.trained_in}" if one.training and is_real else one.place


def rows_of(cell: Cell, own: Mapping[str, Own]) -> dict[str, Any] | None:
    """Return where the rows of a cell's task are; None for other tasks."""
    return own[cell.task].rows if cell.task in own else None


def aliases_of(cell: Cell, own: Mapping[str, Own]) -> dict[str, str]:
    """Return names for tables of what a cell holds, by its values.

    They are the short names that the user gives, or the ends of paths.
    """
    values = (cell.method, cell.reference, cell.backbone, cell.task)
    names = {v: own[v].alias or own[v].spelt for v in values if v in own}
    return {value: name for value, name in names.items() if name}


def without_places(message: str, own: Mapping[str, Own]) -> str:
    """Return a message of a child in the words of the sweep."""
    for one in own.values():
        for place in filter(None, (one.trained_in, one.place)):
            message = message.replace(place, one.alias or one.spelt or one.value)
        message = message.replace(one.value, one.alias or one.spelt or one.value)
    return message
