"""Whether values that were read from JSON have the types of their annotations."""

import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin

MAX_LENGTH = 60
"""Number of characters of a wrong value that a message shows."""


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value of JSON is of a type.

    Args:
        value: the value; an integer also is a float, but a boolean is neither.
        annotation: a class, `list[...]`, `dict[str, ...]`, `Any`, or a union of these
            and None.
    """
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is types.UnionType:
        return any(fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(fits(each, parts[0]) for each in value)
    if kind is dict:
        return isinstance(value, dict) and all(
            fits(each, parts[1]) for each in value.values()
        )
    if annotation is Any:
        return True
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def check(fields: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the first field of another type than its annotation.

    Args:
        fields: values by name; names without an annotation are not checked.
        annotations: types by name.
    """
    for name, value in fields.items():
        if name in annotations and not fits(value, annotations[name]):
            given = repr(value)
            if len(given) > MAX_LENGTH:
                given = f"{given[:MAX_LENGTH]}…"
            kind = annotations[name]
            words = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"`{name}` = {given} should be of type {words}")
