"""Labelled text to learn, one file per source, all of one form:

    load(cell, source) -> Task

`task` holds what a task is, `metrics` how it is scored, `batches` how rows become
tensors. The registry names the tasks.
"""
