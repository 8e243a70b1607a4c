"""Where cells run: an engine takes cells and yields records as they end.

engine        what an engine is
job           what all cells of a run have in common
local         sequentially, or in parallel, on this machine
gpus          which GPU of this machine a cell has
children      how children are started, by the device of each
ray_cluster   on the machines of a Ray cluster
"""

NAMES = ("local", "ray")
"""Values of `--engine`."""
