"""A child whose processes hold 64 MiB each, and together more than it may."""

import os
import subprocess
import sys
from pathlib import Path

from harness.workers.fake_child import Child, sleep_forever

HOLD = """
import time
held = b"1" * 2**26
time.sleep(3600)
"""

child = Child()
processes = [subprocess.Popen([sys.executable, "-c", HOLD]) for _ in range(3)]
Path(os.environ["FAKE_PIDS"]).write_text(
    " ".join(str(pid) for pid in (os.getpid(), *(p.pid for p in processes)))
)
sleep_forever()
