"""Measures one cell.

measure          trains, scores and probes, in this order
probes           memory, traffic, routing, the inverse, interleaved timing
starting_point   how far a method moves the model before any training
partial_result   what has been measured so far, kept however the cell ends
"""
