"""Labelled text for training, one file per source, all with one signature:

    load(cell, source) -> Task

`task` and `question` define tasks, `files` and `topics` read their rows, `metrics`
scores labels, `batches` converts rows to tensors. The registry names the tasks:
`synthetic`, `bbc_news` and `glue` have labels; `arc`, `gsm8k`, `nq_open`, `squad` and
`triviaqa` are answered in words. `closed_book` loads questions without a text.
`loading` finds the task of a cell; `own_rows` makes one of rows of the user, which
`row_files` reads.
"""
