"""Real optimizer steps on the CPU under the meter: what the planner's tensor table claims, confirmed byte for byte.

The same model, loss, optimizer and training step run here as on a GPU; only kernels differ. Phases carry the names the
tensor table uses, so a measured peak can be compared with the estimated one in size and in place.
"""

from __future__ import annotations

import gc
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, Problem
from ..planner.shape import Shape
from ..planner.step import StepConfig, check
from ..runconfig import RunConfig
from ..trainer.checkpoint import all_finite, plain_state_dict
from ..trainer.model import GPT
from ..trainer.optimizer import build_optimizer
from ..trainer.step import MicroBatches, TrainStep
from .meter import TensorMeter


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """One metered optimizer step and an evaluation after it, over as many batches as the step has micro-batches.

    ``persistent_bytes`` are alive before the step: weights, optimizer states, gradients that accumulate.

    ``peak_operation`` is the dispatcher's name of the operation whose result made the peak, for example
    ``aten.mm.default``; ``phase_peaks`` are the most bytes alive within each phase, in order of first appearance;
    ``created`` counts the tensors of each phase and size, with the micro-batches' inputs where they were drawn.
    """

    peak_bytes: int
    persistent_bytes: int
    peak_phase: str
    peak_operation: str
    phase_peaks: dict[str, int]
    created: Counter[tuple[str, int]]


class Phase:
    """Follows a model through forward, backward and update with hooks that allocate nothing."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.name = "optimizer step"
        self.forward = False
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins),
            model.blocks[0].register_forward_pre_hook(self._embedded),
            *(block.register_forward_pre_hook(self._block_begins) for block in model.blocks),
            # checkpointing leaves a recomputed block through an exception: always_call
            *(block.register_forward_hook(self._block_ends, always_call=True) for block in model.blocks),
            model.ln_f.register_forward_pre_hook(self._blocks_done),
            model.ln_f.register_forward_hook(self._norm_done),
            model.register_forward_hook(self._loss_done),
            optimizer.register_step_pre_hook(self._update_begins),
        ]

    def stay(self, name: str) -> None:
        """Follow no longer: everything from here on is ``name``."""
        for hook in self._hooks:
            hook.remove()
        self.name = name

    def _on_gradient(self, tensor: Tensor, name: str) -> None:
        """The phase becomes ``name`` once the gradient of ``tensor`` is complete."""

        def arrived(_: Tensor) -> None:
            self.name = name

        tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _forward_begins(self, *_: Any) -> None:
        self.forward, self.name = True, "forward"

    def _embedded(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.forward:
            self._on_gradient(inputs[0], "embedding backward")

    def _block_begins(self, *_: Any) -> None:
        if not self.forward:
            self.name = "block recompute"

    def _block_ends(self, *_: Any) -> None:
        if not self.forward:
            self.name = "block backward"

    def _blocks_done(self, _: Any, inputs: tuple[Tensor, ...]) -> None:
        self._on_gradient(inputs[0], "block backward")

    def _norm_done(self, *_: Any) -> None:
        self.name = "loss forward"

    def _loss_done(self, _: Any, __: Any, loss: Tensor) -> None:
        self.forward = False
        self._on_gradient(loss, "loss backward")

    def _update_begins(self, *_: Any) -> None:
        self.name = "optimizer step"


def measure_cpu_step(
    config: RunConfig | tuple[Shape, StepConfig], *, steps: int = 3, grad_clip: float = 1.0, resume: bool = False
) -> StepMeasurement:
    """Build the model, run ``steps`` optimizer steps on random tokens, evaluate, save; report from the last step on.

    With ``resume`` everything is dropped and built again from the checkpoint, whose contents then count too: they are
    in host memory, which on a CPU is all there is.

    At least two, so that the reported one begins as all later ones do. Needs as much host memory as the step itself,
    and half precision is slow: use small vocabularies.

    Raises ConfigError for settings that are illegal or that no CPU step of our trainer can confirm.
    """
    shape, step = (config.shape, config.step_config) if isinstance(config, RunConfig) else config
    _check(shape, step, steps)
    probe_optimizer(nn.Linear(1, 1), step)  # what its library keeps from the first use on is not the step's
    with TensorMeter() as meter:
        train, phase = follow(shape, step, meter, grad_clip)
        persistent = 0
        for _ in range(steps):
            gc.collect()  # checkpointing leaves reference cycles behind
            meter.restart()
            persistent = meter.live_bytes
            train(random_batches(shape, step), learning_rate=1e-3)
        gc.collect()
        phase.stay("evaluation")
        train.evaluate(random_batches(shape, step))
        phase.stay("checkpoint save")
        all_finite(train.model)
        with tempfile.TemporaryFile() as file:
            torch.save([plain_state_dict(train.model), train.optimizer.state_dict()], file)
            if resume:
                del train
                file.seek(0)
                phase.name = "resume"
                _resume(shape, step, file, grad_clip)
    return measurement(meter, persistent)


def _resume(shape: Shape, step: StepConfig, file: IO[bytes], grad_clip: float) -> None:
    train = trainer(shape, step, grad_clip)
    weights, states = torch.load(file, map_location="cpu", weights_only=True)
    train.model.load_state_dict(weights)
    train.optimizer.load_state_dict(states)
    del weights, states
    train(random_batches(shape, step), learning_rate=1e-3)


def follow(shape: Shape, step: StepConfig, meter: TensorMeter, grad_clip: float) -> tuple[TrainStep, Phase]:
    """Our training step on a CPU, ready for its first update, with ``meter`` told of the phase it is in."""
    train = trainer(shape, step, grad_clip)
    train.allocate()
    phase = Phase(train.model, train.optimizer)
    meter.phase_of = lambda: phase.name
    return train, phase


def trainer(shape: Shape, step: StepConfig, grad_clip: float = 1.0) -> TrainStep:
    """Our training step on a CPU, with nothing allocated beside the model."""
    model = GPT(shape, step)
    return TrainStep(model, probe_optimizer(model, step), step, grad_clip=grad_clip, device=torch.device("cpu"))


def measurement(meter: TensorMeter, persistent_bytes: int) -> StepMeasurement:
    """What a meter saw since its last restart."""
    seen, top = meter.timeline, meter.timeline.peak
    return StepMeasurement(top.live_bytes, persistent_bytes, top.phase, top.operation, seen.phase_peaks, seen.created)


def probe_optimizer(model: nn.Module, step: StepConfig) -> torch.optim.Optimizer:
    """The optimizer of ``step`` with the usual settings, which do not matter for memory."""
    return build_optimizer(model, step, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def _check(shape: Shape, step: StepConfig, steps: int) -> None:
    problems = check(shape, step)
    if step.device != "cpu":
        problems.append(Problem("device", step.device, "is not measured here", "use device=cpu"))
    if step.compile:
        problems.append(Problem("compile", True, "is not confirmed on the CPU", "use compile=false"))
    if step.workload != "vramplan":
        problems.append(Problem("workload", step.workload, "is not our trainer", "use workload=vramplan"))
    if steps < 2:
        problems.append(Problem("steps", steps, "must be at least 2: the first does not begin as the later ones do"))
    if problems:
        raise ConfigError(problems)


def random_batches(shape: Shape, step: StepConfig) -> MicroBatches:
    """``grad_accum`` micro-batches of (B, T) tokens and targets, each made only when it is asked for."""

    def draw() -> Tensor:
        return torch.randint(0, shape.vocab_size, (step.batch_size, shape.block_size))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(step.grad_accum):
            yield draw(), draw()

    return batches()
