"""The tables: one kind per file, each with the same part.

    make(frame)        its tables: several, one, or none

Averages come with their spread and count, cells that failed stand where their number
would have been, and random weights are said in every table in which they occur. A table
sees the frame of `meft_reports.frame` and nothing else. Add a kind by adding a file and
its name below.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meft_reports.errors import UnknownName

if TYPE_CHECKING:
    import pandas as pd

    from meft_reports.tables.table import Table

TABLES = (
    "headline",
    "results",
    "differences",
    "memory",
    "savings",
    "activations",
    "ratios",
    "traffic",
    "predictions",
    "exactness",
    "twins",
    "start",
    "failures",
    "environment",
    "origins",
)
"""Every kind of table by name; each may be several tables, or none."""


def find_tables(name: str) -> "Callable[[pd.DataFrame], list[Table]]":
    """The function that makes the tables called `name`.

    Raises:
        UnknownName: there is none.
    """
    if name not in TABLES:
        raise UnknownName("table", name, TABLES)
    module: Any = importlib.import_module(f"{__name__}.{name}")
    make: Callable[[pd.DataFrame], list[Table]] = module.make
    return make
