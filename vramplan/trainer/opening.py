"""What is said of a run before its first step: the arithmetic of a step, the data, and whatever is unusual."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..device import host_memory
from ..errors import VramplanError
from ..planner.memory import estimate, host_bytes
from ..runconfig import RunConfig
from ..units import gib
from .events import RunStarted
from .rundir import device_name
from .shards import ShardSet
from .split import Split
from .stream import TokenStream


def opening(
    config: RunConfig,
    shards: ShardSet,
    stream: TokenStream,
    split: Split,
    *,
    run_dir: Path,
    device: torch.device,
    start_step: int,
    evaluation_blocks: int,
    parameters: int,
    peak_flops: float | None,
    notes: Sequence[str],
) -> RunStarted:
    """The event of a session that begins at ``start_step``; ``notes`` about the sessions before come last."""
    budget = config.total_steps * config.tokens_per_step
    return RunStarted(
        run_dir=run_dir,
        device=device_name(device),
        parameters=parameters,
        batch_size=split.batch_size,
        grad_accum=split.grad_accum,
        block_size=config.model.block_size,
        tokens_per_step=config.tokens_per_step,
        start_step=start_step,
        total_steps=config.total_steps,
        token_budget=budget,
        unique_tokens=stream.unique_tokens,
        blocks_per_epoch=stream.blocks_per_epoch,
        epochs=budget / stream.unique_tokens,
        val_tokens=shards.val_tokens,
        evaluation_blocks=evaluation_blocks,
        first_loss_expected=math.log(config.model.vocab_size),
        flops_per_token=config.shape.flops_per_token,
        peak_flops=peak_flops,
        notes=(*_notes(config, shards, split, device), *notes),
    )


def _host_notes(config: RunConfig) -> list[str]:
    """Whether offloaded states may be more than the host has free."""
    needed = int(host_bytes(config.shape, config.step_config))
    try:
        free = host_memory().available_bytes if needed else 0
    except VramplanError:  # a system that does not tell
        return []
    if needed <= free:
        return []
    return [f"offloaded states take {gib(needed)} of host memory, of which {gib(free)} are free now"]


def _notes(config: RunConfig, shards: ShardSet, split: Split, device: torch.device) -> list[str]:
    """Sentences about what is unusual."""
    notes, t = [], config.train
    if t.warmup_steps >= config.total_steps:
        notes.append(
            f"warmup_steps={t.warmup_steps} is not shorter than the run of {config.total_steps} steps: "
            "the learning rate only rises"
        )
    if not shards.held_out(config.model.block_size):
        notes.append("the validation split is shorter than a block: the end of the training text is used instead")
    notes += estimate(config.shape, config.step_config).caveats
    notes += _host_notes(config)
    if split.batch_size != config.step.batch_size:
        before = f"{config.step.batch_size} x {config.step.grad_accum}"
        notes.append(f"memory has reduced {before} micro-batches to those above; --resume --grow goes back")
    if config.step.device != device.type:
        notes.append(f"the configuration was made for {config.step.device}, this run is on {device.type}")
    return notes
