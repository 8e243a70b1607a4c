"""A plugin of pytest that checks the memory of training steps, of any model.

    @pytest.mark.meft_memory(saved=0, peak_allocated="1%", limit="2GiB")
    def test_step(meft_step):
        meft_step(model, batch, optimizer)

The first run with `--meft-update=create` writes what the step takes next to the test;
later runs fail if it takes more, and say what grew. With `device="virtual-H200"` the
test runs on a virtual GPU: `cuda` is there, and nothing is computed.

options     options of the command line and of the ini file
marker      what `meft_memory` asks for
measuring   measures what code takes: `meft_step`, `meft_memory`
baselines   what tests took before: one file per file of tests
checking    compares the two, and words the difference
session     collects results, also those of other processes, and updates baselines

No module imports torch before a fixture is used.
"""

from collections.abc import Generator, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from meft_bench.pytest_plugin import checking, marker, options
from meft_bench.pytest_plugin.session import CALL_ONE, Session

KEY = pytest.StashKey[checking.Checked]()
METER = pytest.StashKey[Any]()
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and what collects results."""
    config.addinivalue_line("markers", marker.HELP)
    found = Session(config, options.read(config))
    config.stash[SESSION] = found
    config.pluginmanager.register(found, "meft-session")


@pytest.fixture
def virtual_gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The virtual GPU of the marker's `device`, which is active during the test.

    Its `plan()` tells what the test has taken so far.
    """
    wanted = marker.of(request.node)
    if wanted is None or not wanted.gpu:
        pytest.fail(
            f"{request.node.nodeid}: `virtual_gpu` needs a marker that names one: "
            '@pytest.mark.meft_memory(device="virtual-H200")',
            pytrace=False,
        )
    from meft_bench import virtual_gpu as enter

    with enter(wanted.gpu) as memory:
        yield memory


@pytest.fixture
def meft_memory(request: pytest.FixtureRequest) -> Any:
    """Function that returns a context in which memory is measured.

    `with meft_memory(model, optimizer) as seen: ...`; afterwards `seen.saved_bytes`,
    `seen.peak_allocated_bytes` and `seen.memory_breakdown` are there.
    """
    wanted = marker.of(request.node)
    on_gpu = None
    if wanted is not None and wanted.gpu:
        on_gpu = request.getfixturevalue("virtual_gpu")

    from meft_bench.pytest_plugin.measuring import Meter

    meter = Meter(on_gpu)
    request.node.stash[METER] = meter
    return meter.measured


@pytest.fixture
def meft_step(meft_memory: Any) -> Any:
    """Function that takes two training steps, of which the second is measured.

    `meft_step(model, batch, optimizer, loss=None)`; `loss` is a function from the
    model's output to a scalar, by default the `loss` of the output, or itself. The
    first step makes the optimizer's state.
    """

    def step(model: Any, batch: Any, optimizer: Any, loss: Any = None) -> Any:
        from meft_bench.pytest_plugin.measuring import take_step

        def take() -> None:
            take_step(model, batch, optimizer, loss)

        with meft_memory(model, optimizer, before=take) as seen:
            take()
        return seen

    return step


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Compare what a test took with its baseline, when it has passed."""
    result = yield
    meter = item.stash.get(METER, None)
    wanted = marker.of(item)
    if meter is None:
        if wanted is not None:
            pytest.fail(f"{item.nodeid} measures nothing: {CALL_ONE}", pytrace=False)
        return result
    checked = checking.Checked(
        path=item.path,
        name=item.nodeid.partition("::")[2],
        device=wanted.device if wanted is not None and wanted.gpu else meter.device,
        seen=meter.seen,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wanted=wanted,
    )
    item.stash[KEY] = checked
    if wanted is not None:
        if failure := item.config.stash[SESSION].check(checked, wanted):
            pytest.fail(failure, pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Attach what a test took to its report, which travels between processes."""
    report: Any = yield
    checked = item.stash.get(KEY, None)
    if checked is not None and call.when == "call":
        report.meft = checked.to_json()
    return report
