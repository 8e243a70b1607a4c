"""A sweep: a TOML file with a question and the cells that answer it.

Each `[[matrix]]` is a product of axes (`axes`) and of lists that are iterated together
(`zip`), over common values (`defaults`), overridden by rules (`set`), without excluded
points (`exclude`). Cells that several matrices declare are run once.

    axes {a: [1, 2], b: [x, y]}          4 points
    zip  {c: [1, 2, 3], d: [u, v, w]}    times 3
    exclude {a: 1, d: [u, v]}            less 4: 8 cells

A matrix with a table of values to try, `tune`, has trials in addition,
of which the best one gives its cells their value (`meft_bench.parent.trials`).

Methods, backbones and tasks of the user's own (`meft_bench.parent.own`) are replaced by
digests first; relative paths start at the folder of the file.

The whole file is checked before anything runs. Every mistake is a `SweepError` of one
line that names the file, the invalid part and the nearest valid name.
"""

import itertools
import math
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meft_bench.parent import fields, own, trials
from meft_bench.parent.fields import Value
from meft_bench.parent.own import Taken
from meft_bench.parent.trials import Tuning
from meft_bench.shared import methods, registry, units
from meft_bench.shared.cell import Cell
from meft_bench.shared.own import Own

TIMEOUT_SECONDS = 3600.0
"""Time limit of one cell, unless the sweep sets it."""
MOST_THREADS = 4096
"""Maximum number of threads of a child, and of parallel children.

It is larger than the number of cores of any machine.
"""

_SWEEP_KEYS = (
    *("question", "caveats", "memory_limit", "timeout_seconds", "num_threads"),
    *("checks", "matrix", "method", "backbone", "task"),
)
_MATRIX_KEYS = (
    *("name", "defaults", "axes", "zip", "tune", "trial_seeds"),
    *("trial_extensions", "set", "exclude"),
)

Point = dict[str, Value]
"""Some fields of a cell by name."""
Condition = dict[str, tuple[Value, ...]]
"""Fields that must all match, each with any of several values."""


