"""Whole training steps on a fake accelerator, with CUDA's attention operators; prints one JSON object a configuration.

The accelerator is a PrivateUse1 backend in Python: a device of its own, whose backwards run in autograd's thread for
it, as CUDA's do. Its tensors are fake. A process of its own, because a backend can be registered only once.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from vramplan.memory_probe.cpu import Phase, StepMeasurement, measurement, probe_optimizer
from vramplan.memory_probe.fake import cuda_operators
from vramplan.memory_probe.meter import TensorMeter
from vramplan.planner.allocator import MIN_BLOCK
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.step import TrainStep


def measured(shape: Shape, step: StepConfig, device: torch.device) -> StepMeasurement:
    """The second optimizer step on ``device``."""

    def draw() -> torch.Tensor:
        return torch.zeros(step.batch_size, shape.block_size, dtype=torch.int64, device=device)

    with FakeTensorMode(), cuda_operators(shape, step), TensorMeter(granularity=MIN_BLOCK) as meter:
        # made where it is: a fake parameter cannot be moved while it is watched
        with device, mock.patch.object(torch.nn.init, "normal_"):
            model = GPT(shape, step)
        train = TrainStep(model, probe_optimizer(model, step), step, grad_clip=1.0, device=device)
        train.allocate()
        phase = Phase(train.model, train.optimizer)
        meter.phase_of = lambda: phase.name
        persistent = 0
        for _ in range(2):
            gc.collect()
            meter.restart()
            persistent = meter.live_bytes
            for _ in range(step.grad_accum):
                train.micro_step(draw(), draw())
            train.update()
    devices = {p.device.type for p in model.parameters()} | {
        p.grad.device.type for p in model.parameters() if p.grad is not None
    }
    if devices != {device.type}:
        raise RuntimeError(f"the step ran on {devices}")
    return measurement(meter, persistent)


def main(configurations: list[list[dict[str, Any]]]) -> None:
    _setup_privateuseone_for_python_backend("fakecard")
    for shape, step in configurations:
        found = measured(Shape(**shape), StepConfig(**step), torch.device("fakecard", 0))
        figures = {"peak": found.peak_bytes, "persistent": found.persistent_bytes, "phases": found.phase_peaks}
        print(json.dumps(figures | {"phase": found.peak_phase}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
    os._exit(0)  # the device's thread cannot be joined
