"""The plugin of pytest, in runs of pytest of its own."""

import importlib
import importlib.metadata
import json
import os
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meft_bench.pytest_plugin import baselines, marker

pytest.importorskip("xdist")
# Imported before the runs, each of which forgets what it has imported.
for _name in ("meft_bench.pytest_plugin.measuring", "meft_reports.breakdown"):
    importlib.import_module(_name)

pytest_plugins = ["pytester"]

STEP = """
import pytest, torch
from torch import nn

def made(width=8):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 16))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)

@pytest.mark.meft_memory(MARKER)
def test_step(meft_step):
    model, optimizer = made(WIDTH)
    seen = meft_step(model, torch.ones(4, 16), optimizer, lambda y: y.sum())
    assert seen.saved_bytes > 0
"""
# Where the package is installed, pytest finds the plugin by itself.
FOUND = importlib.metadata.entry_points(group="pytest11", name="meft")
NAMED = () if FOUND else ("-p", "meft_bench.pytest_plugin")
PLUGIN = (*NAMED, "-p", "no:cacheprovider")


@pytest.fixture(autouse=True)
def outside_of_ci(monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester) -> None:
    monkeypatch.delenv("CI", raising=False)
    pytester.makeini("[pytest]")


def step(pytester: pytest.Pytester, *, width: int = 8, marker: str = "") -> None:
    text = STEP.replace("WIDTH", str(width)).replace("MARKER", marker)
    pytester.makepyfile(test_it=text)


def run(pytester: pytest.Pytester, *words: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess(*PLUGIN, *words)


def baseline(pytester: pytest.Pytester) -> dict[str, Any]:
    path = pytester.path / "__meft__" / "test_it.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def test_a_baseline_is_created_and_holds(pytester: pytest.Pytester) -> None:
    step(pytester)
    missing = run(pytester)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*test_step has no baseline for torch *, cpu*"])
    missing.stdout.fnmatch_lines(["*--meft-update=create"])
    assert baseline(pytester) == {}
    run(pytester, "--meft-update=create").assert_outcomes(passed=1)
    ((entry,),) = [list(each.values()) for each in baseline(pytester).values()]
    (seen,) = entry
    assert seen["memory_breakdown"]["peak_bytes"] == seen["peak_allocated_bytes"]
    before = (pytester.path / "__meft__" / "test_it.json").read_bytes()
    run(pytester).assert_outcomes(passed=1)
    run(pytester, "--meft-update=create,fix,trim").assert_outcomes(passed=1)
    assert (pytester.path / "__meft__" / "test_it.json").read_bytes() == before


def test_more_memory_fails_and_says_what_grew(pytester: pytest.Pytester) -> None:
    step(pytester)
    run(pytester, "--meft-update=create")
    step(pytester, width=32)
    found = run(pytester)
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(
        [
            "*takes more memory than its baseline*",
            "saved: * → * bytes, +*allowed 0",
            "*saved*in forward*float32 [[]4, *] → float32 [[]4, 32]",
            "peak_allocated: *",
            "*parameters*",
            "accept it: pytest *--meft-update=fix",
        ]
    )
    run(pytester, "--meft-update=fix").assert_outcomes(passed=1)
    run(pytester).assert_outcomes(passed=1)
    step(pytester)
    less = run(pytester)
    less.assert_outcomes(passed=1)
    less.stdout.fnmatch_lines(["*takes less than its baseline*"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "errors"),
    [
        ("saved='200%', peak_allocated='200%'", 0),
        ("saved=None, peak_allocated=None", 0),
        ("saved='1MiB', peak_allocated=2**20", 0),
        ("saved='10%', peak_allocated=None", 1),
        ("saved=None, peak_allocated='1KiB'", 1),
    ],
)
def test_what_is_allowed_is_the_markers(
    pytester: pytest.Pytester, marker: str, errors: int
) -> None:
    step(pytester, marker=marker)
    run(pytester, "--meft-update=create")
    step(pytester, width=16, marker=marker)
    run(pytester).assert_outcomes(passed=1 - errors, failed=errors)


def test_a_limit_needs_no_baseline_to_fail(pytester: pytest.Pytester) -> None:
    step(pytester, marker="limit='1KiB'")
    found = run(pytester, "--meft-update=create")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["peak_allocated is *, above the limit of 1 KiB*"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ("3", "meft_memory: got 3; it takes saved, peak_allocated"),
        ("save=0", "got 'save'; it takes saved"),
        ("saved='1 %%'", "saved='1 %%' should be"),
        ("saved='1/0%'", "saved='1/0%' should be"),
        ("limit='2 GB'", "limit='2 GB' should be bytes"),
        ("limit=0", "limit=0 should be bytes"),
        ("device='H200'", "device='H200' should be a virtual GPU"),
    ],
)
def test_a_wrong_marker_is_named(
    pytester: pytest.Pytester, marker: str, words: str
) -> None:
    step(pytester, marker=marker)
    found = run(pytester)
    assert words in found.stdout.str()
    assert "Traceback" not in found.stdout.str()
    assert "marker.py" not in found.stdout.str()
    found.assert_outcomes(errors=1)


