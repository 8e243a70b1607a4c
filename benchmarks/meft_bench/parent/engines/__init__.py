"""Where cells run. `local`: sequentially, or in parallel, on this machine."""
