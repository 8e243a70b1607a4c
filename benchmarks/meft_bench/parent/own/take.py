"""Replace what a sweep names as its user's own by what cells hold of it.

    [method.mine]                          an alias, shown in tables
    from = "python:mine.py:method"
    [task.reviews]                         a table of rows has an alias, too
    train = "csv:reviews.csv"
    [backbone.fashion]                     trained by the sweep before its cells
    from = "random:vit-tiny"
    train = { task = "fashion-mnist", max_steps = 1000 }

    [[matrix]]
    axes = { method = ["full", "mine", "peft:lora.json"] }

The table that remains has no aliases, paths or places, only digests
(`meft_bench.shared.own`), and is read like any other sweep.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meft_bench.parent.own import backbones, methods, packages, tasks
from meft_bench.shared import registry
from meft_bench.shared.own import Own

Finder = Callable[[str, Path], Own | None]

FINDERS: dict[str, Finder] = {
    "method": methods.find,
    "backbone": backbones.find,
    "task": tasks.find,
}
FIELDS = {
    "method": "method",
    "reference": "method",
    "backbone": "backbone",
    "task": "task",
}
"""Fields of a cell that may be of the user, and of which kind they are."""
BUILT_IN: dict[str, Mapping[str, object]] = {
    "method": registry.METHODS,
    "backbone": registry.PACKAGED_BACKBONES,
    "task": registry.TASKS,
}
FORMS = {
    "method": ("peft:FILE.json", "python:FILE.py:FUNCTION"),
    "backbone": ("dir:PATH", "random:SHAPE"),
    "task": ("csv:FILE", "jsonl:FILE", "parquet:FILE", "dataset:DIR"),
}
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
FROM = "from"
TRAIN = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """A sweep without what is the user's own, and all that was replaced."""

    table: dict[str, Any]
    own: dict[str, Own]
    """By what cells hold."""
    spelt: dict[str, str]
    """What the sweep says, by what cells hold."""


def take(table: dict[str, Any], folder: Path) -> Taken:
    """Return a sweep with values in the place of what is its user's own.

    Args:
        table: the sweep.
        folder: where relative paths start: the folder of the sweep.

    Raises:
        ValueError: something of the user's is not there, or not right.
    """
    trained = _pop_trained(table)
    aliases = {
        kind: _aliases(kind, table[kind], folder) for kind in FINDERS if kind in table
    }
    found = _Found(aliases, folder)
    for alias, entry in trained.items():
        _check_alias("backbone", alias)
        try:
            one = _trained(entry, found)
        except ValueError as error:
            raise ValueError(f"[backbone.{alias}]: {error}") from error
        aliases["backbone"][alias] = _with_alias(one, alias)
    left = {key: value for key, value in table.items() if key not in FINDERS}
    for entry in left["matrix"] if isinstance(left.get("matrix"), list) else ():
        if isinstance(entry, dict):
            label = entry.get("name")
            try:
                _replace_in(entry, found)
            except ValueError as error:
                raise ValueError(f"matrix {label!r}: {error}") from error
    for kind, named in aliases.items():
        idle = [alias for alias, one in named.items() if one.value not in found.own]
        if idle:
            raise ValueError(
                f"[{kind}.{idle[0]}] is named by no matrix: name it as a {kind}, or "
                "remove the table"
            )
    return Taken(table=left, own=found.own, spelt=found.spelt)


class _Found:
    """What was found so far, by what cells hold."""

    def __init__(self, aliases: dict[str, dict[str, Own]], folder: Path) -> None:
        self.own: dict[str, Own] = {}
        self.spelt: dict[str, str] = {}
        self._aliases = aliases
        self._folder = folder
        self._known: dict[tuple[str, str], str] = {}

    def value(self, field: str, text: Any) -> Any:
        """Return what a cell holds for a value of a sweep."""
        kind = FIELDS.get(field)
        if kind is None or not isinstance(text, str) or text in ("", *BUILT_IN[kind]):
            return text
        if (kind, text) not in self._known:
            self._known[kind, text] = self._find(kind, text)
        return self._known[kind, text]

    def _find(self, kind: str, text: str) -> str:
        named = self._aliases.get(kind, {})
        one = named.get(text)
        if one is None:
            place = packages.find(kind, text)
            one = _find(kind, place or text, self._folder)
            if one is not None and place is not None:
                one = _with_alias(one, text)
        if one is None:
            if ":" not in text and (named or packages.names(kind)):
                names = [*named, *packages.names(kind), *BUILT_IN[kind], *FORMS[kind]]
                hint = registry.nearest(text, names)
                raise ValueError(f"unknown {kind} {text!r}; {hint}")
            return text  # of ours, or refused where it is checked
        one = dataclasses.replace(one, spelt=_without_folders(text))
        before = self.own.get(one.value)
        if before is None or (one.alias and not before.alias):
            self.own[one.value] = one
        elif one.alias and one.alias != before.alias:
            raise ValueError(
                f"{kind}s {before.alias!r} and {one.alias!r} have the same content: "
                "keep one"
            )
        self.spelt[one.value] = text
        return one.value


