"""The command `meft-bench`, also as `python -m meft_bench`."""

import sys

from meft_bench.parent import output
from meft_bench.shared.tables import TableError


def main() -> int:
    """Run the command and return its exit code."""
    try:
        # Imported here, because the tables of methods and measurements are read then.
        from meft_bench.parent import cli
    except TableError as error:
        output.complain(f"meft-bench: {error}")
        return output.EXIT_USAGE
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
