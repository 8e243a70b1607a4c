"""The child process: one cell, from names to numbers.

worker      the process itself: a request in, an outcome file out
watchdog    ends the process when its parent ends

measuring   measures a cell: training, scores, memory, traffic, time
training    loads the model, applies the method, takes training steps
methods     ways of fine-tuning
tasks       rows and their metric
scoring     from predictions to scores
backbones   models with real or random weights
meters      memory, time, NVML counters
"""
