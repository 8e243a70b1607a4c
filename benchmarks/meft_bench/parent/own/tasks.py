"""Tasks of the user: rows in files, or a function.

csv:FILE                   rows with the usual columns, a fifth of them scored
[task.NAME]                the same in full: files, columns, kind, metric
python:FILE.py:FUNCTION    `load(cell, source) -> Task`
"""

from pathlib import Path
from typing import Any

from meft_bench.parent.own import digests, packages, python_code, rows
from meft_bench.shared.own import EVALUATE, PYTHON, Own
from meft_bench.shared.registry import nearest
from meft_bench.shared.row_kinds import (
    COLUMN_FIELDS,
    KINDS,
    MAX_NEW_TOKENS,
    SHARE,
    RowKind,
)

KEYS = (
    *("train", "validation", "evaluation", "kind", *COLUMN_FIELDS),
    *("metric", "max_new_tokens"),
)
"""What a table of a task may have."""


def find(text: str, folder: Path) -> Own | None:
    """Return a task of the user; None if the text does not name one.

    Args:
        text: what the sweep says.
        folder: where relative paths start.

    Raises:
        ValueError: there is no such file or function, or it is not right.
    """
    if text.startswith(PYTHON):
        place, name, digest = python_code.find(text, folder, "task")
        return Own(value=digests.value(PYTHON, name, digest), place=place)
    return in_full({"train": text}, folder) if rows.is_place(text) else None


def in_full(table: dict[str, Any], folder: Path) -> Own:
    """Return the task of a table.

    Args:
        table: the table, by the names of `KEYS`.
        folder: where relative paths start.

    Raises:
        ValueError: something in it is wrong.
    """
    for key in table:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}; {nearest(key, KEYS)}")
    if "train" not in table:
        raise ValueError("no `train`; name the rows as train = 'csv:FILE'")
    files = {"train": rows.find(table["train"], folder, "train")}
    evaluation = table.get("evaluation", SHARE)
    for split in ("validation", "evaluation"):
        if isinstance(table.get(split), str):
            files[split] = rows.find(table[split], folder, split)
    if "evaluation" not in files:
        _check_share(evaluation)
    _check_different(files)
    columns = files["train"][1]
    name = _kind(table, columns)
    kind = KINDS[name]
    named = _columns(table, name, kind)
    for split, (_, found, _) in files.items():
        for field, column in named.items():
            for one in column if isinstance(column, list) else [column]:
                rows.check_column(one, found, f"the file of `{split}`", field)
    metric, metric_digest = _metric(table.get("metric"), name, kind, folder)
    tokens = table.get("max_new_tokens", MAX_NEW_TOKENS)
    _check_tokens(table, name)
    shown: dict[str, Any] = {"kind": name, **named}
    if "evaluation" not in files:
        shown["evaluation"] = evaluation
    if name == "generation":
        shown["max_new_tokens"] = tokens
    its = {split: digest for split, (_, _, digest) in files.items()}
    content = {**shown, "files": its, "metric": metric_digest or metric}
    places = {split: place for split, (place, _, _) in files.items()}
    whole = {**shown, **places, "metric": metric, "digests": its}
    value = digests.value("data:", name, digests.of_json(content))
    return Own(value=value, place=value, rows=whole)


def _check_share(share: Any) -> None:
    is_number = isinstance(share, int | float) and not isinstance(share, bool)
    if not is_number or not 0 < share < 1:
        raise ValueError(
            f"`evaluation` = {share!r} should be a file, such as 'csv:FILE', or the "
            "share of the rows of `train` to score, a number between 0 and 1"
        )


def _check_different(files: dict[str, tuple[str, list[str], str]]) -> None:
    """Raise for two splits with the same content: the score would be of known rows."""
    splits: dict[str, str] = {}
    for split, (_, _, digest) in files.items():
        if digest in splits:
            raise ValueError(
                f"`{splits[digest]}` and `{split}` have the same content: the score "
                "would be that of rows that were trained with; name another file, or "
                f"a share, evaluation = {SHARE}"
            )
        splits[digest] = split


