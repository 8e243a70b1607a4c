"""Whether values that were read from JSON have the types of their annotations."""

import functools
import types
from collections.abc import Callable, Iterable, Mapping
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
    return _test_of(annotation)(value)


def all_fit(values: Iterable[Any], annotation: Any) -> bool:
    """Return whether all of some values are of a type; see `fits`."""
    return _all_fit(annotation)(values)


@functools.cache
def _test_of(annotation: Any) -> Callable[[Any], bool]:
    """Return the function that tells whether a value is of a type."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is types.UnionType:
        tests = [_test_of(part) for part in parts]
        return lambda value: any(test(value) for test in tests)
    if kind is list:
        test_all = _all_fit(parts[0])
        return lambda value: isinstance(value, list) and test_all(value)
    if kind is dict:
        test_all = _all_fit(parts[1])
        return lambda value: isinstance(value, dict) and test_all(value.values())
    if annotation is Any:
        return lambda value: True
    exact = _exact(annotation)
    return lambda value: type(value) in exact


def _all_fit(annotation: Any) -> Callable[[Iterable[Any]], bool]:
    if annotation is Any:
        return lambda values: True
    if isinstance(annotation, type) and get_origin(annotation) is None:
        exact = _exact(annotation)
        return lambda values: exact.issuperset(map(type, values))
    test = _test_of(annotation)
    return lambda values: all(map(test, values))


def _exact(annotation: Any) -> frozenset[type]:
    return frozenset({int, float} if annotation is float else {annotation})


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
