"""The harness: sweeps in, records out. `meft_bench.parent.cli` is its entry point."""
