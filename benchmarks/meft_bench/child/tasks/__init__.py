"""Labelled rows for training, whose facts are in `meft_bench.shared.tasks`.

Tasks are loaded by one signature, `load(cell, source)`, in one file for each kind:

synthetic    random tokens or images of an exact shape
labelled     classifiers and regressions of texts
pictures     classifiers of images
questions    language models that choose among options or answer in words
made         language models that learn facts, made from a seed, by heart
own_rows     tasks of rows of the user, which `row_files` reads

`loading` finds the task of a cell. `find` takes rows from the first way that is
available: `files` reads files, `formats` has their formats, and `rows` says what a row
is. `task`, `question` and `recall` define tasks, `metrics` scores labels and numbers,
with `row_scores` for single rows, and `gsm8k` is a rule for answers. `batches` converts
rows to tensors, and `token_cache` keeps tokens on disk.
"""
