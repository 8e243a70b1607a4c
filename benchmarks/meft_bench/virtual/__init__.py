"""A virtual GPU: predict the memory of a training step without a GPU.

device       properties of a GPU: memory, rates, allocator, attention kernels
emulation    fake tensors and stubs that make torch behave as it does on that GPU
recording    every storage and copy of a step, and summaries of them
prediction   the memory that a cell needs, and the largest size that fits
validation   programs that run on a real GPU and on a virtual one
"""
