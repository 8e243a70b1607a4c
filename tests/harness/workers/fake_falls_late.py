"""A child that finishes its work and fails while it shuts down."""

import os

from harness.workers.fake_child import Child

Child().write()
os.abort()
