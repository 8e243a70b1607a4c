"""Where cells run: an engine takes cells and yields records as they end.

engine        what an engine is
job           what all cells of a run have in common
local         sequentially, or in parallel, on this machine
gpus          which GPU of this machine a cell has
packing       what cells take of a GPU, predicted, so that several can share it
environment   versions, sources and machine
isolate       runs one cell in a child process and records how it ended
children      how children are started, by the device of each
child_process   starts a child, waits for it, kills it with its processes
forks         starts children by forks of one process with all imports done
host_memory   what is free for cells, and what a child and its processes hold
logs          the last lines of the log of a child
ray_cluster   on the machines of a Ray cluster
"""

NAMES = ("local", "ray")
"""Values of `--engine`."""
