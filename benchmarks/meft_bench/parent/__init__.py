"""The parent process: reads sweeps, starts one child per cell, writes records.

No module imports torch, so that every command starts at once, and a cell that runs out
of memory ends only its own process.

    cli           the command `meft-bench`
    arguments     its commands, their options, the types of values
    selection     the sweep, the cells and the run that a command line describes
    sweep         reads a TOML file as a list of cells
    trained       backbones that a sweep trains first: where their weights are
    trials        which cells wait for the best of some trials
    fields        valid values of each field of a cell
    several_ranks   which cells several ranks can train
    runs          files of records: reading, appending, which cells are done
    harness       runs the cells of a sweep
    engines       where cells run: on this machine, or on a Ray cluster
    checks        runs the checks of a sweep and compares a GPU with a virtual one
    progress      output during a run
    planning      the commands `plan` and `fit`: requests to the planner
    fit_records   records of what `fit` found
    show          the command `show`
    doctor        the command `doctor`
    meters        which meters of a GPU work here, for `doctor`
    output        printing to a terminal, a pipe or a full disk
"""
