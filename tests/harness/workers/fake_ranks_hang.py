"""Ranks that never end, and leave their process ids in a folder."""

import os
from pathlib import Path

from harness.workers.fake_child import Child, sleep_forever

Child()
path = Path(os.environ["FAKE_PIDS"], os.environ["RANK"])
path.with_suffix(".part").write_text(f"{os.getpid()} {os.getppid()}")
path.with_suffix(".part").rename(path)
sleep_forever()