def marked(**arguments: Any) -> Any:
    """What a test with a marker of these arguments asks for."""
    mark = pytest.mark.meft_memory(**arguments).mark
    item: Any = SimpleNamespace(nodeid="test_it", get_closest_marker=lambda _: mark)
    return marker.of(item)


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "%", " %", "nan", "nan%", "inf", "inf%", "-1%", "-1", "+1%", "0x1%"),
        *("1/0%", "1/3%", "1e999", "1e999%", "1_0%", "1%%", "1 % ", "1.%", ".5%"),
        *("٣%", "9" * 5000 + "%", "9" * 5000, "1GB", "0", "1e9999999999%"),
        *(-1, 1.5, 0.0, float("nan"), float("inf"), True, False, [], {}, b"1%"),
    ],
)
@pytest.mark.parametrize("name", ["saved", "peak_allocated"])
def test_a_difference_that_is_none_is_named(name: str, value: Any) -> None:
    """With what it may be; and no test runs for that."""
    with pytest.raises(pytest.UsageError) as caught:
        marked(**{name: value})
    assert f"test_it: meft_memory: {name}={value!r} should be bytes, as 0, 4096" in (
        str(caught.value)
    )


@pytest.mark.parametrize("value", ["", "1%", "nan", "1e999", 0, -1, 1.5, True, "0"])
def test_a_limit_that_is_none_is_named(value: Any) -> None:
    with pytest.raises(pytest.UsageError, match=r'bytes, as 4096 or "2GiB", or None'):
        marked(limit=value)


@pytest.mark.parametrize("value", ["virtual-", "H200", 3, True])
def test_a_device_that_is_none_is_named(value: Any) -> None:
    with pytest.raises(pytest.UsageError, match="should be a virtual GPU, such as"):
        marked(device=value)


@pytest.mark.parametrize(
    ("value", "of_200"),
    [(0, 0), (3, 3), ("2KiB", 2048), ("1%", 2), ("1 %", 2), ("0.25%", 0.5), ("0%", 0)],
)
def test_a_difference_is_bytes_or_a_share(value: Any, of_200: float) -> None:
    assert marked(saved=value).saved.of(200) == of_200


LATER = """
@pytest.mark.meft_memory
def test_body(meft_step):
    taken(meft_step)
    assert BODY

@pytest.fixture
def closing():
    yield
    assert TEARDOWN

@pytest.mark.meft_memory
def test_teardown(meft_step, closing):
    taken(meft_step)

@pytest.mark.meft_memory
def test_part(meft_step, subtests):
    with subtests.test("part"):
        taken(meft_step)
        assert PART

@pytest.mark.meft_memory
@pytest.mark.xfail(STRICT, reason="a bug", strict=True)
def test_strict(meft_step):
    taken(meft_step)
"""


