"""Run `meft-bench` as `python -m meft_bench`."""

import sys

from meft_bench.parent.cli import main

if __name__ == "__main__":
    sys.exit(main())
