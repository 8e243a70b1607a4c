"""The fine-tuning methods, one file per family, all with one signature:

    method(model, cell) -> model

A method takes a pre-trained classifier with a new head, selects the trained parameters
through `requires_grad`, wraps modules in place as needed, and returns the model. The
seed is set before the call. The registry names the methods. One whose update is its own
has a second function, which makes its optimizer:

    optimizer(model, groups, cell) -> torch.optim.Optimizer

full           every parameter; or the head only
lora           LoRA and its variants
peft_methods   other methods of peft that change layers
prompts        methods of peft that put vectors in front of the tokens
bitfit         biases
adapters       bottleneck adapters, where MEFT3 and where other papers have them
compacter      adapters of hypercomplex layers
ladder         ladder side-tuning
checkpointing  gradient checkpointing of the above
segments       gradient checkpointing of several blocks at a time
offload        activations in host memory
lisa           a few random blocks at a time
badam          one block at a time
galore         gradients in a low-rank subspace
mezo           differences of losses
reversible     MEFT1, MEFT2 and MEFT3; LoRA or full fine-tuning in a reversible model
sparse         dense and sparse adapters of many neurons
hashed_experts   experts that a hash of the token chooses
own            which of these a cell names, or which function of the user
peft_config    any config of PEFT
any_checkpointing   gradient checkpointing of any model, as transformers does it
mlp_parts      MLPs in parts of the tokens, for methods that leave blocks as they are
memory_layers  product-key memories
"""
