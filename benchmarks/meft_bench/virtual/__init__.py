"""A GPU that is not there: what a training step would take on it.

gpu           what is known of a GPU, from files of data

personality   the virtual GPU itself: all of the following in one context
path          what the two ways to train on it have in common
shim          makes fake CUDA tensors train on a build without CUDA
pure          leads fake CPU tensors CUDA's way, where the shim cannot be
facade        `torch.cuda`, which answers for it
attention     which kernel of attention it would run
workspaces    what kernels take for themselves
fused         takes the memory that our own kernels take
declared      which neurons of sparse adapters a batch activates
limits        where it has no answer, and what to do then

ledger        writes down every storage, on any device, fake or real
accumulation  which gradients autograd adds up in place
trace         what was written down: peaks, kinds, copies
views         a trace, summed up by phase, block and operator

allocator     what PyTorch's caching allocator makes of requests
replay        allocated, reserved, or out of memory, of a whole trace
snapshot      a real allocator's history, served by the model of it

predict       one cell of a sweep on a virtual GPU
plan          what a step of one cell takes, and why so much
fit           the largest value that fits, from few probes
planner       the child of the commands `plan` and `fit`
"""