def _aliases(kind: str, table: Any, folder: Path) -> dict[str, Own]:
    """Return what the tables `[KIND.NAME]` of a sweep name."""
    if not isinstance(table, dict):
        raise ValueError(
            f"`{kind}` = {table!r} should be tables, written [{kind}.NAME]"
        )
    found = {}
    for alias, entry in table.items():
        where = f"[{kind}.{alias}]"
        if not isinstance(entry, dict):
            raise ValueError(
                f"`{kind}`: {alias!r} = {entry!r} should be a table, written {where}"
            )
        _check_alias(kind, alias)
        try:
            found[alias] = _with_alias(_of_table(kind, entry, folder), alias)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return found


def _check_alias(kind: str, alias: str) -> None:
    where = f"[{kind}.{alias}]"
    if not ALIAS.fullmatch(alias):
        raise ValueError(
            f"{where}: a name has letters, digits and . _ + - only, and begins "
            "with a letter or digit"
        )
    if alias in BUILT_IN[kind]:
        raise ValueError(f"{where}: the suite has a {kind} of this name: rename it")


def _pop_trained(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Remove the backbones that the sweep trains, which may name other own things."""
    tables = table.get("backbone")
    if not isinstance(tables, dict):
        return {}
    return {
        alias: tables.pop(alias)
        for alias, entry in [*tables.items()]
        if isinstance(entry, dict) and TRAIN in entry
    }


def _trained(entry: dict[str, Any], found: _Found) -> Own:
    for key in entry:
        if key not in (FROM, TRAIN):
            hint = registry.nearest(key, [FROM, TRAIN])
            raise ValueError(f"unknown key {key!r}; {hint}")
    text, train = entry.get(FROM), entry[TRAIN]
    if not isinstance(text, str):
        raise ValueError(f"`{FROM}` = {text!r} should be the name of a backbone")
    if not isinstance(train, dict):
        raise ValueError(f"`{TRAIN}` = {train!r} should be a table of fields of a cell")
    fields = {name: found.value(name, value) for name, value in train.items()}
    return backbones.trained(found.value("backbone", text), fields, found.own)


def _of_table(kind: str, entry: dict[str, Any], folder: Path) -> Own:
    if kind == "task" and FROM not in entry:
        return tasks.in_full(entry, folder)
    keys = [FROM, TRAIN] if kind == "backbone" else [FROM]
    for key in entry:
        if key not in keys:
            raise ValueError(f"unknown key {key!r}; {registry.nearest(key, keys)}")
    text = entry.get(FROM)
    forms = " or ".join(map(repr, FORMS[kind]))
    if not isinstance(text, str):
        raise ValueError(f"`{FROM}` = {text!r} should be {forms}")
    found = _find(kind, text, folder)
    if found is None:
        raise ValueError(f"`{FROM}` = {text!r} should be {forms}, of your own")
    return found


def _find(kind: str, text: str, folder: Path) -> Own | None:
    one = FINDERS[kind](text, folder)
    if one is not None and kind == "method":
        methods.check_trains(one, text)
    return one


def _with_alias(one: Own, alias: str) -> Own:
    return dataclasses.replace(one, alias=alias)


def _without_folders(text: str) -> str:
    """Return `peft:lora.json` for `peft:configs/lora.json`."""
    beginning, colon, place = text.partition(":")
    return f"{beginning}{colon}{Path(place).name}" if "/" in place else text


def _replace_in(entry: dict[str, Any], found: _Found) -> None:
    """Replace values in the parts of a matrix, in place."""
    for part in ("defaults", "axes"):
        _replace(entry.get(part), found)
    for part in ("zip", "exclude", "set"):
        several = entry.get(part)
        for table in several if isinstance(several, list) else ():
            _replace(table, found)
            if isinstance(table, dict):
                _replace(table.get("when"), found)


def _replace(table: Any, found: _Found) -> None:
    if not isinstance(table, dict):
        return
    for field, value in table.items():
        if isinstance(value, list):
            table[field] = [found.value(field, one) for one in value]
        else:
            table[field] = found.value(field, value)
