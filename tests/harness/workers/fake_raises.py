"""A child that fails in the way of all Python programs."""

from harness.workers.fake_child import Child

Child()
raise RuntimeError("the tokenizer\x1b[31m is missing")
