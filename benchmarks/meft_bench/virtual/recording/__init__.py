"""What a step allocates and copies, recorded and summarised.

ledger     records every storage, on any device, fake or real
gradient_accumulation   which gradients autograd adds up in place

trace      the recording: peaks, kinds, copies
views      a trace, summed up by phase, block and operator
replay     allocated, reserved or out of memory, for a whole trace
snapshot   a real allocator's history, replayed by the model of it
"""
