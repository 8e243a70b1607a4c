"""`python -m meft_reports` is `meft-report`."""

import sys

from meft_reports.cli import main

sys.exit(main())
