"""A child that prints what looks like an outcome, and then bytes that are no text."""

import sys

from harness.workers.fake_child import Child

child = Child()
print('{"status": "error", "message": "not me"}')
sys.stdout.flush()
sys.stdout.buffer.write(b"\xff\x00\xfe" * 100_000)
child.write()
