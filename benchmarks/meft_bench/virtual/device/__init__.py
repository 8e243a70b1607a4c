"""Facts about a GPU, without one.

gpu          what is known of each GPU, from files in `gpus/`
allocator    a model of PyTorch's caching allocator
workspaces   memory that kernels take for themselves
attention    which attention kernel runs for given shapes
"""
