"""`meft-bench` as a process of its own, with the child that the first word names."""

import sys

from meft_bench.parent.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], worker_module=f"harness.workers.{sys.argv[1]}"))
