"""Access to transformers models by the structure of their blocks.

family     `Family`: all that the library knows about one class of blocks
families   the supported families, one module per structure of blocks
find       finds the lists of blocks in a model
heads      finds the task heads that have to be trained, and freezes the rest
parallel   parallel adapters at a block's feed-forward that another method has added
uncalled   modules that are run in parts; refuses code attached to them
"""
