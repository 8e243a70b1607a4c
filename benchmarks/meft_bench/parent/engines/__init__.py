"""Engines: ways to run many cells. Each is a function `run_cells` of the same form."""
