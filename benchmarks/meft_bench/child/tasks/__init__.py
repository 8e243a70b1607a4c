"""Labelled text to learn, one file per source, all of one form:

    load(cell, source) -> Task

`task` and `question` hold what a task is, `files` and `topics` read its rows, `metrics`
scores labels, `batches` makes rows tensors. The registry names the tasks:
`synthetic`, `bbc_news` and `glue` have labels; `arc`, `gsm8k`, `nq_open`, `squad` and
`triviaqa` are answered in words.
"""
