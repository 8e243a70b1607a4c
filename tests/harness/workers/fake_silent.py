"""A child that ends well and writes nothing."""

from harness.workers.fake_child import Child

Child()
print("nothing to do")
