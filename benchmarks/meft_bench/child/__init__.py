"""The child process, which runs one cell.

worker      entry point of the process: reads a request, writes an outcome file
watchdog    ends the process when its parent ends
fork_server   a process with all imports done, whose forks are children
rank_launcher   starts the ranks of a cell, and takes the outcome of one

measuring   measures a cell: training, scores, memory, traffic, time
training    loads the model, applies the method, takes training steps
methods     methods of fine-tuning
tasks       rows and their metric
scoring     from predictions to scores
backbones   models with real or random weights
meters      memory, time, NVML counters
"""
