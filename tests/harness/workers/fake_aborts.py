"""A child that ends as a failed assertion in native code ends."""

import os

from harness.workers.fake_child import Child

Child()
os.abort()
