"""Sparse adapters whose neurons are stored in host memory (Hao et al., ACL 2024).

Read the modules in this order: `router` (selects the neurons of a token), `dense` (the
plain twin), `products` and `pieces` (the same computation on the chosen rows only),
`choice` (the neurons that a batch uses), `token_topk` and `union` (the two semantics),
`store`, `adam` (storage of the rows, and their optimizer), `rows`, `cache`, `engine`,
`offloaded_rows` (transfer of rows to the device), `home`, `admission` (rows that take
their steps there), `row_grad`, `row_parameter` (rows as a parameter for autograd,
optimizers and files), `adapter`, `optimizer`, `convert`; for several processes,
`row_mean` (each has all rows), `division`, `divided_rows` and `row_shares` (each has a
share), `ranks`, `trainer_saves`.
"""
