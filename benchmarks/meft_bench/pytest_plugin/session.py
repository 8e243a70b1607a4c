"""Collect what tests took, also in other processes, and update baselines at the end."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from meft_bench.parent.engines.environment import project
from meft_bench.pytest_plugin import baselines, checking, marker
from meft_bench.pytest_plugin.checking import Checked
from meft_bench.pytest_plugin.options import Options

CALL_ONE = (
    "a test with the marker `meft_memory` has to call the fixture `meft_step`, or to "
    "measure with `with meft_memory(model):`"
)


class Session:
    """The results of one run of pytest.

    Args:
        config: pytest's.
        options: what the user asks for.
    """

    def __init__(self, config: pytest.Config, options: Options) -> None:
        self._options = options
        self._root = config.rootpath
        # A process of xdist checks tests; the one that started it writes.
        self._is_worker = hasattr(config, "workerinput")
        self._found: dict[str, dict[str, Any]] = {}
        """What tests took in their last attempt, by their node ids."""
        self._failed: set[str] = set()
        self._ended: set[str] = set()
        self._collected: dict[Path, set[str]] = defaultdict(set)
        self._is_part = False
        self._remarks: list[str] = []

    def check(self, checked: Checked, wanted: marker.Wanted) -> str:
        """Return why a test fails; empty if it does not.

        It is skipped where its baselines are of another torch or device only.
        """
        entry = checked.entry
        if not entry:
            return f"{checked.place} measured nothing: {CALL_ONE}"
        if not any(one.get("peak_allocated_bytes") for one in entry):
            return (
                f"{checked.place} measured nothing: no memory of {checked.device} was "
                "allocated. Is the model on that device, and the step inside of what "
                "is measured?"
            )
        if failure := checking.above_limit(entry, wanted):
            return failure
        if not self._options.checks:
            return ""
        known = self._known(checked.path, checked.name)
        before = known.get(checked.key)
        update = f"pytest {shlex.quote(checked.place)} --meft-update"
        if before is None:
            if "create" in self._options.update:
                return ""
            if known:
                self._not_comparable(known, checked.key)
            return (
                f"{checked.place} has no baseline for {checked.key}: write one with\n"
                f"  {update}=create"
            )
        differs = checking.differences(before, entry, wanted)
        if not differs or "fix" in self._options.update:
            return ""
        return f"{checked.place} {differs}\naccept it: {update}=fix"

    def _not_comparable(self, known: Iterable[str], key: str) -> NoReturn:
        """Skip a test, or fail where that is wanted (`meft_strict`)."""
        has = "; ".join(sorted(known))
        text = (
            f"not comparable: the baseline is of {has}, and this is {key}; "
            "--meft-update=create adds one"
        )
        if self._options.is_strict:
            pytest.fail(text, pytrace=False)
        pytest.skip(text)

    def _known(self, path: Path, name: str) -> dict[str, baselines.Entry]:
        file = baselines.path_of(path, self._options.folder)
        try:
            return baselines.read(file).get(name, {})
        except pytest.UsageError as error:
            pytest.fail(str(error), pytrace=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Skip a test whose baselines are of another torch or device only."""
        try:
            wanted = marker.of(item)
        except pytest.UsageError as error:
            pytest.fail(str(error), pytrace=False)
        if wanted is None or not self._options.checks or self._options.update:
            return
        if not {"meft_step", "meft_memory"} & {*getattr(item, "fixturenames", ())}:
            return
        known = self._known(item.path, item.nodeid.partition("::")[2])
        if not known or not wanted.gpu:
            return  # which device the model is on is known later
        key = checking.key_of(wanted.device)
        if key not in known:
            self._not_comparable(known, key)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """Note that not all tests run."""
        self._is_part = self._is_part or bool(items)

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Note which tests there are."""
        # Tests that failed last, and those after the one at which pytest stopped, are
        # chosen without a report of what was left out.
        chosen = (config.getoption(name, None) for name in ("lf", "stepwise"))
        self._is_part = self._is_part or any(chosen)
        self._is_part = self._is_part or any("::" in arg for arg in config.args)
        for item in items:
            self._collected[item.path].add(item.nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what a test took, and whether any part of it has failed.

        Its teardown and its subtests have reports of their own.
        """
        if self._is_worker:
            return
        name = report.nodeid
        if report.when == "setup":  # of the first attempt, or of another one
            self._found.pop(name, None)
            self._failed.discard(name)
            self._ended.discard(name)
        if report.failed:
            self._failed.add(name)
        if report.when == "teardown":
            self._ended.add(name)
        found = getattr(report, "meft", None)
        if found is not None:
            self._found[name] = found

    def pytest_sessionfinish(self) -> None:
        """Write records, and update baselines."""
        if self._is_worker:
            return
        if self._options.records is not None:
            commit, is_dirty = project(self._root)
            its = {"project_commit": commit, "project_dirty": is_dirty}
            lines = [
                json.dumps({**one, "path": self._short(one), "environment": its}) + "\n"
                for one in self._found.values()
            ]
            self._options.records.write_text("".join(lines), encoding="utf-8")
        by_path: dict[Path, list[dict[str, Any]]] = defaultdict(list)
        for name, one in self._found.items():
            if not one["is_checked"]:
                continue
            if name in self._ended - self._failed:
                by_path[Path(one["path"])].append(one)
            elif self._options.update & {"create", "fix"}:
                self._remarks.append(f"{name} has failed, so its baseline stays")
        for path in sorted({*by_path, *self._collected}):
            try:
                self._update(path, by_path[path])
            except pytest.UsageError as error:  # of a file that is no baseline
                self._remarks.append(str(error))

    def _short(self, one: dict[str, Any]) -> str:
        """Return the path of a test from the root of the project, as it is one."""
        path = Path(one["path"])
        is_inside = path.is_relative_to(self._root)
        return (path.relative_to(self._root) if is_inside else path).as_posix()

    def _update(self, path: Path, found: list[dict[str, Any]]) -> None:
        """Update the baselines of a file of tests.

        Args:
            path: the file of tests.
            found: what those of its tests took that have passed.
        """
        file = baselines.path_of(path, self._options.folder)
        before = baselines.read(file)
        after = {test: dict(entries) for test, entries in before.items()}
        for one in found:
            entries = after.setdefault(one["name"], {})
            old = entries.get(one["key"])
            new = baselines.with_reasons(old, one["entry"], self._options.reason)
            if (old is None and "create" in self._options.update) or (
                old is not None and old != new and "fix" in self._options.update
            ):
                entries[one["key"]] = new
            elif old is not None and checking.is_better(old, new):
                self._remarks.append(
                    f"{path.name}::{one['name']} takes less than its baseline; "
                    "--meft-update=fix keeps that"
                )
        # Where other processes collect, it is not known here which tests there are.
        here = self._collected.get(path)
        is_known = here is not None and not self._is_part
        unused = sorted(before.keys() - (here or set())) if is_known else []
        if unused and "trim" in self._options.update:
            for test in unused:
                del after[test]
        elif unused:
            self._remarks.append(
                f"{file}: no test is called {', '.join(unused)}; --meft-update=trim "
                "removes what they took"
            )
        if after != before and self._options.update:
            baselines.write(file, after)
            self._remarks.append(f"wrote {file}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say what was written, what is better, and what is unused."""
        if self._remarks:
            terminalreporter.section("memory")
            for remark in self._remarks:
                terminalreporter.write_line(remark)
