"""The fine-tuning methods, one file per family, all with one signature:

    method(model, cell) -> model

A method takes a pre-trained classifier with a new head, selects the trained parameters
through `requires_grad`, wraps modules in place as needed, and returns the model. The
seed is set before the call. The registry names the methods.

full           every parameter; or the head only
lora           LoRA
adapters       bottleneck adapters
checkpointing  gradient checkpointing of the above
reversible     MEFT1, MEFT2 and MEFT3; LoRA or full fine-tuning in a reversible model
sparse         dense and sparse adapters of many neurons
own            which of these a cell names, or which function of the user
peft_config    any config of PEFT
any_checkpointing   gradient checkpointing of any model, as transformers does it
mlp_parts      MLPs in parts of the tokens, for methods that leave blocks as they are
"""
