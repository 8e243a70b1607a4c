"""A child that asks for more than its limit, and says so."""

from harness.workers.fake_child import Child

child = Child()
try:
    bytearray(2**28)
except MemoryError:
    child.write("oom", "256 MiB were asked for\nand not given")
else:
    child.write()
