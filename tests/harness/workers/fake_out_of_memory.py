"""A child that asks for more than its limit, and says so."""

from fake_child import Child

child = Child()
try:
    bytearray(2**31)
except MemoryError:
    child.write("oom", "2 GiB were asked for\nand not given")
else:
    child.write()
