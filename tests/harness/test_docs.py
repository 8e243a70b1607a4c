import dataclasses
from pathlib import Path

import pytest

from meft_bench.record import Environment, Measurement

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", [Measurement, Environment])
def test_every_number_is_explained(kind: type) -> None:
    """docs/numbers.md names every field that a record can hold."""
    text = (DOCS / "numbers.md").read_text()
    fields = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_file_is_in_the_picture() -> None:
    """docs/architecture.md names every module of the library and the harness."""
    text = (DOCS / "architecture.md").read_text()
    root = DOCS.parent
    modules = [
        path.name
        for folder in ("meft", "benchmarks/meft_bench")
        for path in (root / folder).glob("*.py")
        if not path.name.startswith("__")
    ]
    assert [name for name in modules if name not in text] == []
