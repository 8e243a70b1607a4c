"""Divided rows in the checkpoints of transformers' Trainer.

The Trainer of the first process alone writes a checkpoint, so that rows and their
optimizer state have to be there before it does. It decides at the end of a step or an
epoch whether to save, in all processes, and calls its callbacks before and after that.
"""

import contextlib
from typing import TYPE_CHECKING, Any

from meft.sparse.ranks import gathered_rows

if TYPE_CHECKING:
    import transformers


# In quotes: `TrainerCallback` brings peft, which takes a sixth of a second.
def gather_for_trainer() -> "transformers.TrainerCallback":
    """Return a callback that gathers divided rows for the checkpoints of a Trainer.

        meft.divide_rows(model)
        Trainer(model, args, ..., callbacks=[meft.gather_for_trainer()])

    It runs `meft.gathered_rows` around each checkpoint that is due at the end of a step
    or an epoch, with the state of the optimizer unless
    `TrainingArguments.save_only_model` is set. A run can be resumed by any number of
    processes. Other saves are refused, as by `trainer.save_model()` or of the best
    model of an evaluation: run them in `with meft.gathered_rows(model):`.

    Returns:
        The callback, for one Trainer.
    """
    from transformers import TrainerCallback

    class GatherForTrainer(TrainerCallback):
        """Gathers rows between the decision to save and the save."""

        def __init__(self) -> None:
            self._gathered = contextlib.ExitStack()

        def _open(self, args: Any, control: Any, model: Any) -> None:
            if control.should_save:
                self._gathered.close()
                self._gathered.enter_context(
                    gathered_rows(model, optimizer_state=not args.save_only_model)
                )

        def on_step_end(
            self, args: Any, state: Any, control: Any, **others: Any
        ) -> None:
            self._open(args, control, others["model"])

        def on_epoch_end(
            self, args: Any, state: Any, control: Any, **others: Any
        ) -> None:
            self._open(args, control, others["model"])

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            self._gathered.close()

    return GatherForTrainer()
