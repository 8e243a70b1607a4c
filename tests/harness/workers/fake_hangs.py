"""A child that starts a process of its own and then never ends."""

import os
import subprocess
import sys
from pathlib import Path

from harness.workers.fake_child import Child, sleep_forever

Child()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
Path(os.environ["FAKE_PIDS"]).write_text(f"{os.getpid()} {grandchild.pid}")
sleep_forever()
