"""Formats of data sets, one file for those of a kind: from contents to rows.

A function is named by `read` of a way in `meft_bench.shared.tasks`. It has one of four
forms; a row is a dictionary with the columns that `rows` lists.

    of files      (way, *contents) -> SplitRows
    of the hub    (row of the repository) -> row
    of a package  (way) -> SplitRows
    of a seed     (number of facts, seed) -> SplitRows

glue       tab-separated tables, and JSON objects with parts of them
bbc_news   articles in files of a package
options    questions with options
words      questions with accepted answers, of which `topics` reads some
facts      facts made from a seed
idx        images in the format of MNIST
digits     images of scikit-learn
"""
