"""Workloads: what the cells of one comparison have in common.

A workload of the page is a workload of the glossary and the place where it ran: numbers
of two machines, or of two versions of the code or torch, are never in one comparison.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meft_reports.labels import USUAL, is_quantised
from meft_reports.page.cells import Cell
from meft_reports.summary import PROVENANCE, WORKLOAD
from meft_reports.text import plural

FIELDS = (*WORKLOAD, "search", "place")
"""Fields that the selectors of the page choose from."""

WEIGHTS = "weights_sha256"
_WORDS: dict[str, Callable[[Any], str]] = {
    "code_sha256": lambda digest: f"code {digest[:8]}",
    "torch_version": lambda version: f"torch {version}",
    WEIGHTS: lambda digest: f"weights {digest[:8]}",
    "num_threads": lambda count: plural(count, "thread"),
    "num_slots": lambda count: f"{count} at a time",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One workload at one place."""

    index: int
    fields: dict[str, Any]
    """By `FIELDS`."""
    title: str
    """In words, e.g. `bert-base · bf16 · virtual-H200`."""


def workloads_of(cells: Sequence[Cell]) -> dict[tuple[Any, ...], Workload]:
    """Return the workloads of the cells by `key_of`, in a fixed order."""
    places = _places(cells)
    several = _with_several_weights(cells)
    codes = {cell["code_sha256"] for cell in cells}
    searches = {cell["search"] for cell in cells}
    found = {key_of(cell): cell for cell in cells}
    ordered = sorted(found, key=lambda key: [(v is None, str(v)) for v in key])
    varying = [
        name for name in WORKLOAD if len({found[key][name] for key in found}) > 1
    ]
    result = {}
    for index, key in enumerate(ordered):
        cell = found[key]
        fields = {name: cell[name] for name in (*WORKLOAD, "search")}
        fields["place"] = places[_place_key(cell, several)]
        title = in_words(fields, varying)
        if len(searches) > 1 and cell["search"]:
            title += f" · {cell['search']}"
        if len(codes) > 1:
            title += f" · code {cell['code_sha256'][:8]}"
        result[key] = Workload(index=index, fields=fields, title=title)
    return result


def key_of(cell: Cell) -> tuple[Any, ...]:
    """Return what identifies the workload of a cell."""
    return tuple(cell[name] for name in (*WORKLOAD, "search", *PROVENANCE))


def in_words(fields: dict[str, Any], varying: Sequence[str] = WORKLOAD) -> str:
    """Return a workload in words; of what never varies, only the essential."""
    parts = []
    if not fields["task"].startswith("synthetic"):
        parts.append(fields["task"])
    parts.append(fields["backbone"].removeprefix("random:"))
    if fields["depth"]:
        parts.append(f"{fields['depth']} blocks")
    parts.append(f"{fields['batch_size']}×{fields['seq_len']}")  # noqa: RUF001
    parts.append(fields["dtype"])
    weights = fields["weights_dtype"]
    if is_quantised(weights) or (
        weights != fields["dtype"] and "weights_dtype" in varying
    ):
        parts.append(f"{weights} weights")
    if fields["attention"] != USUAL["attention"]:
        parts.append(f"{fields['attention']} attention")
    if fields["blocks"] != USUAL["blocks"]:
        parts.append(f"{fields['blocks']} blocks")
    if fields["ranks"] != USUAL["ranks"]:
        parts.append(f"{fields['ranks']} ranks, {fields['parallel']}")
    if fields["device"] != "cpu" or "device" in varying:
        parts.append(fields["device"])
    return " · ".join(map(str, parts))


def _place_key(cell: Cell, with_weights: set[str]) -> tuple[Any, ...]:
    known = {**cell}
    if cell["backbone"] not in with_weights:
        known[WEIGHTS] = None
    return tuple(known[name] for name in PROVENANCE)


def _with_several_weights(cells: Sequence[Cell]) -> set[str]:
    """Return the backbones of which the cells have more than one set of weights."""
    seen: dict[str, set[str]] = {}
    for cell in cells:
        if cell[WEIGHTS] is not None:
            seen.setdefault(cell["backbone"], set()).add(cell[WEIGHTS])
    return {backbone for backbone, weights in seen.items() if len(weights) > 1}


def _places(cells: Sequence[Cell]) -> dict[tuple[Any, ...], str]:
    """Return a text for each place; it has what differs between the places."""
    several = _with_several_weights(cells)
    found = {_place_key(cell, several) for cell in cells}
    keys = sorted(found, key=lambda key: [*map(str, key)])
    differing = [
        position
        for position, name in enumerate(PROVENANCE)
        if len({key[position] for key in keys}) > 1
    ]
    shown = differing or [PROVENANCE.index("machine")]
    return {
        key: " · ".join(
            _WORDS.get(PROVENANCE[position], str)(key[position])
            for position in shown
            if key[position] is not None
        )
        for key in keys
    }
