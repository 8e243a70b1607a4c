"""Cells on a Ray cluster: records of this machine, each cell once, whatever is lost.

One test with a cluster of one node is fast; those of clusters of several nodes are for
`--slow`, and what is said of a cluster that cannot run the cells needs none.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from meft_bench.parent import cli, harness, runs
from meft_bench.parent.engines import environment, ray_cluster
from meft_bench.parent.engines.job import Job
from meft_bench.shared.options import ChildOptions
from meft_bench.shared.record import Status

ray = pytest.importorskip("ray", reason="no ray: pip install 'meft[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of ray and its packages
    pytest.mark.timeout(600),
]
STORE_BYTES = 80_000_000  # the least that Ray accepts is 75 MB
TESTS = str(Path(__file__).parents[1])
SWEEP = """
question = "Is anything lost or done twice?"
[[matrix]]
name = "one"
axes = {{ method = ["full", "head", "lora", "meft1"], seed = {seeds} }}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of two cores, of which one has two GPUs that do not exist."""
    with cluster_of(2) as made:
        made.add_node(num_cpus=2, num_gpus=2, object_store_memory=STORE_BYTES)
        yield made


def path_of_workers() -> str:
    """`PYTHONPATH` with the workers of tests, for nodes that start with it."""
    return os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])


@contextlib.contextmanager
def cluster_of(num_cpus: int) -> Iterator[Any]:
    """A cluster of one node, whose children find the workers of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path_of_workers())
        made = cluster_utils.Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": num_cpus, "object_store_memory": STORE_BYTES},
        )
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def there(cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a sweep of eight cells, and the cluster as the one to use."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SWEEP.format(seeds="[0, 1]"))
    return tmp_path


def run(worker: str, *words: str, path: str = "runs.jsonl") -> int:
    whole = ["run", "mine.toml", "--engine", "ray", "-o", path, *words]
    if "--device" not in words:
        whole += ["--device", "cpu"]
    return cli.main(whole, worker_module=f"harness.workers.{worker}")


def ids(path: str = "runs.jsonl") -> list[str]:
    return [record.cell.id for record in runs.read(Path(path))]


def test_records_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for times, on a new cluster of this machine alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path_of_workers())
    monkeypatch.setenv("RAY_ADDRESS", "local")
    Path("mine.toml").write_text(SWEEP.format(seeds="[0]"))
    assert run("fake_ok") == 0
    words = ["run", "mine.toml", "--device", "cpu", "-o", "local.jsonl", "--fresh"]
    assert cli.main(words, worker_module="harness.workers.fake_ok") == 0
    mine, its = (
        {r.cell: (r.status, r.measurement, r.environment) for r in runs.read(Path(p))}
        for p in ("local.jsonl", "runs.jsonl")
    )
    assert len(its) == 4
    assert mine.keys() == its.keys()
    for cell, (status, measurement, where) in its.items():
        assert (status, measurement) == mine[cell][:2]
        assert where.code_sha256 == mine[cell][2].code_sha256
        assert where.machine == mine[cell][2].machine


@pytest.mark.slow
def test_a_second_run_has_nothing_left_to_do(there: Path) -> None:
    """And records say how many cells a node runs side by side."""
    assert run("fake_ok") == 0
    assert {r.environment.num_slots for r in runs.read(Path("runs.jsonl"))} == {2}
    before = Path("runs.jsonl").read_bytes()
    assert before.count(b"\n") == 8
    assert run("fake_ok") == 0
    assert Path("runs.jsonl").read_bytes() == before


@pytest.mark.slow
def test_failures_are_records(there: Path) -> None:
    """With the log of the child next to the others."""
    assert run("fake_raises") == harness.EXIT_FAILED
    found = runs.read(Path("runs.jsonl"))
    assert len(found) == 8
    assert {record.status for record in found} == {Status.ERROR}
    logs = [path for path in Path("runs.logs").glob("*.log") if path.stat().st_size]
    assert len(logs) == 8


