"""Programs that run on a GPU and on its virtual twin and report the same figures.

place              where a program runs: a real GPU, or a virtual one with its ledger
card               memory, context, libraries, rates
matrix_products    workspaces of cuBLAS and cuBLASLt
attention_kernels  which kernel is chosen, and what it holds
training_steps     peaks of whole training steps: padding, varying lengths
allocator_history  a recorded history, replayed by the model of the allocator
exact_gradients    the exact inverse against its stored twin, bit for bit
checks             the list of programs, and how one is run
"""
