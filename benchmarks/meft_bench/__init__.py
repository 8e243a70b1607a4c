"""The benchmark harness, from sweeps to records.

Its entry point is `meft_bench.parent.cli`.
"""
