"""Record and summarise the allocations and copies of a step.

ledger     records every storage, on any device, fake or real
location   where in a step an operator runs: its phase and its module
work       the operations of an operator, and the bytes that it reads and writes
collectives   what operators of `torch.distributed` tell of the kinds of their tensors
copies     which operators copy between host and device, and how much
tensors    properties of tensors, fake or real
gradient_accumulation   which gradients autograd accumulates in place

trace      the recording: peaks, kinds, copies
views      a trace, summed by phase, block and operator
breakdown  what the peak of a step consists of, as records keep it
live_memory   the allocator, served while the ledger records
replay     allocated and reserved bytes, or out of memory, for a whole trace
snapshot   the history of a real allocator, replayed by the model of it
"""
