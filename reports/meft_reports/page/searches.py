"""Answers of searches by `fit`: for each search, the largest value of each method.

A search has the methods of one backbone on one GPU. MEFT's methods are compared with
the best other method that is alike in where a step keeps its activations: all on the
device, or some of them in host memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from meft_reports.format import format_bytes, format_seconds, is_null
from meft_reports.longest import best_of_ours, best_rival, find, words_of
from meft_reports.methods import is_meft
from meft_reports.page.card_answers import CARD, USABLE_BYTES
from meft_reports.searches import FIELDS

NOUNS = {
    "seq_len": ("longest sequence", "tokens"),
    "batch_size": ("largest batch", "rows"),
}
"""What is found and what it is counted in, by the field of the search."""
PLACES = {True: "on the device", False: "with host memory"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """One search: its title, the field, and its cells as `meft_reports.longest` has."""

    title: str
    """What distinguishes it from the other searches of the run; all, if it is alone."""
    field: str
    cells: pd.DataFrame


def searches_of(frame: pd.DataFrame) -> list[Search]:
    """Return the searches of a run, in the order of the tables.

    Args:
        frame: the frame; `position` of a cell is its position there.
    """
    frame = frame.assign(position=range(len(frame)))
    found = [
        (title, FIELDS[name], part)
        for name in FIELDS
        for title, part in find(frame, name)
    ]
    titles = _distinct([title for title, _, _ in found])
    return [
        Search(title=title, field=field, cells=part)
        for title, (_, field, part) in zip(titles, found, strict=True)
    ]


def _distinct(titles: Sequence[str]) -> list[str]:
    """Return titles without the parts that all of them have.

    A virtual GPU is called by its name, as every answer of a search is a prediction.
    """
    parts = [
        [part.removeprefix("random:").removeprefix("virtual-") for part in parts]
        for parts in (title.split(" · ") for title in titles)
    ]
    if len(parts) < 2:
        return [" · ".join(its) for its in parts]
    common = set.intersection(*map(set, parts))
    short = [" · ".join(p for p in its if p not in common) for its in parts]
    return short if all(short) else [" · ".join(its) for its in parts]


def rows_of(searches: Sequence[Search]) -> list[dict[str, Any]]:
    """Return the rows of the figure of searches: one per method of each search."""
    return [
        _row(search, order, cell)
        for search in searches
        for order, (_, cell) in enumerate(search.cells.iterrows())
    ]


def _row(search: Search, order: int, cell: "pd.Series[Any]") -> dict[str, Any]:
    noun, unit = NOUNS[search.field]
    fits, stays = bool(cell["fits"]), bool(cell["stays"])
    largest = search.cells.loc[search.cells["fits"], search.field].max()
    rival = best_rival(search.cells, stays=stays, field=search.field)
    ratio = _ratio(cell, rival, search.field) if fits else None
    text = words_of(cell, search.field) if fits else "nothing fits"
    if ratio is not None and is_meft(cell["method"]):
        text = f"{text} · {ratio:.2f}×"  # noqa: RUF001
    return {
        "panel": search.title,
        "what": noun,
        "unit": unit,
        "cell": int(cell["position"]),
        "order": order,
        "method": cell["method"],
        "name": cell["name"],
        "kind": f"{'MEFT' if is_meft(cell['method']) else 'others'}, {PLACES[stays]}",
        "value": int(cell[search.field]) if fits else 0,
        "share": float(cell[search.field] / largest) if fits else 0.0,
        "text": text,
        "ratio": ratio,
        "value_text": f"{text} {unit}" if fits else text,
        "moved": _or_none(cell["transfer_bytes"], format_bytes),
        "link": _or_none(cell["link_seconds_at_least"], format_seconds),
        "compute": _or_none(cell["seconds_at_least"], format_seconds),
    }


def _or_none(value: Any, form: Callable[[Any], str]) -> str | None:
    return None if is_null(value) else str(form(value))


def _ratio(
    cell: "pd.Series[Any]", rival: "pd.Series[Any] | None", field: str
) -> float | None:
    """Return a value divided by that of a rival; None where either is a bound."""
    if rival is None or cell["is_at_least"] or rival["is_at_least"]:
        return None
    return float(cell[field] / rival[field])


def search_answers(searches: Sequence[Search]) -> list[Markup]:
    """Say for each search what fits best of MEFT, and of the other methods.

    Several searches have a sentence on all of them first.
    """
    sentences = [_sentence(search) for search in searches]
    return [*_overall(searches), *_in_card(searches), *sentences]


def _in_card(searches: Sequence[Search]) -> list[Markup]:
    """Say what the longest sequence is with which a step fits in a common GPU."""
    cells = [
        search.cells[
            search.cells["fits"]
            & search.cells["peak_reserved_bytes"]
            .fillna(USABLE_BYTES + 1)
            .le(USABLE_BYTES)
        ]
        for search in searches
        if search.field == "seq_len"
    ]
    titles = [search.title for search in searches if search.field == "seq_len"]
    named = [part.assign(title=t) for part, t in zip(cells, titles, strict=True)]
    fitting = pd.concat(named) if named else pd.DataFrame()
    if not cells:
        return []
    if fitting.empty:
        text = "No sequence of these searches would fit in a GPU of <b>{}</b>."
        return [Markup(text).format(CARD)]
    best = fitting.sort_values("seq_len", kind="stable").iloc[-1]
    return [
        Markup(
            "In a GPU of <b>{}</b>, the longest sequence would have {} tokens: "
            "<code>{}</code> ({})."
        ).format(CARD, words_of(best), best["name"], best["title"])
    ]


def _overall(searches: Sequence[Search]) -> list[Markup]:
    parts = []
    for stays, place in PLACES.items():
        ratios = [
            ratio
            for search in searches
            if (ratio := _best_ratio(search, stays)) is not None
        ]
        if len(ratios) > 1:
            parts.append(
                Markup("<b>{:.2f} to {:.2f} times</b> {} ({} searches)").format(
                    min(ratios), max(ratios), place, len(ratios)
                )
            )
    if not parts:
        return []
    return [
        Markup(
            "The largest values that fit with MEFT, divided by those of the best other "
            "method: {}."
        ).format(Markup("; ").join(parts))
    ]


def _best_ratio(search: Search, stays: bool) -> float | None:
    best = best_of_ours(search.cells, stays=stays, field=search.field)
    rival = best_rival(search.cells, stays=stays, field=search.field)
    return None if best is None else _ratio(best, rival, search.field)


def _sentence(search: Search) -> Markup:
    noun, unit = NOUNS[search.field]
    parts = []
    for stays, place in PLACES.items():
        best = best_of_ours(search.cells, stays=stays, field=search.field)
        rival = best_rival(search.cells, stays=stays, field=search.field)
        if best is None and rival is None:
            continue
        shown = [
            _named(cell, search.field) for cell in (best, rival) if cell is not None
        ]
        ratio = _best_ratio(search, stays)
        against = f" ({ratio:.2f} times)" if ratio is not None else ""
        words = Markup(" against ").join(shown)
        only = ""
        if best is None or rival is None:
            which = "no other method" if rival is None else "no method of MEFT"
            only = f", {which} in this search"
        parts.append(Markup("{} {}{}{}").format(place, words, against, only))
    return Markup("{}, {} in {}: {}.").format(
        Markup("<b>{}</b>").format(search.title), noun, unit, Markup("; ").join(parts)
    )


def _named(cell: "pd.Series[Any]", field: str) -> Markup:
    return Markup("<b>{}</b> by <code>{}</code>").format(
        words_of(cell, field), cell["name"]
    )
