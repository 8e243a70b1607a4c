"""Predict the memory of a cell on a virtual GPU.

predict   one cell of a sweep
plan      one step of one cell, with a breakdown of its memory
fit       the largest value that fits, from few probes
planner   the child process of the commands `plan` and `fit`
"""
