"""A function of the user: `python:FILE.py:NAME`, or `python:MODULE:NAME`.

It is found without running any code. The digest is that of the file, or of all files of
the package that has the module, and not of what these import. A module must be
installed, because a child does not look into the folder in which the command runs.
"""

import ast
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

from meft_bench.parent.own import digests
from meft_bench.shared.registry import nearest


def find(text: str, folder: Path, what: str) -> tuple[str, str, str]:
    """Return the place of an object, its name and the digest of its code.

    Args:
        text: `BEGINNING:FILE.py:NAME` or `BEGINNING:MODULE:NAME`.
        folder: where relative paths start.
        what: what it is, for messages.

    Raises:
        ValueError: there is no such file or module, or it has no such name.
    """
    beginning, _, rest = text.partition(":")
    where, _, name = rest.rpartition(":")
    if not where or not name.isidentifier():
        raise ValueError(
            f"{what} {text!r} should be {beginning}:FILE.py:FUNCTION, or "
            f"{beginning}:MODULE:FUNCTION of an installed package"
        )
    where, file, digest = find_module(where, text, folder, what)
    names = _names_in(file)
    if name not in names and "*" not in names:
        raise ValueError(
            f"{what} {text!r}: {file.name} defines no {name!r}; {nearest(name, names)}"
        )
    return f"{beginning}:{where}:{name}", name, digest


def find_module(
    where: str, text: str, folder: Path, what: str
) -> tuple[str, Path, str]:
    """Return the place of a module, its file and its digest.

    Args:
        where: `FILE.py` or `MODULE`.
        text: all of what the sweep says, for messages.
        folder: where relative paths start.
        what: what it is, for messages.

    Raises:
        ValueError: there is none, or it is not Python.
    """
    if where.endswith(".py"):
        file = (folder / where).resolve()
        if not file.is_file():
            raise ValueError(f"{what} {text!r}: there is no file {str(file)!r}")
        found = str(file), file, digests.of_file(file)
    else:
        file = _file_of(where, text, what)
        found = where, file, _of_package(where, file)
    try:
        _tree(file)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{what} {text!r}: {file}: {error}") from error
    return found


def _file_of(module: str, text: str, what: str) -> Path:
    places: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = _spec(name, places)
        if spec is None:
            raise ValueError(
                f"{what} {text!r}: no module {name!r} is installed; a file of your own "
                "is named by its path, ending in .py"
            )
        places = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"{what} {text!r}: module {module!r} is not a file of Python")
    return Path(spec.origin)


def _spec(name: str, places: Sequence[str] | None) -> ModuleSpec | None:
    """Return where a module is, without importing the packages that have it."""
    if places is None:
        # The folder in which the command runs is the first place, or an empty one.
        here = {"", str(Path.cwd())}
        places = [place for place in sys.path if place not in here]
    for finder in sys.meta_path:
        spec = finder.find_spec(name, places)
        if spec is not None and spec.origin not in ("built-in", "frozen"):
            return spec
    return None


def _of_package(module: str, file: Path) -> str:
    """Return the digest of all files of the package that has a module."""
    depth = module.count(".") + (file.name == "__init__.py")
    if not depth:
        return digests.of_file(file)
    root = file.parents[depth - 1]
    return digests.of_files(root, sorted(root.rglob("*.py")))


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _names_in(file: Path) -> set[str]:
    """Return the names that a module has at its top level; `*` if it may have more."""
    found: set[str] = set()
    for node in _tree(file).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                found |= {one.asname or one.name.partition(".")[0] for one in names}
            case ast.Assign() | ast.AnnAssign():
                places = node.targets if isinstance(node, ast.Assign) else [node.target]
                inside = (one for place in places for one in ast.walk(place))
                found |= {one.id for one in inside if isinstance(one, ast.Name)}
            case ast.If() | ast.Try() | ast.With() | ast.For():
                found.add("*")
    return found
