"""Code of the user, loaded in the child and nowhere else.

code     an object of a file or of an installed module
metric   a metric: a function, or a class of `evaluate.Metric`
"""
