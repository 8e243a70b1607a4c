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
published_bert        BERT-large, as the documentation of transformers trained it
published_gpt         a GPT from scratch, as a book's chapter trained it
published_images      a vision transformer, as torchao trained it
published_litgpt      LoRA of fourteen decoders, as litgpt trained them
litgpt_decoder        the decoder of litgpt, and its LoRA
litgpt_shapes         shapes of decoders in litgpt's tables
published_losses      losses over large vocabularies, from two benchmarks
published_nanovlm     a model of images and text, by batch size
checks             the list of programs, and how one is run
"""
