"""Meters: each measures one quantity; a quantity that cannot be measured is None.

clock        seconds of a step
interleaved  seconds of two methods whose steps alternate
memory       bytes saved for backward, of the model state, allocated, reserved, and of
             the process
profiled     storages of a step of compiled code, as torch's profiler sees them
nvml         bytes over the link to the device, and NVML's count for this process
rows         rows that sparse adapters transfer and hold
transfers    bytes of activations that are copied between host and device
routing      how many neurons a batch activates, and the recall of the router
"""
