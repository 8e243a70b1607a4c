"""Code of both the parent process and its children; no module imports torch.

cell       what to run: the fields that identify a measurement
cell_document   writes docs/fields.md from the fields of a cell
measurement   the numbers of a cell by name; None where one was not measured
json_types   checks that values read from JSON have their annotated types
breakdown  what the peak of a step consists of
record     the result: status, measurement and environment
request    what a parent requests of a child, on the command line
options    settings of a child that do not belong to the cell
outcome    the file in which a child reports how it ended
tables     reads the tables of methods, measurements and backbones
field_kinds   what a field of these tables may hold
own        what a cell holds of methods, backbones and tasks of the user
row_kinds  kinds of tasks that rows of the user can be
methods    the table of methods: functions, options, what each has
backbones  the table of model types: what can be made of each, its shapes
quantisations   ways of quantising frozen weights
registry   the names of methods, tasks, backbones and devices
protocol   constants of the training protocol
lengths    lengths of the batches of a plan
configs    finds and reads the config of a backbone
published  memory that others measured, and what other estimators say of it
source     where data and weights may come from
optional   imports libraries that only some methods need
nvml       NVML: a reading of a GPU's meter, or the reason why there is none
distributions   which distributions are installed
units      bytes as text, and text as bytes
"""
