"""A child that ends as if the kernel had been out of memory."""

import os
import signal

from harness.workers.fake_child import Child

Child()
os.kill(os.getpid(), signal.SIGKILL)
