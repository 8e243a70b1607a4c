"""A child that does its work, and says where."""

from harness.workers.fake_child import Child

Child().write(device_name="fake device", num_threads=3)
