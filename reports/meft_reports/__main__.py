"""Run `meft-report` as `python -m meft_reports`."""

import sys

from meft_reports.cli import main

sys.exit(main())
