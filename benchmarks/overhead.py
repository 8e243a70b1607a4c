"""What a cell takes besides its own work: as a fork, in a new interpreter, with Ray.

    python benchmarks/overhead.py 10 50

    seconds of a run = start + number of cells x seconds of a cell

The two numbers of cells give both. `dry` cells do nothing (`dry_cell.py`); those of
`imports` end as soon as their libraries are imported, as the data of their task is not
there. One cell runs at a time. CPU seconds are those of the harness and all processes
that it started, which on a machine with other work say more than seconds; those of
Ray's own processes are not counted, as they belong to the cluster.
"""

import itertools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = "import sys; from meft_bench.parent.cli import main; sys.exit(main(sys.argv[2:]"
ENGINES = {
    "forks": ["--slots", "1"],
    "new interpreters (`--fresh`)": ["--slots", "1", "--fresh"],
    "Ray": ["--engine", "ray", "--threads", str(os.cpu_count() or 1)],
}
WORKERS = {"dry": "dry_cell", "imports": "meft_bench.child.worker"}
ENDINGS = {"dry": 0, "imports": 3}
"""Exit codes of a run, by kind of cell."""
SWEEP = """
question = "What does a cell take?"
[[matrix]]
name = "many"
defaults = {{ task = "cola", method = "lora" }}
axes = {{ seed = {seeds} }}
"""


def measure(words: list[str], kind: str, num_cells: int) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a run."""
    program = f"{RUN}, worker_module=sys.argv[1]))"
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": path}
    variables.pop("MEFT_DATA_DIR", None)
    variables["RAY_ADDRESS"] = "local"  # a cluster of its own
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "many.toml").write_text(SWEEP.format(seeds=[*range(num_cells)]))
        before, start = _cpu_seconds(), time.monotonic()
        ended = subprocess.run(
            [
                *(sys.executable, "-c", program, WORKERS[kind]),
                *("run", "many.toml", "--device", "cpu", *words),
            ],
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
        )
        seconds = time.monotonic() - start
    if ended.returncode != ENDINGS[kind]:
        raise SystemExit(f"a run of {kind} cells failed:\n{ended.stderr[-2000:]}")
    return seconds, _cpu_seconds() - before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Print a row for each engine and kind of cell."""
    few, many = map(int, sys.argv[1:] or ["10", "50"])
    print(
        "| engine | cells | start, s | a cell, s | start, CPU s | a cell, CPU s |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for (engine, words), kind in itertools.product(ENGINES.items(), WORKERS):
        first, second = (measure(words, kind, number) for number in (few, many))
        of_a_cell = [(b - a) / (many - few) for a, b in zip(first, second, strict=True)]
        starts = [a - few * one for a, one in zip(first, of_a_cell, strict=True)]
        numbers = (starts[0], of_a_cell[0], starts[1], of_a_cell[1])
        shown = " | ".join(f"{number:.2f}" for number in numbers)
        print(f"| {engine} | {kind} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
