"""What a sweep takes from its user, found and checked before anything runs.

take            replaces what a sweep names by what cells hold
methods         `peft:FILE.json`, `peft:DIR`, `python:...`
peft_training   the training parameters next to a config of PEFT
backbones       `dir:PATH`, `random:FILE.json`
tasks           `csv:FILE` and others, tables of a task, `python:...`
rows            the columns and the digest of a file of rows
current         whether files have changed since
python_code     the file of a function, found without running it
packages        entry points of installed packages
digests         digests of JSON, of files, of folders
"""

from meft_bench.parent.own.take import Taken, take

__all__ = ["Taken", "take"]
