"""What a cell would take on a virtual GPU.

predict   one cell of a sweep
plan      one step of one cell, and where its memory comes from
fit       the largest value that fits, from few probes
planner   the child process of the commands `plan` and `fit`
"""
