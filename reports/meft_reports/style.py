"""Styles of methods: the same colour and marker in every figure.

Hues are from Okabe and Ito's palette and are distinguishable for colour-blind readers;
related methods also differ in marker. Reversible methods are filled and solid, their
stored twins hollow and dashed in the same hue; methods with the exact inverse have a
darker hue and are dotted. The style of an unknown method is derived from its name, and
is the same in every run.
"""

import hashlib
from dataclasses import dataclass

from meft_reports.methods import TABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The style of a method."""

    color: str
    marker: str
    line: str = "-"
    hollow: bool = False

    @property
    def face(self) -> str:
        """Colour inside the marker."""
        return "white" if self.hollow else self.color


LOOKS = {
    name: Look(
        color=method.color,
        marker=method.marker,
        line=method.line,
        hollow=method.hollow,
    )
    for name, method in TABLE.items()
}
"""Every method of the harness, in the order in which methods are shown."""

# Hues for colour-blind readers not used above, for methods without a style.
_SPARE_COLORS = ("#882255", "#117733", "#AA4499", "#44AA99", "#999933", "#661100")
_SPARE_MARKERS = ("p", "h", "*", "H", "d", "8")


def look(method: str) -> Look:
    """Return the style of `method`, the same in every figure and every run."""
    if method in LOOKS:
        return LOOKS[method]
    digest = hashlib.sha256(method.encode()).digest()
    return Look(
        color=_SPARE_COLORS[digest[0] % len(_SPARE_COLORS)],
        marker=_SPARE_MARKERS[digest[1] % len(_SPARE_MARKERS)],
    )


def method_order(method: str) -> tuple[int, str]:
    """Return a sort key: the order of `LOOKS`, then unknown methods by name."""
    known = list(LOOKS)
    return (known.index(method) if method in LOOKS else len(known)), method
