"""The table of methods: which function makes each, which options it uses, what it has.

The data is `methods.toml`, which the reports read as well.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = "methods.toml"
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


def path_of(package: Path) -> Path:
    """Return the path of the table of methods that belongs to a copy of `meft_bench`.

    A wheel carries the file inside the package; a checkout has it next to it.
    """
    inside = package / FILE
    return inside if inside.is_file() else package.parent / FILE


def _read() -> dict[str, Method]:
    path = path_of(Path(__file__).parents[1])
    known = {field.name for field in dataclasses.fields(Method)}
    methods = {}
    for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
        wrong = [key for key in table if key not in {*known, *_FOR_REPORTS}]
        if wrong or "function" not in table:
            what = f"unknown field {wrong[0]!r}" if wrong else "no `function`"
            valid = ", ".join(sorted({*known, *_FOR_REPORTS}))
            raise ValueError(f"{path}: [{name}]: {what}; fields are {valid}")
        fields = {key: v for key, v in table.items() if key not in _FOR_REPORTS}
        fields["options"] = tuple(fields.get("options", ()))
        methods[name] = Method(**fields)
    for name, method in methods.items():
        if method.twin_of and method.twin_of not in methods:
            raise ValueError(f"{path}: [{name}]: no method {method.twin_of!r}")
        if method.streams not in ("", "float", "integer"):
            raise ValueError(f"{path}: [{name}]: streams are `float` or `integer`")
        if ":" not in method.function:
            raise ValueError(f"{path}: [{name}]: `function` is written FILE:NAME")
    return methods


TABLE = _read()
"""Every method by name, in the order of the file."""