@pytest.mark.slow
def test_a_folder_that_nodes_do_not_see(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs come back with the records."""
    nowhere = contextlib.nullcontext(Path("/nowhere/mark"))
    monkeypatch.setattr(ray_cluster, "_mark_in", lambda folder: nowhere)
    assert run("fake_raises") == harness.EXIT_FAILED
    assert len(ids()) == 8
    logs = [path for path in Path("runs.logs").glob("*.log") if path.stat().st_size]
    assert len(logs) == 8


def test_slots_are_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is said before a cluster is looked for."""
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(SWEEP.format(seeds="[0]"))
    assert run("fake_ok", "--slots", "2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--slots counts cells of this machine" in error


@pytest.mark.parametrize(
    ("changes", "devices", "message"),
    [
        ({}, ["cpu"], ""),
        ({"num_cpus": 1}, ["cpu"], "takes 2 cores and the largest .* has 1: .* 1` or"),
        ({"sees_data": False}, ["cpu"], "node 10.0.0.7 has no directory '/data'"),
        ({}, ["cpu", "cuda"], "device cuda: no node of the Ray cluster has a GPU"),
        ({"num_gpus": 1}, ["cpu", "cuda"], ""),
        ({"code_sha256": "another"}, ["cpu"], "10.0.0.7 has another version of meft"),
        ({"versions": {"torch": "1.0"}}, ["cpu"], "10.0.0.7 has other packages: .*"),
    ],
)
def test_what_a_cluster_cannot_do(
    changes: dict[str, Any], devices: list[str], message: str
) -> None:
    """The node, what it lacks and what to do are said before any cell runs."""
    here = environment.collect(num_threads=1, num_slots=1, device="cpu")
    its = {n: changes.pop(n) for n in ("code_sha256", "versions") if n in changes}
    node = ray_cluster.Node(
        address="10.0.0.7",
        environments={"cpu": dataclasses.replace(here, **its)},
        **{"num_cpus": 2, "num_gpus": 0, "sees_data": True} | changes,
    )
    job = Job(
        sweep="a sweep",
        question="",
        caveats=(),
        options=ChildOptions(num_threads=2, data_dir="/data"),
        timeout_seconds=1,
    )
    if not message:
        ray_cluster._check([node], dict.fromkeys(devices, 1), job)
        return
    with pytest.raises(ray_cluster.ClusterError, match=message):
        ray_cluster._check([node], dict.fromkeys(devices, 1), job)


@pytest.mark.slow
def test_other_code_is_refused(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before any cell runs."""
    monkeypatch.setattr(environment, "digest", lambda folders: "another")
    assert run("fake_ok") == 2
    assert "has another version of meft than this machine" in capsys.readouterr().err
    assert not Path("runs.jsonl").exists() or not ids()


@pytest.mark.slow
def test_each_cell_of_a_gpu_has_its_own(there: Path) -> None:
    """And sees no other, on the only node that has any."""
    assert run("fake_device", "--device", "cuda") == 0
    found = [json.loads(record.message) for record in runs.read(Path("runs.jsonl"))]
    assert {one["CUDA_VISIBLE_DEVICES"] for one in found} == {"0", "1"}
    spans = sorted((o["CUDA_VISIBLE_DEVICES"], o["began"], o["ended"]) for o in found)
    for (gpu, _, ended), (other, began, _) in itertools.pairwise(spans):
        assert gpu != other or ended <= began


@pytest.mark.slow
def test_ranks_have_gpus_of_one_node(
    there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell of two has both, with a core for each; more than a node has are refused,
    as no task of Ray would ever start."""
    text = SWEEP.format(seeds="[0]").replace('["full", "head", "lora", "meft1"]', "{}")
    for ranks, code in ((2, 0), (3, 2)):
        words = f'["lora"], ranks = [{ranks}], batch_size = [12]'
        Path("mine.toml").write_text(text.replace("{}", words))
        assert run("fake_ranks_device", "--device", "cuda") == code
    (found,) = (json.loads(record.message) for record in runs.read(Path("runs.jsonl")))
    assert sorted(found["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    reason = "a cell takes 3 cores and the largest node of the Ray cluster has 2"
    assert f"{reason}: lower `ranks` = 3" in capsys.readouterr().err


def test_more_ranks_than_gpus_of_a_node() -> None:
    """Ray would wait for such a node without end."""
    own = environment.collect(num_threads=1, num_slots=1, device="cpu")
    nodes = [
        ray_cluster.Node(
            address=f"node {n}",
            environments={"cuda": own},
            num_cpus=8,
            num_gpus=n,
            sees_data=True,
        )
        for n in (0, 2)
    ]
    job = Job(
        sweep="a sweep",
        question="Why?",
        caveats=(),
        options=ChildOptions(),
        timeout_seconds=1.0,
    )
    ray_cluster._check(nodes, {"cuda": 2}, job)
    with pytest.raises(ray_cluster.ClusterError, match="takes 4 GPUs and 4 cores"):
        ray_cluster._check(nodes, {"cuda": 4}, job)


@pytest.mark.slow
def test_interrupted(there: Path) -> None:
    """What was not recorded runs in the next run, and nothing else."""

    def interrupt() -> None:
        while len(ids()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    Path("runs.jsonl").touch()
    thread = threading.Thread(target=interrupt)
    thread.start()
    code = run("fake_slow")
    thread.join()
    assert code == harness.EXIT_INTERRUPTED
    before = ids()
    assert 2 <= len(before) < 8
    assert run("fake_slow") == 0
    assert ids()[: len(before)] == before
    assert Counter(ids()) == dict.fromkeys(ids(), 1)
    assert len(ids()) == 8


def workers() -> Iterator[int]:
    """The processes that run a task, which have its name, or wait for one.

    Ray's agents are named likewise, and a node without them ends. So is, for a moment,
    a process that a worker has just started, and whose end is a record.
    """
    named: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes()
            if words.startswith(b"ray::") and b"Agent" not in words:
                status = (path / "stat").read_text().rpartition(")")[2]
                named[int(path.name)] = int(status.split()[1])
    yield from (pid for pid, parent in named.items() if parent not in named)


class Chaos:
    """Kill workers and replace nodes, each after a few more cells have ended.

    Not each after a time: on a machine that has much else to do, no cell would end
    between two of them.
    """

    def __init__(self, cluster: Any) -> None:
        self.killed: Counter[str] = Counter()
        self._cluster = cluster
        self._random = random.Random(0)
        self._next = 0
        """Number of records at which the next one is killed."""

    def go_on(self) -> None:
        """Replace a node, but for that of the driver, first; then kill workers, too."""
        time.sleep(self._random.uniform(0.1, 1))
        num_records = Path("runs.jsonl").read_bytes().count(b"\n")
        if num_records < self._next:
            return
        self._next = num_records + self._random.randint(1, 20)
        if not self.killed["nodes"] or self._random.random() < 0.15:
            node = self._random.choice([*self._cluster.worker_nodes])
            self._cluster.remove_node(node, allow_graceful=False)
            self._cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
            self.killed["nodes"] += 1
        elif running := [*workers()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(running), signal.SIGKILL)
                self.killed["workers"] += 1


@pytest.mark.slow
@pytest.mark.parametrize("num_cells", [int(os.environ.get("MEFT_RAY_CELLS", "200"))])
def test_each_cell_once_while_workers_nodes_and_the_driver_are_killed(
    num_cells: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_parent: Callable[..., Any],
) -> None:
    """On four nodes; `MEFT_RAY_CELLS` is the number of cells."""
    monkeypatch.chdir(tmp_path)
    seeds = [*range(num_cells // 4)]
    Path("mine.toml").write_text(SWEEP.format(seeds=seeds))
    words = ["run", "mine.toml", "--engine", "ray", "--device", "cpu"]
    words += ["-o", "runs.jsonl"]
    said = tmp_path / "driver.txt"

    def wait_for(num_records: int) -> None:
        while len(ids()) < num_records:
            assert driver.poll() is None, said.read_text()[-2000:]
            time.sleep(0.1)

    start = time.monotonic()
    with cluster_of(1) as made:
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        chaos = Chaos(made)
        driver = start_parent("fake_ok", *words, cwd=tmp_path, output=said)
        wait_for(1)  # so it is on the only node so far
        for _ in range(3):
            made.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        while len(ids()) < num_cells // 2:
            assert driver.poll() is None, said.read_text()[-2000:]
            chaos.go_on()
        driver.kill()
        driver.wait()
        before = ids()
        for node in [*made.worker_nodes]:
            made.remove_node(node)
        driver = start_parent("fake_ok", *words, cwd=tmp_path, output=said)
        wait_for(len(before) + 1)
        for _ in range(3):
            made.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        while driver.poll() is None:
            chaos.go_on()
        seconds = time.monotonic() - start
    print(f"{num_cells} cells in {seconds:.0f} s, killed: {dict(chaos.killed)}")
    assert driver.returncode == 0, said.read_text()[-2000:]
    assert chaos.killed["workers"] > 0
    assert chaos.killed["nodes"] > 0
    assert ids()[: len(before)] == before
    assert Counter(ids()) == dict.fromkeys(ids(), 1)
    assert len(ids()) == num_cells
    assert {record.status for record in runs.read(Path("runs.jsonl"))} == {Status.OK}
