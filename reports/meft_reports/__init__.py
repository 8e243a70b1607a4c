"""Records of `meft-bench` in; tables, plots, one HTML page and a verdict out.

A file of records is all that this package knows of the harness: it imports neither
`meft_bench`, nor `meft`, nor torch. Reading order: `columns`, `frame`, `summary`, then
any of `plots`, `tables`, `page`, `check` and `baseline`; `cli` ties them together.
"""
