"""A virtual GPU: predicts what a training step would take, on a machine without a GPU.

device       facts about a GPU: memory, rates, allocator, attention kernels
emulation    fake tensors and stubs that make torch behave as it does on that GPU
recording    every storage and copy of a step, and summaries of them
prediction   what a cell takes, the largest that fits
validation   programs that run on a real GPU and on a virtual one
"""
