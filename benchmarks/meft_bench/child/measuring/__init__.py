"""Measure one cell.

measure          trains, scores and probes, in this order
probes           memory, traffic, routing, the inverse, interleaved timing
gpu_watch        what NVML says of the GPU during a cell; copies by the profiler
guard            perplexity of other text, before and after training
starting_point   how much a method changes the model before any training
over_ranks       bytes of several ranks: of the one with the most, and of all together
partial_result   measurements so far, kept even if the cell fails
"""
