"""Measure one cell.

measure          trains, scores and probes, in this order
probes           memory, traffic, routing, the inverse, interleaved timing
guard            perplexity of other text, before and after training
starting_point   how much a method changes the model before any training
partial_result   measurements so far, kept even if the cell fails
"""
