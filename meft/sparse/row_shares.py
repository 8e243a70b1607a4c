"""Rows and optimizer states of all processes from their shares, and shares from these.

    gather                  from the shares of all processes to the first one
    state_of                of rows: the state that an optimizer saves
    own_rows, own_state     what belongs to this process, of what was saved by as many
                            processes or by others

An entry of row i of the whole is entry i div R of the share of process i mod R.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from meft.errors import AdapterFileError, ConfigError
from meft.sparse import division as dividing
from meft.sparse.divided_rows import DividedRows
from meft.sparse.rows import Rows

_BY_ROW = ("first", "second", "updated_at", "factors")
"""Tensors of a store's state that have an entry for each of its rows."""


def gather(rows: DividedRows, *, optimizer_state: bool) -> dict[str, Any]:
    """Return the rows of all processes, and their state, in the first process.

    All processes call it. The values are None in all but the first.

    Args:
        rows: the share of this process.
        optimizer_state: whether to gather what `RowStore.state` returns, too.
    """
    division = rows.division
    found: dict[str, Any] = {"rows": division.gather_rows(rows.store.settled())}
    if not optimizer_state:
        return found
    state = rows.store.state()
    behind = torch.zeros(len(rows.store), dtype=torch.bool)
    behind[state["behind"]] = True
    at_last = torch.zeros_like(rows.store.rows)
    at_last[state["behind"]] = state["at_last"]
    of_rows = {name: state[name] for name in _BY_ROW}
    of_rows |= {"behind": behind, "at_last": at_last}
    whole: dict[str, Any] = {
        name: division.gather_rows(tensor, dividing.STATE)
        for name, tensor in of_rows.items()
    }
    if division.rank == 0:
        whole["behind"] = whole["behind"].nonzero()[:, 0]
        whole["at_last"] = whole["at_last"][whole["behind"]]
        found["state"] = {**state, **whole}
    return found


def state_of(rows: Rows) -> dict[str, Any]:
    """Return the state of rows for an optimizer's `state_dict()`.

    Of divided rows it is that of all where it was gathered, and that of the share
    elsewhere.
    """
    if not isinstance(rows, DividedRows):
        return rows.store.state()
    whole: dict[str, Any] | None = (rows.gathered or {}).get("state")
    if whole is not None:
        return whole
    return {**rows.store.state(), "share": (rows.division.rank, rows.division.size)}


def own_state(rows: Rows, state: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a saved state that belongs to the rows of this process.

    Args:
        rows: the rows.
        state: what `state_of` returned in this or another process.

    Raises:
        ConfigError: it is the state of a share, and not of this one, or of another
            number of rows.
    """
    division = rows.division
    mine = None if division is None else (division.rank, division.size)
    share = state.get("share")
    if share is not None and tuple(share) != mine:
        here = "all rows" if mine is None else f"share {mine[0]} of {mine[1]}"
        raise ConfigError(
            f"the state is that of share {share[0]} of {share[1]} of divided rows, but "
            f"this process has {here}: call `state_dict()` of the optimizer inside of "
            "`with meft.gathered_rows(model, optimizer_state=True):` to save a state "
            "that any number of processes can load"
        )
    is_old = not state.keys() >= {*_BY_ROW}  # which the store refuses
    if division is None or share is not None or is_old:
        return state
    num_rows = len(state["first"])
    if num_rows != division.num_rows:
        raise ConfigError(
            f"the state is of {num_rows} rows, but this model's blocks have "
            f"{division.num_rows}, divided among {division.size} processes"
        )
    mine_of_behind = division.of_each(state["behind"])[division.rank]
    return {
        **state,
        **{name: division.share(state[name]) for name in _BY_ROW},
        "behind": state["behind"][mine_of_behind] // division.size,
        "at_last": state["at_last"][mine_of_behind],
    }


def own_rows(rows: Rows, whole: Tensor) -> Tensor:
    """Return those of saved rows that this process has.

    Args:
        rows: the rows.
        whole: saved rows of all processes, `rows width`.

    Raises:
        AdapterFileError: they are of another number of rows, of which this process
            would not notice if it had as many.
    """
    division = rows.division
    if division is None:
        return whole
    if len(whole) != division.num_rows:
        raise AdapterFileError(
            f"{len(whole)} rows were saved, but this model's blocks have "
            f"{division.num_rows}, divided among {division.size} processes: load them "
            "into a model with as many `num_neurons`"
        )
    return division.share(whole)


@contextlib.contextmanager
def names_only(every: Iterable[Rows]) -> Iterator[None]:
    """Run the body with `whole` rows without values, where none were gathered.

    The body uses names and shapes of a state dict and reads no values.
    """
    divided = [rows for rows in every if isinstance(rows, DividedRows)]
    closed = [rows for rows in divided if rows.gathered is None]
    for rows in closed:
        rows.gathered = {"rows": None}
    try:
        yield
    finally:
        for rows in closed:
            rows.gathered = None
