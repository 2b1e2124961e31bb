"""What is tried before step 0, so that it does not fail hours later: the update's memory, and room for a checkpoint.

The evaluation before the first step is the third part: it is the run's own. Resuming needs no more than training on the
device, because a checkpoint is loaded to the host.
"""

from __future__ import annotations

import shutil

from ..errors import VramplanError
from ..units import gib
from .checkpoint import CheckpointFolder, plain_state_dict
from .step import TrainStep
from .tensor_file import tensors_of


def rehearse(train_step: TrainStep, folder: CheckpointFolder) -> None:
    """Take the largest transients once. Raises VramplanError when the disk has no room for a checkpoint, and what torch
    raises when an update does not fit.
    """
    tensors = tensors_of([plain_state_dict(train_step.model), train_step.optimizer.state_dict()])
    needed = sum(t.numel() * t.element_size() for t in tensors)
    free = shutil.disk_usage(folder.directory).free
    if free < needed:
        words = f"a checkpoint of this run takes {gib(needed)}, and the disk of {folder.directory} has {gib(free)} free"
        raise VramplanError(f"{words}. Free some, or name another --out.")
    train_step.rehearse_update()
