"""Read records of `meft-bench`; write tables, plots, one HTML page and a verdict.

Files of records are the only interface to the harness: this package imports neither
`meft_bench`, nor `meft`, nor torch. Reading order: `columns`, `frame`, `summary`, then
any of `plots`, `tables`, `page`, `check` and `baseline`; `cli` is the command line.
"""
