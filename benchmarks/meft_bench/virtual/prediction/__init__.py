"""Predict the memory of a cell, or of any training code, on a virtual GPU.

predict   one cell of a sweep
any_model   any model of transformers, made from its config, with the methods of PEFT
plan      one step of one cell, with a breakdown of its memory
fit       the largest value that fits, from few probes
planner   the child process of the commands `plan` and `fit`
plan_text   plans as text
roofline  how long a step takes at least, by what it computes and copies
training_code   the memory of training code of the user: `meft_bench.virtual_gpu`
progress  a line for each plan that was made
script    a function of a file of the user, for the option `--script`
"""
