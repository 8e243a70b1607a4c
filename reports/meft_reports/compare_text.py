"""Two runs side by side, as text.

A time that may be noise is marked `~`, with the reason. The numbers in brackets are the
interval of 95 % of its ratio.
"""

import math
from collections.abc import Sequence

from meft_reports.compare import Cause, Changed, Comparison
from meft_reports.format import format_value
from meft_reports.text import plural, printable

NOT_PAIRED = (
    "No cell is in both runs, so nothing is compared; --ignore FIELD pairs cells that "
    "differ in a field only."
)
MAX_LINES = 20
LENGTH = 2_000


def to_text(comparison: Comparison, *, shows_all: bool = False) -> str:
    """Return a comparison as text.

    Args:
        comparison: the comparison.
        shows_all: whether every difference is listed, and cells without one.
    """
    its = comparison
    hidden = "" if shows_all else " hidden; --all shows them"
    lines = [
        f"A: {its.before}",
        f"B: {its.after}",
        f"{plural(its.num_pairs, 'cell')} in both, {len(its.only_before)} only in A, "
        f"{len(its.only_after)} only in B",
        *(f"otherwise: {e.cell_id}  {e.before} → {e.after}" for e in its.endings),
        *_causes(its, shows_all),
        *(f"not compared: {refusal_in_words(one)}" for one in its.not_compared),
        *_listed("worse", its.worse, shows_all),
        *_listed("better", its.better, shows_all),
        f"same ({len(its.same)}){hidden}",
        *(f"  {name}" for name in its.same if shows_all),
        *(
            f"geometric mean of ratios: {mean.column.short_name} {mean.ratio:.4f} "
            f"({plural(mean.num_cells, 'cell')})"
            for mean in its.means
        ),
    ]
    return "\n".join(printable(line, LENGTH) for line in lines)


def refusal_in_words(one: Cause) -> str:
    """Return which scores are not compared, and why.

    Args:
        one: a fact that differs between them.
    """
    return (
        f"the score of {plural(one.num_cells, 'cell')}, of another {one.fact}: "
        f"{one.before} → {one.after}"
    )


def _causes(comparison: Comparison, shows_all: bool) -> list[str]:
    causes = comparison.causes
    if not comparison.num_pairs:
        return [NOT_PAIRED]
    if not causes:
        return ["same environment in all of them"]
    shown = causes if shows_all else causes[:MAX_LINES]
    lines = [
        f"differs: {one.fact}  {one.before} → {one.after}  "
        f"({plural(one.num_cells, 'cell')})"
        for one in shown
    ]
    if len(causes) > len(shown):
        left_out = plural(len(causes) - len(shown), "more difference")
        lines.append(f"  and {left_out} of environments; --all shows them")
    return lines


def _listed(title: str, some: Sequence[Changed], shows_all: bool) -> list[str]:
    cells = len({one.cell_id for one in some})
    lines = [f"{title} ({plural(len(some), 'number')} of {plural(cells, 'cell')})"]
    shown = some if shows_all else some[:MAX_LINES]
    for one in shown:
        lines += _lines(one)
    if len(some) > len(shown):
        lines.append(f"  and {len(some) - len(shown)} more; --all shows them")
    return lines


def _lines(one: Changed) -> list[str]:
    before, after = (
        format_value(value, one.column.unit) for value in (one.before, one.after)
    )
    ratio = "" if math.isinf(one.ratio) else f"  {one.ratio:.4f}x"
    if one.interval is not None:
        ratio += " [{:.4f}, {:.4f}]".format(*one.interval)
    mark = f"  ~ {one.doubt}" if one.doubt else ""
    head = f"{one.cell_id}  {one.column.short_name}  {before} → {after}{ratio}{mark}"
    return [f"  {head}", *(f"      {line}" for line in one.grew)]
