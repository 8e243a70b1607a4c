"""Properties of a GPU, available without one.

gpu          the description of each GPU, read from files in `gpus/`
allocator    a model of PyTorch's caching allocator
blocks       blocks of memory in segments, and lists of free ones
expandable   segments that grow in place (`expandable_segments:True`)
memory_stats   the same with the statistics of `torch.cuda.memory_stats`
workspaces   memory that kernels allocate internally
attention    which attention kernel runs for given shapes
"""
