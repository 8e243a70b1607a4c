"""Sparse adapters whose neurons live in host memory (Hao et al., ACL 2024).

In reading order: `router` (who answers a token), `dense` (the plain twin),
`products` and `pieces` (the same at the cost of what was chosen), `token_topk` and
`union` (the two semantics), `store`, `adam` (home of the rows, and their optimizer),
`rows`, `cache`, `engine` (how rows get to the device), `row_grad`, `row_parameter`
(rows as autograd, optimizers and files see them), `adapter`, `optimizer`, `convert`.
"""
