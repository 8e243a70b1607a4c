"""The table of model types: what can be made of each, and its named shapes.

The data is `backbones.toml`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from meft_bench.shared import tables
from meft_bench.shared.tables import TableError

CLASSES = "meft_bench.child.backbones"
"""Package of the classes of classifiers that are not transformers' own."""
MODELS = ("classifier", "image-classifier", "causal-lm", "seq2seq-lm")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelType:
    """One `model_type` of transformers' configs."""

    models: tuple[str, ...]
    """Those of `MODELS` that can be made of it."""
    classifier: str = ""
    """`FILE:NAME` in `CLASSES`; empty for transformers' own."""
    positions_start_after_padding: bool = False
    """Whether the first positions are those of padding tokens."""
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes to transformers' default config, by the name of the shape."""


def _read() -> dict[str, ModelType]:
    known = {field.name for field in dataclasses.fields(ModelType)}
    types = {}
    for name, fields in tables.read(tables.BACKBONES, "models", known).items():
        wrong = [model for model in fields["models"] if model not in MODELS]
        if wrong:
            raise TableError(
                f"{tables.BACKBONES}: [{name}]: unknown model {wrong[0]!r}; "
                f"models are {', '.join(MODELS)}"
            )
        types[name] = ModelType(**fields | {"models": tuple(fields["models"])})
    return types


TABLE = _read()
"""Every model type by name, in the order of the file."""


def types_of(*models: str) -> tuple[str, ...]:
    """Return the model types of which any of these models can be made, in order."""
    return tuple(
        sorted(name for name, kind in TABLE.items() if {*models} & {*kind.models})
    )
