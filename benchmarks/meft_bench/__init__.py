"""The harness: sweeps in, records out. `meft_bench.cli` is its only front door."""
