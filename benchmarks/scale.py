"""How long a sweep of many cells takes to plan, to list and to read back.

    python benchmarks/scale.py 1000 10000 100000

Nothing is trained: the records are those of the memory gate, again and again,
with seeds of their own. Each step runs in a new process, whose CPU seconds and largest
resident memory are printed. Needs a gigabyte of disk for 100,000 cells.
"""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

BASELINE = Path(__file__).with_name("baselines") / "gate.jsonl"
SWEEP = """
question = "How long does this take?"
[[matrix]]
name = "many"
axes = {{ method = ["full", "lora"], batch_size = [1, 2], seed = {seeds} }}
"""


def make(folder: Path, num_cells: int) -> None:
    """Write a sweep and a record for each of its cells."""
    from meft_bench.parent import sweep
    from meft_bench.parent.engines import environment

    path = folder / "many.toml"
    path.write_text(SWEEP.format(seeds=[*range(num_cells // 4)]))
    cells = sweep.load(str(path), device="cpu").cells
    here = environment.collect(num_threads=1, num_slots=1, device="cpu")
    own = {
        "code_sha256": here.code_sha256,
        "versions": here.versions,
        "machine": here.machine,
    }
    lines = [json.loads(line) for line in BASELINE.read_text().splitlines()]
    with (folder / "many.jsonl").open("w") as file:
        for index, cell in enumerate(cells):
            record = lines[index % len(lines)]
            record |= {"cell": cell.to_json(), "cell_id": cell.id, "sweep": "many"}
            record["environment"] |= own
            file.write(json.dumps(record) + "\n")


def plan(folder: Path) -> None:
    """Read the sweep, and check every cell."""
    from meft_bench.parent import sweep

    sweep.load(str(folder / "many.toml"), device="cpu")


def list_cells(folder: Path) -> None:
    """`meft-bench list`: which cells are done."""
    from meft_bench.parent import cli

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stdout = nowhere
        words = ["list", str(folder / "many.toml"), "-o", str(folder / "many.jsonl")]
        assert cli.main(words) == 0


def read_back(folder: Path) -> None:
    """All records as a frame, as every report begins."""
    from meft_reports.frame import read_frame

    read_frame(folder / "many.jsonl")


def table(folder: Path) -> None:
    """`meft-report table results`."""
    from meft_reports import cli

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stdout = nowhere
        assert cli.main(["table", "results", str(folder / "many.jsonl")]) == 0


def page(folder: Path) -> None:
    """`meft-report page`."""
    from meft_reports import cli

    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stdout = nowhere
        words = ["page", str(folder / "many.jsonl"), "-o", str(folder / "page.html")]
        assert cli.main(words) == 0


STEPS: tuple[Callable[[Path], None], ...] = (plan, list_cells, read_back, table, page)


def measure(step: Callable[[Path], None], folder: Path) -> tuple[float, float]:
    """CPU seconds and MiB of a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_run, args=(step, folder, sender))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{step.__name__} failed")
    seconds, kib = receiver.recv()
    return seconds, kib / 1024


def _run(step: Callable[[Path], None], folder: Path, sender: object) -> None:
    step(folder)
    used = resource.getrusage(resource.RUSAGE_SELF)
    sender.send((used.ru_utime + used.ru_stime, used.ru_maxrss))  # type: ignore[attr-defined]


def main() -> None:
    """Print a row for each number of cells."""
    print("| cells | records, MiB | step | CPU s | MiB |\n|---:|---:|---|---:|---:|")
    for num_cells in map(int, sys.argv[1:] or ["1000"]):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make(folder, num_cells)
            size = (folder / "many.jsonl").stat().st_size / 2**20
            for step in STEPS:
                seconds, mib = measure(step, folder)
                print(
                    f"| {num_cells:,} | {size:,.0f} | {step.__name__} | {seconds:.1f} "
                    f"| {mib:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
