"""A child that never ends by itself."""

from harness.workers.fake_child import Child, sleep_forever

Child()
sleep_forever()
