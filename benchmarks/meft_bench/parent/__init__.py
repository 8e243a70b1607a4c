"""The parent process: reads sweeps, starts one child per cell, writes records.

Nothing here imports torch, so that every command answers at once and a cell that takes
the machine's memory takes only its own process with it.

    cli           the command `meft-bench`
    sweep         a TOML file becomes a list of cells
    fields        what each field of a cell may hold
    runs          files of records: reading, appending, which cells are done
    harness       runs the cells of a sweep
    engines       where cells run: one after another or side by side on this machine
    checks        runs the checks of a sweep and compares a GPU with its virtual twin
    isolate       one cell in a child process, and a record of how it ended
    environment   versions, sources and machine
    progress      what is printed during a run
    planning      the commands `plan` and `fit`
    show          the command `show`
    doctor        the command `doctor`
    output        printing to a terminal, a pipe or a full disk
"""