class SweepError(ValueError):
    """Raised if a sweep cannot be used; states where and why in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellOverride:
    """Fields to override wherever a condition holds."""

    when: Condition
    override: Point


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """One `[[matrix]]` with checked values."""

    name: str
    defaults: Point
    axes: tuple[tuple[Point, ...], ...]
    """Each axis or zip as the points that it iterates over; the last varies fastest."""
    rules: tuple[CellOverride, ...]
    excludes: tuple[Condition, ...]
    tune: dict[str, tuple[Value, ...]] = field(default_factory=dict)
    """Values to try by the name of a field; empty where nothing is tried."""
    trial_seeds: int = 1
    """Number of trials of each value, with a seed each."""
    trial_extensions: int = 0
    """Number of further values to try while the best one is at an end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A question and its cells."""

    name: str
    """File name without its suffix."""
    question: str
    cells: tuple[Cell, ...]
    """Cells in declared order, without duplicates."""
    num_excluded: int
    """Number of points that the matrices exclude."""
    memory_limit_bytes: int | None
    """Bytes of data each child may allocate; None sets no limit."""
    timeout_seconds: float
    num_threads: int | None
    """Number of threads of each child, for sweeps whose columns must be exact."""
    checks: tuple[str, ...] = ()
    """Programs of `registry.CHECKS` that run before the cells."""
    caveats: tuple[str, ...] = ()
    """What a reader of the results must know, a sentence or two each."""
    own: Mapping[str, Own] = field(default_factory=dict)
    """Methods, backbones and tasks of the user, by what cells hold."""
    tunings: tuple[Tuning, ...] = ()
    """Trials, with the cells that wait for them; those are not among `cells`."""
    trainings: Mapping[str, Cell] = field(default_factory=dict)
    """Cells that train backbones of others, by what the others hold."""


def load(source: str, *, device: str) -> Sweep:
    """Read a sweep that is included in the harness, by name, or any other, by path.

    Args:
        source: `quickstart`, or `path/to/mine.toml`.
        device: the device of every cell whose matrix does not name one.

    Raises:
        SweepError: there is no such sweep, or something in it is wrong.
    """
    path = find(source)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SweepError(f"{path}: not TOML: {_one_line(error)}") from error
    spelt: dict[str, str] = {}
    try:
        taken = own.take(table, path.absolute().parent)
        spelt = taken.spelt
        return _parse(path.stem, taken.table, device, _with_checked_settings(taken))
    except (ValueError, OSError) as error:  # from a value, such as a directory
        message = _one_line(error)
        for value, text in spelt.items():
            message = message.replace(value, text)
        raise SweepError(f"{path}: {message}") from error


def shipped() -> dict[str, Path]:
    """Return the sweeps that are included in the harness, by name."""
    here = Path(__file__).parents[1]
    # A wheel has the sweeps inside the package; a checkout has them next to it.
    folder = here / "sweeps" if (here / "sweeps").is_dir() else here.parent / "sweeps"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find(source: str) -> Path:
    """Return the file for a sweep's name or path.

    Raises:
        SweepError: there is none.
    """
    names = shipped()
    if source in names:
        return names[source]
    path = Path(source)
    if path.is_file():
        return path
    raise SweepError(
        f"no sweep or file {source!r}; {registry.nearest(path.stem, names)}"
    )


def expand(
    matrix: Matrix, *, device: str, own: Mapping[str, Own] | None = None
) -> Iterator[Cell]:
    """Yield the cells of one matrix, in declared order.

    Args:
        matrix: the matrix.
        device: the device of every cell that does not name one.
        own: things of the user, by what cells hold.

    Raises:
        ValueError: a rule or an exclusion matches nothing, or fields of a cell
            contradict each other.
    """
    own = own or {}
    base: Point = {"device": device, **matrix.defaults}
    idle_rules = dict(enumerate(matrix.rules))
    idle_excludes = dict(enumerate(matrix.excludes))
    for choice in itertools.product(*matrix.axes):
        point = base.copy()
        for part in choice:
            point.update(part)
        for index, rule in enumerate(matrix.rules):
            if _matches(_cell(point, own), rule.when):
                point.update(rule.override)
                idle_rules.pop(index, None)
        cell = _cell(point, own)
        hits = [i for i, out in enumerate(matrix.excludes) if _matches(cell, out)]
        for index in hits:
            idle_excludes.pop(index, None)
        if not hits:
            _check_settings(point, own)
            fields.check_together(cell)
            fields.check_family(cell, own)
            yield cell
    for rule in idle_rules.values():
        raise ValueError(f"set: when = {_show(rule.when)} matches no cell")
    for exclude in idle_excludes.values():
        raise ValueError(f"exclude: {_show(exclude)} matches no cell")


def _cell(point: Point, own: Mapping[str, Own]) -> Cell:
    method = str(point["method"])
    settings = own[method].settings if method in own else {}
    return Cell.from_json(methods.with_defaults({**settings, **point}))


def _with_checked_settings(taken: Taken) -> dict[str, Own]:
    """Return things of the user whose settings are valid values of fields."""
    found = {}
    for value, one in taken.own.items():
        try:
            settings = {n: fields.check(n, v) for n, v in one.settings.items()}
        except ValueError as error:
            raise ValueError(f"training parameters of {value!r}: {error}") from error
        found[value] = replace(one, settings=settings)
    return found


def _check_settings(point: Point, own: Mapping[str, Own]) -> None:
    """Raise if a sweep and the training parameters of a method differ."""
    method, reference = str(point["method"]), str(point.get("reference", ""))
    if reference in own and own[reference].settings:
        raise ValueError(
            f"`reference` = {reference!r} has training parameters, and a reference "
            "trains like the method it is compared with: name its adapter_config.json"
        )
    for name, value in own[method].settings.items() if method in own else ():
        if point.get(name, value) != value:
            raise ValueError(
                f"`{name}` = {point[name]!r} in the sweep, and the training parameters "
                f"of method {method!r} have {value!r}: leave it out of the sweep for "
                "this method, or out of the parameters"
            )


def _matches(cell: Cell, condition: Condition) -> bool:
    return all(getattr(cell, name) in values for name, values in condition.items())


def _show(condition: Condition) -> str:
    parts = (
        f"{name} = {values[0]!r}" if len(values) == 1 else f"{name} = {list(values)!r}"
        for name, values in condition.items()
    )
    return "{" + ", ".join(parts) + "}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# Parsing: conversion of TOML tables to the objects above.


def _parse(
    name: str, table: dict[str, Any], device: str, own: Mapping[str, Own]
) -> Sweep:
    _check_keys(table, _SWEEP_KEYS)
    question = table.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError("`question` is missing; state the question in one sentence")
    caveats = _caveats(table)
    tables = _tables(table.get("matrix", []), "matrix")
    if not tables and not table.get("checks"):
        raise ValueError("no [[matrix]] and no `checks`; declare at least one")
    cells: dict[Cell, None] = {}
    tunings: dict[Tuning, None] = {}
    num_excluded = 0
    names: list[str] = []
    for index, entry in enumerate(tables, start=1):
        label = entry.get("name")
        if not isinstance(label, str) or not label:
            raise ValueError(f"matrix number {index}: `name` is missing")
        if label in names:
            raise ValueError(f"two matrices are named {label!r}; rename one")
        names.append(label)
        matrix, kept = _cells(label, entry, device, own)
        if matrix.tune:
            its = trials.tunings_of(
                kept, matrix.tune, matrix.trial_seeds, matrix.trial_extensions
            )
            tunings.update(dict.fromkeys(its))
        else:
            cells.update(dict.fromkeys(kept))
        num_excluded += math.prod(map(len, matrix.axes)) - len(kept)
    trials.check_numbers(tunings)
    return Sweep(
        name=name,
        question=question,
        cells=tuple(cells),
        num_excluded=num_excluded,
        memory_limit_bytes=_memory_limit(table),
        timeout_seconds=_timeout(table),
        num_threads=_num_threads(table),
        checks=_checks(table),
        caveats=caveats,
        own=own,
        tunings=tuple(tunings),
        trainings=_trainings(device, own),
    )


def _caveats(table: dict[str, Any]) -> tuple[str, ...]:
    caveats = table.get("caveats", [])
    if not isinstance(caveats, list):
        raise ValueError(f"`caveats` = {caveats!r} should be a list of sentences")
    for caveat in caveats:
        if not isinstance(caveat, str) or not caveat.strip():
            raise ValueError(f"`caveats`: {caveat!r} is not a sentence")
    return tuple(" ".join(caveat.split()) for caveat in caveats)


def _cells(
    label: str, entry: dict[str, Any], device: str, own: Mapping[str, Own]
) -> tuple[Matrix, list[Cell]]:
    """Return a matrix and its cells."""
    try:
        matrix = _matrix(label, entry)
        cells = list(expand(matrix, device=device, own=own))
        if not cells:
            raise ValueError("every cell is excluded")
        trials.check(matrix.tune, cells, matrix.trial_seeds, matrix.trial_extensions)
        for cell in cells if matrix.tune else ():
            _check_settings({"method": cell.method, **_first(matrix.tune)}, own)
    except ValueError as error:
        raise ValueError(f"matrix {label!r}: {error}") from error
    return matrix, cells


def _trainings(device: str, own: Mapping[str, Own]) -> dict[str, Cell]:
    """Return the cells that train backbones, by what other cells hold of these."""
    found = {}
    for value, one in own.items():
        if not one.training:
            continue
        try:
            point = _point(one.training, "train")
            matrix = Matrix(
                name=one.alias, defaults=point, axes=(), rules=(), excludes=()
            )
            (found[value],) = expand(matrix, device=device, own=own)
            if found[value].parallel == "fsdp2":
                raise ValueError(
                    "`parallel` = 'fsdp2' leaves shards, of which no backbone is "
                    "saved: take 'ddp'"
                )
        except ValueError as error:
            raise ValueError(f"[backbone.{one.alias}]: {error}") from error
    return found


def _first(tune: Mapping[str, Sequence[Value]]) -> Point:
    return {name: values[0] for name, values in tune.items()}


def _memory_limit(table: dict[str, Any]) -> int | None:
    value = table.get("memory_limit")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f'`memory_limit` = {value!r} should be text, like "8GiB"')
    try:
        return units.parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"`memory_limit`: {error}") from error


def _timeout(table: dict[str, Any]) -> float:
    value = table.get("timeout_seconds", TIMEOUT_SECONDS)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"`timeout_seconds` = {value!r} should be a number above 0")
    return float(min(value, sys.float_info.max))  # `inf` sets no limit


def _num_threads(table: dict[str, Any]) -> int | None:
    value = table.get("num_threads")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`num_threads` = {value!r} should be an integer above 0")
    if value > MOST_THREADS:
        raise ValueError(
            f"`num_threads` = {value!r} should be at most {MOST_THREADS:,}"
        )
    return value


def _checks(table: dict[str, Any]) -> tuple[str, ...]:
    names = table.get("checks", [])
    if not isinstance(names, list):
        raise ValueError(f"`checks` = {names!r} should be a list of names")
    for name in names:
        if name not in registry.CHECKS:
            hint = registry.nearest(str(name), registry.CHECKS)
            raise ValueError(f"`checks`: unknown check {name!r}; {hint}")
    return tuple(names)


def _matrix(name: str, table: dict[str, Any]) -> Matrix:
    _check_keys(table, _MATRIX_KEYS)
    defaults = _point(_table(table.get("defaults", {}), "defaults"), "defaults")
    axes = [
        tuple({field: value} for value in values)
        for field, values in _lists(table.get("axes", {}), "axes").items()
    ]
    axes += [_zipped(entry) for entry in _tables(table.get("zip", []), "zip")]
    tune = _lists(table.get("tune", {}), "tune")
    for entry in _tables(table.get("set", []), "set"):
        _check_once([list(tune), [name for name in entry if name != "when"]])
    _check_once([list(defaults), *(list(axis[0]) for axis in axes), list(tune)])
    if "method" not in defaults and not any("method" in axis[0] for axis in axes):
        raise ValueError("no `method`; name it in defaults, axes or zip")
    return Matrix(
        name=name,
        defaults=defaults,
        axes=tuple(axes),
        tune=tune,
        trial_seeds=_whole_number(table, "trial_seeds", 1),
        trial_extensions=_whole_number(table, "trial_extensions", 0),
        rules=tuple(_rule(entry) for entry in _tables(table.get("set", []), "set")),
        excludes=tuple(
            _condition(entry, "exclude")
            for entry in _tables(table.get("exclude", []), "exclude")
        ),
    )


def _whole_number(table: dict[str, Any], name: str, least: int) -> int:
    """Return the value of a key, or the least that it may be."""
    value = table.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` = {value!r} should be an integer of at least {least}"
        )
    return value


def _zipped(table: dict[str, Any]) -> tuple[Point, ...]:
    lists = _lists(table, "zip")
    if not lists:
        raise ValueError("zip: an empty table; name the lists that move together")
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise ValueError(f"zip: lists of unequal length ({shown})")
    rows = list(zip(*lists.values(), strict=True))
    for row in rows:
        if rows.count(row) > 1:
            shown = ", ".join(f"{n} = {v!r}" for n, v in zip(lists, row, strict=True))
            raise ValueError(f"zip: {{{shown}}} is given twice; keep one")
    return tuple(dict(zip(lists, row, strict=True)) for row in rows)


def _rule(table: dict[str, Any]) -> CellOverride:
    override = {name: value for name, value in table.items() if name != "when"}
    if not override:
        raise ValueError(
            "set: nothing to set; name at least one field in addition to `when`"
        )
    when = _table(table.get("when", {}), "set: when")
    return CellOverride(
        when=_condition(when, "set: when"), override=_point(override, "set")
    )


def _condition(table: dict[str, Any], where: str) -> Condition:
    if not table:
        raise ValueError(f"{where}: no condition; name at least one field")
    return {
        name: _values(name, value if isinstance(value, list) else [value], where)
        for name, value in table.items()
    }


def _point(table: dict[str, Any], where: str) -> Point:
    return {name: _values(name, [value], where)[0] for name, value in table.items()}


def _lists(table: object, where: str) -> dict[str, tuple[Value, ...]]:
    lists: dict[str, tuple[Value, ...]] = {}
    for name, values in _table(table, where).items():
        _known(name, where)
        if not isinstance(values, list):
            raise ValueError(f"{where}: `{name}` = {values!r} should be a list")
        lists[name] = _values(name, values, where)
        if len(set(lists[name])) < len(values) and where in ("axes", "tune"):
            raise ValueError(f"{where}: `{name}` names a value twice")
    return lists


def _values(name: str, values: list[Any], where: str) -> tuple[Value, ...]:
    _known(name, where)
    if not values:
        raise ValueError(f"{where}: `{name}` is empty")
    try:
        return tuple(fields.check(name, value) for value in values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _known(name: str, where: str) -> None:
    try:
        fields.check_name(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(table: dict[str, Any], valid: Sequence[str]) -> None:
    for key in table:
        if key not in valid:
            raise ValueError(f"unknown key {key!r}; {registry.nearest(key, valid)}")


def _check_once(groups: Iterable[Iterable[str]]) -> None:
    names = [name for group in groups for name in group]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"`{name}` is given twice; keep it in one of defaults, axes, zip, "
                "tune and set"
            )


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r} should be a table")
    return value


def _tables(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: should be tables, written [[...]]")
    return [_table(entry, where) for entry in value]
