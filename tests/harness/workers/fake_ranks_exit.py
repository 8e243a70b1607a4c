"""Ranks that end without an outcome, and print why."""

import sys

from harness.workers.fake_child import Child

Child()
sys.exit("RuntimeError: the tokenizer is missing")
