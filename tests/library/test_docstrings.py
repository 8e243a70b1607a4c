"""`help()` explains what the library exports: every field, argument and result."""

import dataclasses
import inspect
import re
from typing import Any

import pytest

import meft
import meft.testing

CONFIGS = [meft.ReversibleConfig, meft.SparseConfig]
FUNCTIONS = [
    value
    for module in (meft, meft.testing)
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and value.__module__.startswith("meft")
    and not name.startswith("_")
    and (module is meft.testing) == (value.__module__ == "meft.testing")
]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_explained_with_its_default(config: Any) -> None:
    """In the class's docstring, in the order of the fields, and there only."""
    text = inspect.getdoc(config) or ""
    section = text.partition("Attributes:\n")[2].partition("\nRaises:")[0]
    found = re.split(r"^ {4}(\w+) \((.+?)\): ", section, flags=re.MULTILINE)[1:]
    names, kinds, texts = found[0::3], found[1::3], found[2::3]
    fields = dataclasses.fields(config)
    assert names == [field.name for field in fields]
    for field, kind, meaning in zip(fields, kinds, texts, strict=True):
        annotated = field.type
        shown = annotated.__name__ if inspect.isclass(annotated) else str(annotated)
        assert kind == shown, field.name
        words = " ".join(meaning.split())
        is_required = field.default is dataclasses.MISSING
        end = "Required." if is_required else f"Default: `{field.default!r}`."
        assert words.endswith(end), field.name
    source = inspect.getsource(config)
    assert not re.search(r'^    \w+: .*\n    """', source, re.MULTILINE)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_argument_and_result_is_explained(function: Any) -> None:
    """Of every function that `meft` exports and of `meft.testing`."""
    text = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    arguments = text.partition("Args:\n")[2]
    for name in signature.parameters:
        assert re.search(rf"^ {{4}}{name}: ", arguments, re.MULTILINE), name
    returns = re.search(r"^(Returns|Yields):$", text, re.MULTILINE)
    assert returns or signature.return_annotation in (None, "None")
