"""The table of methods: which function makes each, which options it uses, what it has.

The data is `methods.toml`, which the reports read as well.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

FUNCTIONS = "meft_bench.child.methods"
"""Package of the functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way of fine-tuning."""

    function: str
    """`FILE:NAME` in `FUNCTIONS`."""
    options: tuple[str, ...] = ()
    """Fields of a cell that only some methods use, of those that this one uses."""
    streams: str = ""
    """Arithmetic of a reversible method's streams: `float` or `integer`."""
    twin_of: str = ""
    """Of a plain twin, which stores activations: the method that rebuilds them."""
    neurons: str = ""
    """Of adapters with many neurons: `dense`, `sparse` or `experts`."""
    has_rows: bool = False
    """Whether neurons are rows of a store, which `meft.SparseAdamW` updates."""

    @property
    def is_reversible(self) -> bool:
        """Whether it has two streams, rebuilt or stored."""
        return bool(self.streams)

    @property
    def rebuilds(self) -> bool:
        """Whether its backward pass rebuilds activations."""
        return self.is_reversible and not self.twin_of


_FOR_REPORTS = ("float_of", "color", "marker", "line", "hollow")


def _read() -> dict[str, Method]:
    here = Path(__file__).parents[1]
    # A wheel carries the file inside the package; a checkout has it next to it.
    inside = here / "methods.toml"
    path = inside if inside.is_file() else here.parent / "methods.toml"
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    methods = {}
    for name, table in tables.items():
        fields = {key: v for key, v in table.items() if key not in _FOR_REPORTS}
        fields["options"] = tuple(fields.get("options", ()))
        methods[name] = Method(**fields)
    return methods


TABLE = _read()
"""Every method by name, in the order of the file."""
