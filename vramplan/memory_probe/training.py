"""What a training run teaches about memory: the ledger listens to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..device import LiveGpu, installed_version
from ..errors import VramplanError
from ..planner.allocator_settings import AllocatorSettings
from ..planner.gpu import Gpu
from ..planner.memory import context_bytes
from ..planner.speed import tokens_per_second
from ..runconfig import RunConfig
from ..trainer.events import TRAINING, Event, MicroBatchReduced
from .ledger import Ledger
from .measurement import Measurement
from .outcome import spilled
from .probe import card_of, identity, spills_silently


class EvidenceOfTraining:
    """An ``on_event`` that keeps every training step for which memory did not suffice.

    Trouble with the ledger is only noted. ``live`` is the card as it was before the run took any of it: what was free
    then is what the step had.
    """

    def __init__(self, config: RunConfig, live: LiveGpu | None, on_note: Callable[[str], None]) -> None:
        self.config, self.live, self.on_note = config, live, on_note

    def __call__(self, event: Event) -> None:
        """Keep a measurement of the step that did not fit."""
        if not isinstance(event, MicroBatchReduced) or event.doing != TRAINING:
            return
        try:
            with Ledger(on_note=self.on_note) as ledger:
                ledger.add([self.measurement(event)])
        except VramplanError as error:
            self.on_note(f"not kept as evidence: {error}")

    def measurement(self, event: MicroBatchReduced) -> Measurement:
        """The step before it was divided further: how it ended, under which limit."""
        batch_size, grad_accum = event.batch_size_before, event.grad_accum_before
        step = replace(self.config.step_config, batch_size=batch_size, grad_accum=grad_accum, compile=event.compiled)
        live = self.live if step.device == "cuda" else None
        return Measurement.model_validate(
            identity(self.config.shape, step, live, AllocatorSettings())
            | {
                "outcome": event.outcome,
                "reason": f"while training: {event.reason}",
                "torch": installed_version("torch"),
                "limit_bytes": live.free_bytes if live else None,
            }
        )


def spill_check(config: RunConfig, live: LiveGpu | None) -> Callable[..., str] | None:
    """What tells a run whether its memory went to the host; None where a lack of memory is an error anyway."""
    card: Gpu | None = card_of(live)
    if live is None or card is None or not spills_silently():
        return None
    expected = float(tokens_per_second(config.shape, config.step_config, card))

    def check(*, reserved_bytes: int, tokens_per_second: float) -> str:
        return spilled(
            spills=True,
            process_bytes=reserved_bytes + context_bytes(card),
            total_bytes=live.total_bytes,
            tokens_per_second=tokens_per_second,
            expected_tokens_per_second=expected,
        )

    return check
