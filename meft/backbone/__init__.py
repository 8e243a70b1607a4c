"""Access to the blocks of a transformers model, each split into two halves.

There is one module per family, and all have the same functions:

    attention_half(block, hidden, adapter, **call)   the part that mixes tokens
    mlp_half(block, hidden, adapter)                 the position-wise layers

Each half is complete: its norm, its residual and its dropout are inside. `call` holds
the arguments other than the hidden states that the model's loop passes to a block, by
name. If an adapter is given, it is placed as in the paper (Liao et al., NeurIPS 2023,
and their code): after attention it is sequential with its own skip connection; at the
feed-forward it runs in parallel, on the same input. `families` lists them (`bart`,
`bert`, `llama`, `opt`, `vit`) and finds the blocks of a model.
"""
