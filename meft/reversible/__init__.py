"""Reversible fine-tuning: two streams, a coupling, a backward that inverts it.

Read in this order: `coupling` (the mathematics), `twin` (the plain forward), `stack`
(the backward that rebuilds), `variants` (what F and G are), `encoder` and `convert`.
"""
