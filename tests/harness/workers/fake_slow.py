"""A child that takes a moment, so that a test can come between."""

import time

from harness.workers.fake_child import Child

child = Child()
time.sleep(0.3)
child.write()
