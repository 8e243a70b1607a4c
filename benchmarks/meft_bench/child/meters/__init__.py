"""Meters: each measures one quantity; a quantity that cannot be measured is None.

clock        seconds of a step
interleaved  seconds of two methods whose steps alternate
memory       bytes saved for backward, of the model state, requested, allocated, active,
             reserved, pinned, and of the process
profiled     storages of a step of compiled code, as torch's profiler sees them
rows         rows that sparse adapters transfer and hold
transfers    bytes of activations that are copied between host and device
copies       bytes of all copies of a step, as torch's profiler sees them
routing      how many neurons a batch activates, and the recall of the router

Of a real GPU, through `meft_bench.shared.nvml`:

link         bytes over the link to the GPU
power        energy, clocks and throttling during timed steps
processes    device memory of this process; how many others use the GPU
sampler      looks at a meter again and again in a thread
"""