@pytest.mark.parametrize("update", ["create", "fix"])
def test_a_test_that_fails_later_changes_no_baseline(
    pytester: pytest.Pytester, update: str
) -> None:
    """In its body, its teardown, a part of it, or as it should have failed."""
    head = (
        STEP[: STEP.index("@pytest")].replace("width=8", "width=WIDTH")
        + """
def taken(meft_step):
    model, optimizer = made()
    meft_step(model, torch.ones(4, 16), optimizer, lambda y: y.sum())
"""
    )
    path = pytester.path / "test_it.py"
    names = ("BODY", "TEARDOWN", "PART")

    def write(width: int, passes: bool) -> None:
        text = head.replace("WIDTH", str(width)) + LATER
        for name in names:
            text = text.replace(name, str(passes))
        path.write_text(text.replace("STRICT", str(not passes)))

    if update == "fix":
        write(8, True)
        run(pytester, "--meft-update=create").assert_outcomes(passed=4)
    before = baseline(pytester)
    write(32, False)
    found = run(pytester, f"--meft-update={update}")
    assert baseline(pytester) == before
    for name in ("test_teardown", "test_part", "test_strict"):
        found.stdout.fnmatch_lines([f"test_it.py::{name} has failed, so its baseline*"])
    write(32, True)
    run(pytester, f"--meft-update={update}")
    assert len(baseline(pytester)) == 4
    assert baseline(pytester) != before


def test_a_baseline_keeps_why_it_changed(pytester: pytest.Pytester) -> None:
    """Until it changes again, as that of `meft-report baseline` does."""

    def reasons(width: int, *words: str) -> Any:
        step(pytester, width=width)
        run(pytester, *words).assert_outcomes(passed=1)
        ((entry,),) = [list(each.values()) for each in baseline(pytester).values()]
        return [part.get("baseline_reason") for part in entry]

    fix = "--meft-update=create,fix"
    assert reasons(8, fix, "--meft-reason", "first") == ["first"]
    assert reasons(8) == ["first"]
    assert reasons(8, fix, "--meft-reason", "nothing changed") == ["first"]
    assert reasons(16, fix, "--meft-reason", "wider") == ["wider"]
    assert reasons(32, fix) == [None]


def test_a_reason_without_an_update_is_refused(pytester: pytest.Pytester) -> None:
    step(pytester)
    for words in ((), ("--meft-update=trim",)):
        found = run(pytester, "--meft-reason=wider", *words)
        assert found.ret == pytest.ExitCode.USAGE_ERROR
        assert "--meft-update=fix writes: give one of them" in found.stderr.str()


def test_a_part_keeps_its_own_reason() -> None:
    before: baselines.Entry = [
        {"saved_bytes": 1, "baseline_reason": "a"},
        {"saved_bytes": 2},
    ]
    after = [{"saved_bytes": 1}, {"saved_bytes": 3}, {"saved_bytes": 4}]
    found = baselines.with_reasons(before, after, "b")
    assert [part.get("baseline_reason") for part in found] == ["a", "b", "b"]
    assert baselines.with_reasons(before, after[:1], "b") == before[:1]


def test_updates_are_refused_under_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    step(pytester)
    found = run(pytester, "--meft-update=create")
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    assert "refused under CI" in found.stderr.str()
    unknown = run(pytester, "--meft-update=creat")
    assert "creat is none of create, fix, trim" in unknown.stderr.str()


@pytest.mark.slow
def test_what_no_test_is_called_is_trimmed(pytester: pytest.Pytester) -> None:
    """Only where all tests were collected; a test that is skipped is not gone."""
    step(pytester)
    run(pytester, "--meft-update=create")
    skipped = STEP.replace("@pytest.mark.meft", "@pytest.mark.skip\n@pytest.mark.meft")
    text = skipped.replace("WIDTH", "8").replace("MARKER", "")
    pytester.makepyfile(test_it=text)
    run(pytester, "--meft-update=trim").assert_outcomes(skipped=1)
    assert "test_step" in baseline(pytester)
    pytester.makepyfile(test_it=text.replace("test_step", "test_other"))
    found = run(pytester)
    found.stdout.fnmatch_lines(["*no test is called test_step*--meft-update=trim*"])
    run(pytester, "--meft-update=trim", "-k", "nothing")
    assert "test_step" in baseline(pytester)
    run(pytester, "--meft-update=trim")
    assert not (pytester.path / "__meft__" / "test_it.json").exists()


