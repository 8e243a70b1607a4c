"""Meters: each measures one thing, and gives None for what it could not measure.

clock        seconds of a step
interleaved  seconds of two methods whose steps take turns
memory       bytes saved for backward, resting, allocated, reserved, and of the process
transfer     bytes over the link to the device, and what NVML counts for this process
rows         what rows of sparse adapters move and hold
routing      how many neurons a batch activates, and how well the router chose
"""
