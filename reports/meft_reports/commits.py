"""The commits of a record: of the project that is measured, and of this suite.

`environment.commit` is the commit of the suite's own checkout, which an installed suite
does not have. `environment.project_commit` is that of the checkout of the folder in
which the command ran: of the project that uses the suite, or of the suite's own where
it is developed.
"""

from typing import Any

LENGTH = 8
"""Number of characters of a commit or a digest that are shown."""
Record = dict[str, Any]


def measured(record: Record) -> tuple[str | None, bool]:
    """Return the commit of the project that is measured, and whether it is dirty.

    It is the suite's where the record has no other, as in records of older code.
    """
    its = record["environment"]
    if its.get("project_commit"):
        return its["project_commit"], bool(its.get("project_dirty"))
    return its.get("commit"), bool(its.get("dirty"))


def in_words(record: Record) -> str:
    """Return the commit of the project that is measured, in words."""
    return _words(record, *measured(record))


def of_suite(record: Record) -> str:
    """Return the commit of the suite, in words."""
    its = record["environment"]
    return _words(record, its.get("commit"), bool(its.get("dirty")))


def of_project(record: Record) -> str | None:
    """Return the commit of the project in words; None if it is the suite's."""
    commit, is_dirty = measured(record)
    is_other = commit != record["environment"].get("commit")
    return _words(record, commit, is_dirty) if is_other else None


def _words(record: Record, commit: str | None, is_dirty: bool) -> str:
    digest = f"code {record['environment']['code_sha256'][:LENGTH]}"
    if not commit:
        return f"no commit ({digest})"
    changes = f" with uncommitted changes ({digest})" if is_dirty else ""
    return f"commit {commit[:LENGTH]}{changes}"
