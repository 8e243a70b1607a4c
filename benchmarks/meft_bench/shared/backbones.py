"""The table of model types: what can be made of each, and its named shapes.

The data is `backbones.toml`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meft_bench.shared import tables
from meft_bench.shared.field_kinds import FLAG, TABLES, object_in, some_of

CLASSES = "meft_bench.child.backbones"
"""Package of the classes of classifiers that are not transformers' own."""
DEFAULT_IMAGE_SIZE, DEFAULT_PATCH_SIZE = 224, 16
"""Pixels a side of images and patches of transformers' ViT."""
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
    has_eager_attention_only: bool = False
    """Whether transformers has no other attention for it."""
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Changes to transformers' default config, by the name of the shape."""


_SCHEMA = {
    "models": some_of(MODELS),
    "classifier": object_in(Path(__file__).parents[1] / "child" / "backbones"),
    "positions_start_after_padding": FLAG,
    "has_eager_attention_only": FLAG,
    "shapes": TABLES,
}


def _read() -> dict[str, ModelType]:
    types: dict[str, ModelType] = {}
    type_of: dict[str, str] = {}
    for name, fields in tables.read(tables.BACKBONES, ["models"], _SCHEMA).items():
        types[name] = ModelType(**fields | {"models": tuple(fields["models"])})
        for shape in types[name].shapes:
            if shape in type_of:
                raise tables.wrong_value(
                    tables.BACKBONES,
                    name,
                    "shapes",
                    shape,
                    f"another name: [{type_of[shape]}] has a shape of this name",
                )
            type_of[shape] = name
    return types


TABLE = _read()
"""Every model type by name, in the order of the file."""


def problem_type(
    num_labels: int,
) -> Literal["regression", "single_label_classification"]:
    """Return transformers' name of what a head of this many outputs does.

    One output is a number, and not the only class.
    """
    return "regression" if num_labels == 1 else "single_label_classification"


def num_image_tokens(shape: str) -> int | None:
    """Return the number of tokens that a named shape makes of an image.

    Args:
        shape: the name of a shape; None is returned for one that reads text.
    """
    for kind in TABLE.values():
        if shape in kind.shapes and "image-classifier" in kind.models:
            changes = kind.shapes[shape]
            side = int(changes.get("image_size", DEFAULT_IMAGE_SIZE))
            patch = int(changes.get("patch_size", DEFAULT_PATCH_SIZE))
            return 1 + int(side // patch) ** 2
    return None


def types_of(*models: str) -> tuple[str, ...]:
    """Return the model types of which any of these models can be made, in order."""
    return tuple(
        sorted(name for name, kind in TABLE.items() if {*models} & {*kind.models})
    )
