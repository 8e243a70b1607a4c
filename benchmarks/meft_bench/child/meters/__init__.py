"""Meters: each measures one thing, and says None for what it could not measure.

clock     seconds of a step
memory    bytes saved for backward, resting, allocated, reserved, and of the process
transfer  bytes over the link to the device, and what NVML counts for this process
"""
