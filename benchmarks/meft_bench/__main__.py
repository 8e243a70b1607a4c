"""`python -m meft_bench` is `meft-bench`."""

import sys

from meft_bench.parent.cli import main

if __name__ == "__main__":
    sys.exit(main())
