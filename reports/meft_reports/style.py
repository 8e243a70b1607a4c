"""Styles of methods: the same colour and marker in every figure.

Hues are from Okabe and Ito's palette and are distinguishable for colour-blind readers;
related methods also differ in marker. Reversible methods are filled and solid, their
stored twins hollow and dashed in the same hue; methods with the exact inverse have a
darker hue and are dotted. The style of an unknown method is derived from its name, and
is the same in every run.
"""

import hashlib
from dataclasses import dataclass


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


def _twin(look: Look) -> Look:
    return Look(color=look.color, marker=look.marker, line="--", hollow=True)


_MEFT1 = Look(color="#D55E00", marker="o")
_MEFT2 = Look(color="#E69F00", marker="s")
_MEFT3 = Look(color="#009E73", marker="D")
_MEFT1_EXACT = Look(color="#7A2E00", marker="o", line=":")
_MEFT2_EXACT = Look(color="#8A5F00", marker="s", line=":")
_MEFT3_EXACT = Look(color="#00523C", marker="D", line=":")
_SPARSE = Look(color="#0B6E4F", marker="H")

LOOKS = {
    "full": Look(color="#000000", marker="o"),
    "head": Look(color="#8A8A8A", marker="P"),
    "lora": Look(color="#0072B2", marker="^"),
    "adapters": Look(color="#CC79A7", marker="X"),
    "checkpointing": Look(color="#5B4A8A", marker="v"),
    "lora-checkpointing": Look(color="#56B4E9", marker="<"),
    "adapters-checkpointing": Look(color="#94356B", marker=">"),
    "meft1": _MEFT1,
    "meft2": _MEFT2,
    "meft3": _MEFT3,
    "meft1-store": _twin(_MEFT1),
    "meft2-store": _twin(_MEFT2),
    "meft3-store": _twin(_MEFT3),
    "meft1-exact": _MEFT1_EXACT,
    "meft2-exact": _MEFT2_EXACT,
    "meft3-exact": _MEFT3_EXACT,
    "meft1-exact-store": _twin(_MEFT1_EXACT),
    "meft2-exact-store": _twin(_MEFT2_EXACT),
    "meft3-exact-store": _twin(_MEFT3_EXACT),
    "dense": Look(color="#4D4D4D", marker="s"),
    "dense-offload": Look(color="#4D4D4D", marker="s", line="--", hollow=True),
    "sparse": Look(color="#1B9E9E", marker="d"),
    "sparse-experts": _SPARSE,
    "sparse-experts-union": Look(color="#A8A032", marker="h"),
    "sparse-experts-resident": _twin(_SPARSE),
    "sparse-experts-no-cache": Look(color="#A3123F", marker="v", line=":"),
    "sparse-experts-window": Look(color="#B05FA8", marker="<", line=":"),
    "sparse-experts-no-prefetch": Look(color="#CC6677", marker=">", line=":"),
    "sparse-experts-wide": Look(color="#88CCEE", marker="^", line=":"),
    "sparse-experts-lazy": Look(color="#DDCC77", marker="*", line=":"),
    "sparse-experts-dense-update": Look(color="#332288", marker="p", line=":"),
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