def _kind(table: dict[str, Any], columns: list[str]) -> str:
    """Return the kind of a task, from its name or else from its columns."""
    if "kind" in table:
        name = table["kind"]
        if name not in KINDS:
            raise ValueError(f"unknown kind {name!r}; {nearest(str(name), KINDS)}")
        return str(name)
    for name, kind in KINDS.items():
        if name != "regression" and all(
            field in table or field in columns for field in kind.fields
        ):
            return name
    ways = "; ".join(f"{', '.join(k.fields)} for {n}" for n, k in KINDS.items())
    raise ValueError(
        f"the columns {', '.join(columns)[:200]} show no kind of task: name columns as "
        f"fields, such as text = 'COLUMN', of {ways}"
    )


def _columns(
    table: dict[str, Any], name: str, kind: RowKind
) -> dict[str, str | list[str]]:
    """Return the columns of a task by the fields that name them."""
    allowed = (*kind.fields, *kind.optional)
    found: dict[str, str | list[str]] = {}
    for field in COLUMN_FIELDS:
        if field in table and field not in allowed:
            raise ValueError(
                f"`{field}` is no field of kind {name!r}, which has "
                f"{', '.join(allowed)}: leave it out, or name another kind"
            )
        if field not in allowed or (field in kind.optional and field not in table):
            continue
        column = table.get(field, field)
        several = field == "options" and isinstance(column, list)
        if not isinstance(column, str) and not (
            several and column and all(isinstance(one, str) for one in column)
        ):
            words = "a column" + (", or a list of them" if field == "options" else "")
            raise ValueError(f"`{field}` = {column!r} should be the name of {words}")
        found[field] = column
    return found


def _metric(
    given: Any, name: str, kind: RowKind, folder: Path
) -> tuple[str, str | None]:
    """Return the metric of a task, and the digest of its code if it is the user's."""
    if given is None:
        return kind.metrics[0], None
    known = [*kind.metrics, *(packages.names("metric") if kind.has_own_metrics else ())]
    ways = ["python:FILE.py:FUNCTION", "evaluate:FILE.py"]
    if not isinstance(given, str):
        raise ValueError(f"`metric` = {given!r} should be a string")
    if given in kind.metrics:
        return given, None
    is_own = given.startswith((PYTHON, EVALUATE)) or given in known
    if is_own and not kind.has_own_metrics:
        raise ValueError(
            f"`metric` = {given!r}: kind {name!r} is scored by the likelihood of its "
            "tokens; leave `metric` out"
        )
    if not is_own:
        hint = nearest(given, [*known, *ways] if kind.has_own_metrics else known)
        raise ValueError(f"unknown metric {given!r} of kind {name!r}; {hint}")
    text = packages.find("metric", given) or given
    if text.startswith(PYTHON):
        place, function, digest = python_code.find(text, folder, "metric")
        return place, f"{function}-{digest}"
    where = text.removeprefix(EVALUATE)
    inside = folder / where / f"{Path(where).name}.py"
    if inside.is_file():  # the layout of evaluate: a folder with a file of its name
        where = str(inside)
    elif "." not in where:
        raise ValueError(
            f"metric {given!r}: {where!r} is neither the file of a module of evaluate, "
            "its folder, nor an installed module, and evaluate would fetch it from the "
            f"hub: save it, and name it as {EVALUATE}FILE.py"
        )
    place, _, digest = python_code.find_module(where, given, folder, "metric")
    return f"{EVALUATE}{place}", digest


def _check_tokens(table: dict[str, Any], name: str) -> None:
    if "max_new_tokens" not in table:
        return
    tokens = table["max_new_tokens"]
    if name != "generation":
        raise ValueError(
            f"`max_new_tokens` = {tokens!r} has no effect in kind {name!r}, which "
            "generates no text: leave it out"
        )
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"`max_new_tokens` = {tokens!r} should be an integer above 0")
