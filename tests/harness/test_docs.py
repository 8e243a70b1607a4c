import ast
import dataclasses
import graphlib
import re
from pathlib import Path

import pytest

import meft
import meft.errors
import meft.testing
from meft_bench.parent import cli, harness, output
from meft_bench.shared.measurement import FIELDS
from meft_bench.shared.record import Environment

DOCS = Path(__file__).parents[2] / "docs"


def test_the_reference_has_every_public_name() -> None:
    """Once, of `meft` and of `meft.testing`; the errors are there as a module."""
    text = (DOCS / "reference.md").read_text()
    errors = {name for name in meft.__all__ if hasattr(meft.errors, name)}
    for name in {*meft.__all__} - errors - {"__version__"}:
        assert text.count(f"::: meft.{name}\n") == 1, name
    assert "::: meft.errors\n" in text
    for name in ("check_reversible", "ReversibleReport", "saved_bytes", "tolerance"):
        assert hasattr(meft.testing, name)
        assert f"- {name}\n" in text


def test_every_number_is_explained() -> None:
    """docs/numbers.md names every field that a record can hold."""
    text = (DOCS / "numbers.md").read_text()
    fields = [*FIELDS, *(field.name for field in dataclasses.fields(Environment))]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_exit_code_is_explained() -> None:
    """benchmarks/README.md has a row for each, and no other."""
    text = (DOCS.parent / "benchmarks" / "README.md").read_text()
    _, _, table = text.partition("**Exit codes**")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    constants = [*vars(harness).items(), *vars(output).items(), *vars(cli).items()]
    assert codes == {v for name, v in constants if name.startswith("EXIT_")}


@pytest.mark.parametrize(
    "package", ["meft", "benchmarks/meft_bench", "reports/meft_reports"]
)
def test_every_file_is_in_the_picture(package: str) -> None:
    """In docs/architecture.md or in the docstring of its folder, which is there too."""
    text = (DOCS / "architecture.md").read_text()
    root = DOCS.parent / package
    missing = []
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        if not files or folder.name == "__pycache__":
            continue
        init = (folder / "__init__.py").read_text()
        if "pkgutil" in init:  # all files in it are of one kind
            files = []
        where = folder.relative_to(root)
        if folder != root and f"`{where}/`" not in text and f"`{where}/" not in text:
            missing.append(f"{where}/")
        listed = re.findall(r"\w+", init)
        missing += [
            f"{path.relative_to(root)}"
            for path in files
            if path.name not in text
            and path.stem not in listed
            and not path.name.startswith("__")
        ]
    assert missing == []


def test_no_two_folders_of_the_harness_import_each_other() -> None:
    """Directly or around a circle."""
    root = DOCS.parent / "benchmarks"
    arrows: dict[str, set[str]] = {}
    for path in (root / "meft_bench").rglob("*.py"):
        folder = ".".join(path.relative_to(root).parent.parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{name.name}" for name in node.names]
            elif isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            else:
                continue
            for name in names:
                if name.startswith("meft_bench"):
                    arrows.setdefault(folder, set()).add(_folder(root, name))
    order = {folder: targets - {folder} for folder, targets in arrows.items()}
    list(graphlib.TopologicalSorter(order).static_order())  # raises at a circle


def _folder(root: Path, name: str) -> str:
    """The folder that a dotted name of a module, or of something in it, lies in."""
    parts = name.split(".")
    while not root.joinpath(*parts).is_dir():
        parts.pop()
    return ".".join(parts)


def test_every_class_has_a_name_of_its_own() -> None:
    """In the harness and the reports; both read the same table of methods."""
    places: dict[str, list[str]] = {}
    for package in ("benchmarks/meft_bench", "reports/meft_reports"):
        for path in sorted((DOCS.parent / package).rglob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(path.name)
    twice = {name: files for name, files in places.items() if len(files) > 1}
    # Neither package imports the other, and both read the same data files.
    assert twice == {
        "FieldKind": ["field_kinds.py", "field_kinds.py"],
        "Method": ["methods.py", "methods.py"],
    }
