"""Two ranks, of which the second is killed while the first waits for it."""

import os
import signal

from harness.workers.fake_child import Child, sleep_forever

Child()
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
sleep_forever()
