"""The ledger listens to training runs."""

from __future__ import annotations

from vramplan.device import LiveGpu
from vramplan.memory_probe import training as module
from vramplan.memory_probe.ledger import Ledger
from vramplan.memory_probe.training import EvidenceOfTraining, spill_check
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer.events import CompileSwitched, MicroBatchReduced
from vramplan.units import GIB

LIVE = LiveGpu(
    index=0, name="NVIDIA GeForce RTX 4070", total_bytes=12 * GIB, free_bytes=11 * GIB, processes=(), driver="1.2",
    capability=(8, 9),
)  # fmt: skip
SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, block_size=64)


def config(device: str) -> RunConfig:
    return RunConfig.build(SHAPE, StepConfig(batch_size=8, grad_accum=2, device=device, dtype="float32"))


def reduced(outcome: str = "out_of_memory", doing: str = "training step", compiled: bool = False) -> MicroBatchReduced:
    return MicroBatchReduced(
        step=3, doing=doing, compiled=compiled, outcome=outcome, reason="CUDA out of memory.", batch_size_before=8,
        batch_size=4, grad_accum_before=2, grad_accum=4, estimated_bytes_before=2, estimated_bytes=1,
    )  # fmt: skip


def test_a_step_that_did_not_fit_becomes_evidence(tmp_path, monkeypatch):
    monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path / "ledger.sqlite"))
    listener = EvidenceOfTraining(config("cuda"), LIVE, print)
    listener(CompileSwitched(step=2))
    listener(reduced(doing="evaluation"))
    listener(reduced(compiled=True))
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        (found,) = ledger.measurements()
    assert (found.outcome, found.step.batch_size, found.step.grad_accum) == ("out_of_memory", 8, 2)
    assert found.step.compile, "what it was then, not what the configuration began with"
    assert (found.device, found.limit_bytes) == (LIVE.name, 11 * GIB)
    assert found.reason == "while training: CUDA out of memory."
    assert found.ran_out_unexpectedly, "so small a model should have fitted: that is what is to be remembered"


def test_trouble_with_the_ledger_does_not_stop_a_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("VRAMPLAN_LEDGER", str(tmp_path / "file" / "ledger.sqlite"))
    notes = []
    EvidenceOfTraining(config("cpu"), None, notes.append)(reduced())
    assert len(notes) == 1
    assert notes[0].startswith("not kept as evidence: ")


def test_only_where_memory_spills_it_is_looked_for(monkeypatch):
    assert spill_check(config("cuda"), LIVE) is None
    monkeypatch.setattr(module, "spills_silently", lambda: True)
    check = spill_check(config("cuda"), LIVE)
    assert check is not None
    assert check(reserved_bytes=4 * GIB, tokens_per_second=1e9) == ""
    assert "the rest went to host memory" in check(reserved_bytes=12 * GIB, tokens_per_second=1e9)
    assert spill_check(config("cpu"), None) is None
