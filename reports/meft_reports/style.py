"""One look for every figure: a method has the same colour and marker everywhere.

Hues are from Okabe and Ito's palette and stay apart for colour-blind readers; where
two methods are relatives they also differ in marker. Reversible methods are filled and
solid, their stored twins hollow and dashed in the same hue; with the exact inverse they
are of a darker hue and dotted. A method this table does not know gets a look of its own
from its name, the same in every run.
"""

import hashlib
from dataclasses import dataclass

from meft_reports.methods import TABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """How a method is drawn."""

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

# Wong-safe hues not used above, for methods nobody has given a look yet.
_SPARE_COLORS = ("#882255", "#117733", "#AA4499", "#44AA99", "#999933", "#661100")
_SPARE_MARKERS = ("p", "h", "*", "H", "d", "8")


def look(method: str) -> Look:
    """How `method` is drawn, the same in every figure and every run."""
    if method in LOOKS:
        return LOOKS[method]
    digest = hashlib.sha256(method.encode()).digest()
    return Look(
        color=_SPARE_COLORS[digest[0] % len(_SPARE_COLORS)],
        marker=_SPARE_MARKERS[digest[1] % len(_SPARE_MARKERS)],
    )


def method_order(method: str) -> tuple[int, str]:
    """Sort key: the order of `LOOKS`, then unknown methods by name."""
    known = list(LOOKS)
    return (known.index(method) if method in LOOKS else len(known)), method
