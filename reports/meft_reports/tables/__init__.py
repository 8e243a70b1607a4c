"""The tables: one kind per file, each with the same function.

    make(frame)        its tables: several, one, or none
    NEEDS              what the records must hold for there to be one

Averages are shown with their spread and count, cells that failed are shown in place of
their number, and random weights are noted in every table in which they occur. A table
uses only the frame of `meft_reports.frame`. Add a kind by adding a file and its name
below.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from meft_reports.errors import UnknownName

if TYPE_CHECKING:
    import pandas as pd

    from meft_reports.tables.table import Table

TABLES = (
    "headline",
    "longest",
    "results",
    "differences",
    "rivals",
    "capacity",
    "trials",
    "memory",
    "savings",
    "activations",
    "ratios",
    "traffic",
    "meters",
    "predictions",
    "exactness",
    "twins",
    "start",
    "failures",
    "environment",
    "origins",
)
"""Every kind of table by name; each may be several tables, or none."""


class TableMaker(Protocol):
    """The contents of a module of this package."""

    NEEDS: str
    make: "Callable[[pd.DataFrame], list[Table]]"


def find_maker(name: str) -> TableMaker:
    """Return the module of the tables called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in TABLES:
        raise UnknownName("table", name, TABLES)
    maker: TableMaker = importlib.import_module(f"{__name__}.{name}")
    return maker


def find_tables(name: str) -> "Callable[[pd.DataFrame], list[Table]]":
    """Return the function that makes the tables called `name`.

    Raises:
        UnknownName: there is none.
    """
    return find_maker(name).make
