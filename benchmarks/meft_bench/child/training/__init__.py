"""From the names in a cell to a model, and its training steps.

prepare         loads the backbone and applies the method
ranks           processes that train one model together: their shares and their bytes
steps           schedule, autocast, accumulation: the training protocol
optimizers      what updates the weights
checkpoint      the state of a training on disk, from which a killed cell goes on
execution       which attention kernel runs, eager or compiled blocks
out_of_memory   which errors mean that memory ran out
"""
