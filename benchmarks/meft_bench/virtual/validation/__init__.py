"""Programs that run on a GPU and on its virtual counterpart, for comparison.

place              where a program runs: a real GPU, or a virtual one with its ledger
card               memory, context, libraries, rates
matrix_products    workspaces of cuBLAS and cuBLASLt
attention_kernels  which kernel is chosen, and how much memory it uses
training_steps     peaks of whole training steps: padding, varying lengths
allocator_history  a recorded history, replayed by the model of the allocator
exact_gradients    the exact inverse compared with its stored twin, bit for bit
published          numbers that others measured on real GPUs, predicted
published_operators   operators of Liger-Kernel's benchmark
published_training    training steps of PEFT's method comparison and other sources
checks             the list of programs, and how one is run
"""
