"""Where cells run. `local`: one after another, or side by side, on this machine."""
