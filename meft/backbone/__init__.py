"""What a method needs of a transformers model: its blocks, in two halves each.

One file per family, all of one form:

    attention_half(block, hidden, adapter, **call)   what mixes tokens
    mlp_half(block, hidden, adapter)                 what treats each token alone

Each half is whole: its norm, its residual and its dropout are inside. `call` holds what
the model's loop passes to a block besides the hidden states, by name. Where an adapter
is given, it sits where the paper puts it (Liao et al., NeurIPS 2023, and their code):
after attention, sequential with a skip of its own; beside the feed-forward, on the same
input. `families` lists them (`bart`, `bert`, `llama`,
`opt`, `vit`) and looks into a model.
"""