@pytest.mark.slow
def test_on_a_virtual_gpu_cuda_is_there(pytester: pytest.Pytester) -> None:
    """And weights and batches that the test moves to it are counted."""
    text = STEP.replace("MARKER", "device='virtual-H200'").replace("WIDTH", "8")
    text = text.replace("made(8)", "made(8)\n    model.cuda()")
    text = text.replace("torch.ones(4, 16)", "torch.ones(4, 16, device='cuda')")
    pytester.makepyfile(test_it=text)
    run(pytester, "--meft-update=create").assert_outcomes(passed=1)
    assert "virtual-H200" in next(iter(baseline(pytester)["test_step"]))
    run(pytester).assert_outcomes(passed=1)
    path = pytester.path / "__meft__" / "test_it.json"
    path.write_text(path.read_text().replace("torch ", "torch 1."))
    run(pytester).assert_outcomes(skipped=1)
    strict = run(pytester, "-o", "meft_strict=true")
    strict.assert_outcomes(errors=1)
    strict.stdout.fnmatch_lines(["*not comparable: the baseline is of torch 1.*"])


def test_a_test_that_measures_nothing_fails(pytester: pytest.Pytester) -> None:
    """Also if it has a baseline, which stays; and without the fixtures."""
    step(pytester)
    run(pytester, "--meft-update=create").assert_outcomes(passed=1)
    before = baseline(pytester)
    path = pytester.path / "test_it.py"
    text = path.read_text()
    path.write_text(text.replace("    model, opt", "    return\n    model, opt"))
    found = run(pytester, "--meft-update=create,fix")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*test_step measured nothing: *meft_step*"])
    assert baseline(pytester) == before
    text = path.read_text()
    path.write_text(text.replace("test_step(meft_step)", "test_step(tmp_path)"))
    run(pytester).stdout.fnmatch_lines(["*test_step measures nothing: *"])


def test_a_test_that_measures_no_memory_fails(pytester: pytest.Pytester) -> None:
    """As one whose step is outside of what is measured, or whose model is on another
    device; no baseline is made of it."""
    pytester.makepyfile(
        test_it="""
import pytest, torch

@pytest.mark.meft_memory
def test_step(meft_memory):
    with meft_memory(torch.nn.Linear(2, 2)):
        pass
"""
    )
    found = run(pytester, "--meft-update=create")
    found.assert_outcomes(failed=1)
    found.stdout.fnmatch_lines(["*test_step measured nothing: no memory of cpu*"])
    assert baseline(pytester) == {}


def test_records_that_cannot_be_written_are_refused_first(
    pytester: pytest.Pytester,
) -> None:
    """And not when all tests have run."""
    step(pytester)
    found = run(pytester, "--meft-records=nowhere/seen.jsonl")
    assert "its folder must" in found.stdout.str() + found.stderr.str()
    assert found.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.slow
def test_nothing_is_trimmed_where_only_some_tests_run(
    pytester: pytest.Pytester,
) -> None:
    """With `--lf`, pytest leaves tests out without saying so."""
    step(pytester)
    text = (pytester.path / "test_it.py").read_text()
    other = text[text.index("@pytest.mark") :].replace("test_step", "test_other")
    pytester.makepyfile(test_it=f"{text}\n\n{other}")
    plugin = [word for word in PLUGIN if word != "no:cacheprovider"][: len(NAMED)]
    run(pytester, "--meft-update=create").assert_outcomes(passed=2)
    path = pytester.path / "test_it.py"
    path.write_text(
        path.read_text().replace(
            "def test_other(meft_step):", "def test_other(meft_step):\n    assert False"
        )
    )
    pytester.runpytest_inprocess(*plugin)
    pytester.runpytest_inprocess(*plugin, "--lf", "--meft-update=fix,trim")
    assert baseline(pytester).keys() == {"test_step", "test_other"}


