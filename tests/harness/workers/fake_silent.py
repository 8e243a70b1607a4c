"""A child that ends well and writes nothing."""

from fake_child import Child

Child()
print("nothing to do")
