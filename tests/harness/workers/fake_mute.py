"""A child that ends badly and says nothing."""

import os

from harness.workers.fake_child import Child

Child()
os._exit(3)