@pytest.mark.slow
def test_a_test_that_is_twice_in_a_file_is_named(pytester: pytest.Pytester) -> None:
    """As after a merge that has kept both sides."""
    step(pytester)
    (pytester.path / "__meft__").mkdir()
    path = pytester.path / "__meft__" / "test_it.json"
    path.write_text('{"test_step": {}, "test_step": {}}')
    found = run(pytester)
    assert "'test_step' is there twice" in found.stdout.str() + found.stderr.str()


def test_a_baseline_of_another_torch_is_not_compared(
    pytester: pytest.Pytester,
) -> None:
    """Skipped on a CPU too; a failure where that is wanted."""
    step(pytester)
    run(pytester, "--meft-update=create").assert_outcomes(passed=1)
    path = pytester.path / "__meft__" / "test_it.json"
    path.write_text(path.read_text().replace("torch ", "torch 1."))
    run(pytester).assert_outcomes(skipped=1)
    strict = run(pytester, "-o", "meft_strict=true")
    strict.assert_outcomes(failed=1)
    strict.stdout.fnmatch_lines(["*not comparable: the baseline is of torch 1.*"])


def test_no_baseline_is_written_above_the_limit(pytester: pytest.Pytester) -> None:
    step(pytester, marker="limit=10")
    run(pytester, "--meft-update=create").assert_outcomes(failed=1)
    assert baseline(pytester) == {}


def test_by_hand_without_a_marker(pytester: pytest.Pytester) -> None:
    """Nothing is compared, and the numbers are there; also as records."""
    pytester.makepyfile(
        test_it="""
        import torch
        from torch import nn

        def test_hand(meft_memory):
            model = nn.Linear(256, 256)
            with meft_memory(model) as seen:
                model(torch.ones(2, 256)).sum().backward()
            # The input, the sum, and the gradient of the sum.
            assert seen.saved_bytes == 2 * 256 * 4 + 2 * 4
            assert seen.peak_allocated_bytes >= 2 * (256 * 257 * 4)
            assert seen.memory_breakdown["phase"] == "backward"
        """
    )
    run(pytester, "--meft-records=out.jsonl").assert_outcomes(passed=1)
    (record,) = map(json.loads, Path("out.jsonl").read_text().splitlines())
    assert (record["path"], record["name"]) == ("test_it.py", "test_hand")
    assert datetime.fromisoformat(record["started_at"]).tzinfo is not None
    assert record["environment"] == {"project_commit": None, "project_dirty": None}
    assert not (pytester.path / "__meft__").exists()


@pytest.mark.slow
def test_a_file_that_is_no_baseline_is_named(pytester: pytest.Pytester) -> None:
    step(pytester)
    (pytester.path / "__meft__").mkdir()
    for text in (
        "[]",
        "{",
        '{"test_step": 3}',
        '{"test_step": {"a": [{"saved_bytes": "x"}]}}',
    ):
        (pytester.path / "__meft__" / "test_it.json").write_text(text)
        found = run(pytester)
        assert "test_it.json" in found.stdout.str() + found.stderr.str()
        assert found.ret != 0


@pytest.mark.slow
def test_several_processes_write_one_file(pytester: pytest.Pytester) -> None:
    step(pytester)
    path = pytester.path / "test_it.py"
    text = path.read_text()
    path.write_text(f"{text}\n{text.replace('test_step', 'test_b')}\n")
    environment = {**os.environ}
    assert "CI" not in environment
    found = pytester.runpytest_subprocess(
        *PLUGIN, "-p", "xdist", "-n", "2", "--meft-update=create"
    )
    found.assert_outcomes(passed=2)
    assert baseline(pytester).keys() == {"test_step", "test_b"}
    again = pytester.runpytest_subprocess(*PLUGIN, "-p", "xdist", "-n", "2")
    again.assert_outcomes(passed=2)
    assert "no test is called" not in again.stdout.str()
