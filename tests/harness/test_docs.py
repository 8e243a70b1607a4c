import dataclasses
import re
from pathlib import Path

import pytest

from meft_bench.parent import cli, harness, output
from meft_bench.shared.record import Environment, Measurement

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", [Measurement, Environment])
def test_every_number_is_explained(kind: type) -> None:
    """docs/numbers.md names every field that a record can hold."""
    text = (DOCS / "numbers.md").read_text()
    fields = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_exit_code_is_explained() -> None:
    """benchmarks/README.md has a row for each, and no other."""
    text = (DOCS.parent / "benchmarks" / "README.md").read_text()
    _, _, table = text.partition("**Exit codes**")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    constants = [*vars(harness).items(), *vars(output).items(), *vars(cli).items()]
    assert codes == {v for name, v in constants if name.startswith("EXIT_")}


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
