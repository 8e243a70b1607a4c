"""The methods under test, one file per family, all of one form:

    method(model, cell) -> model

A method takes a pre-trained classifier with a new head, decides what trains through
`requires_grad`, wraps what it must, in place, and returns the model. The seed is set by
then. The registry names them.

full           every parameter; or the head alone
lora           LoRA
adapters       bottleneck adapters
checkpointing  gradient checkpointing of the above
reversible     MEFT1, MEFT2 and MEFT3
sparse         dense and sparse adapters of many neurons
"""
