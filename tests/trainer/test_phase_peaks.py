"""What a run records of its memory, phase by phase, with an allocator that says what it is told to say."""

from __future__ import annotations

import torch
from tiny import config

from vramplan.cli.subject import read_subject
from vramplan.trainer import loop
from vramplan.trainer.loop import train
from vramplan.trainer.metrics import read_metrics
from vramplan.trainer.phase_peaks import PhasePeaks

SIZES = {"forward": 700, "backward": 900, "optimizer step": 300, "evaluation": 500, "checkpoint save": 200}


class Statistics:
    """Peaks that can be reset, as an allocator has them."""

    def __init__(self) -> None:
        self.peak, self.reserved = 1000, 2000

    def reset(self) -> None:
        self.peak = self.reserved = 0


def test_a_reset_forgets_nothing_of_the_whole() -> None:
    memory = Statistics()
    peaks = PhasePeaks(lambda: memory.peak, memory.reset, lambda: memory.reserved, lambda: 3)
    assert (peaks.allocated, peaks.reserved, peaks.retries, peaks.active) == (1000, 2000, 3, True)
    peaks.enter("forward")
    memory.peak, memory.reserved = 800, 2500
    peaks.enter("backward")
    memory.peak, memory.reserved = 900, 1000
    assert peaks.found == {"forward": 800}
    assert (peaks.allocated, peaks.reserved) == (1000, 2500)  # before the first phase there was more
    peaks.enter("backward")  # still the same phase: nothing is over
    assert memory.peak == 900


def test_without_statistics_nothing_is_claimed() -> None:
    peaks = PhasePeaks.of(torch.device("cpu"))
    peaks.enter("forward")
    peaks.enter("backward")
    assert (peaks.found, peaks.allocated, peaks.reserved, peaks.retries, peaks.active) == ({}, None, None, None, False)


def test_a_run_records_its_phases_and_the_report_reads_them(shards, tmp_path, monkeypatch) -> None:
    memory = Statistics()

    class Scripted(PhasePeaks):
        """Each phase takes what SIZES says."""

        @classmethod
        def of(cls, device):
            return cls(lambda: memory.peak, memory.reset, lambda: memory.reserved, lambda: 1)

        def enter(self, phase):
            super().enter(phase)
            memory.peak = SIZES[phase]

    monkeypatch.setattr(loop, "PhasePeaks", Scripted)
    train(config(), shards, tmp_path / "run", device=torch.device("cpu"), on_event=lambda event: None)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "memory"]
    assert {name: size for name, size in lines[-1].items() if name in SIZES} == SIZES
    assert len(lines) < 12, "a line is written only when something is new"
    *_, measured = read_subject(tmp_path / "run", 1)
    assert measured["phase_peaks"] == SIZES
    assert measured["peak_allocated_bytes"] == 1000
    assert measured["alloc_retries"] == 1
