"""Reversible fine-tuning with two streams, a coupling and a backward that inverts it.

Read the modules in this order: `coupling` (the mathematics), `twin` (the plain
forward), `stack` (the backward that rebuilds activations), `variants` (what F and G
are), `blocks` (the module that replaces a model's list of blocks) and `convert`.
"""
