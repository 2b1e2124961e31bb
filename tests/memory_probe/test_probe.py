"""Real steps in real children, and the class of every exception that a worker can meet."""

from __future__ import annotations

import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vramplan.device import HostMemory, LiveGpu
from vramplan.errors import ConfigError
from vramplan.memory_probe import probe as module
from vramplan.memory_probe.card import FollowedPhase, PhasePeaks
from vramplan.memory_probe.cpu import random_batches, trainer
from vramplan.memory_probe.ledger import Ledger
from vramplan.memory_probe.measurement import Measurement
from vramplan.memory_probe.outcome import spilled
from vramplan.memory_probe.probe import probe, spills_silently
from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import GIB, MIB

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from random_probes import random_configuration

SHAPE = Shape(n_layer=2, n_head=2, n_embd=64, vocab_size=512, block_size=64)
STEP = StepConfig(batch_size=4, dtype="float32", loss="full", device="cpu")

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are Linux's")


def test_a_probe_on_a_cpu_counts_every_tensor_and_times_the_steps() -> None:
    seen: list[str] = []
    found = probe(SHAPE, STEP, steps=4, everything=True, doing=seen.append)
    assert (found.outcome, found.method, found.architecture) == ("fits", "tensors counted", "cpu")
    assert found.allocated_error is not None
    assert abs(found.allocated_error) < 0.001
    assert found.residual == found.allocated_error
    assert len(found.step_seconds) == 2
    assert found.tokens_per_second == pytest.approx(4 * 64 / sorted(found.step_seconds)[0], rel=0.5)
    assert {"loss backward", "optimizer step", "evaluation", "checkpoint save", "resume"} <= set(found.phase_peaks)
    assert found.process_bytes is not None
    assert found.process_bytes > 100 * MIB
    assert found.loss == pytest.approx(6.24, abs=0.3)
    assert "running step 4" in seen
    assert Measurement.read(found.model_dump_json()) == found


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_probe_watches_the_allocator_instead() -> None:
    found = probe(SHAPE, replace(STEP, compile=True), steps=3)
    if "compiler" in found.reason or "Compiler" in found.reason:
        pytest.skip("inductor needs a C++ compiler")
    assert (found.outcome, found.method, found.mode) == ("fits", "allocator events", "compiled")
    assert found.allocated_error == pytest.approx(0, abs=0.02)
    assert found.first_step_seconds is not None
    assert found.first_step_seconds > found.step_seconds[0]


@linux_only
def test_a_real_allocation_failure_is_an_out_of_memory() -> None:
    wide = replace(SHAPE, vocab_size=50304, block_size=1024)
    found = probe(wide, replace(STEP, batch_size=8), cap_bytes=900 * MIB)
    assert (found.outcome, found.cap_bytes) == ("out_of_memory", 900 * MIB)
    assert "allocate memory" in found.reason
    assert found.residual is found.tokens_per_second is None


@linux_only
def test_a_child_that_exceeds_its_host_memory_is_ended() -> None:
    wide = replace(SHAPE, vocab_size=50304, block_size=1024)
    found = probe(wide, replace(STEP, batch_size=8), host_bytes=600 * MIB)
    assert (found.outcome, "host memory" in found.reason) == ("out_of_memory", True)


def test_one_that_takes_too_long_is_ended() -> None:
    found = probe(SHAPE, STEP, seconds=0.5)
    assert (found.outcome, found.wall_seconds < 10) == ("timed_out", True)


RAISED = [
    ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 6.14 GiB.')", "out_of_memory"),
    ("RuntimeError('CUDA error: out of memory')", "out_of_memory"),
    ("RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)')", "out_of_memory"),
    ("RuntimeError('aoti_torch_empty_strided(2, a, b) API call failed at model.cpp, line 9')", "out_of_memory"),
    ("MemoryError()", "out_of_memory"),
    ("RuntimeError('No valid triton configs. OutOfMemoryError: out of resource: triton_mm')", "not_memory"),
    ("RuntimeError('CUDA error: an illegal memory access was encountered')", "not_memory"),
    ("ModuleNotFoundError(\"No module named 'triton'\")", "not_memory"),
    ("VramplanError('the loss is not finite (nan)')", "not_memory"),
    ("KeyboardInterrupt()", "killed"),
]


@pytest.mark.parametrize(("raised", "outcome"), RAISED)
def test_what_the_worker_raises_has_its_class(raised: str, outcome: str, tmp_path: Path) -> None:
    """The real worker in a real child, whose measuring function raises."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from vramplan.errors import VramplanError
            from vramplan.memory_probe import worker
            class torch:
                class OutOfMemoryError(RuntimeError): pass
            def fail(request, report):
                report.doing("running step 2")
                raise {raised}
            worker.measure = fail
            sys.exit(worker.main())
            """
        )
    )
    found = probe(SHAPE, STEP, argv=[sys.executable, str(script)])
    assert found.outcome == outcome, found.reason
    assert found.allocated_bytes is None


def test_a_loss_that_is_no_number_is_a_failure_and_not_a_lack_of_memory(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, torch\nfrom vramplan.trainer import model\nfrom vramplan.memory_probe import worker\n"
        "old = model.GPT.__init__\n"
        "def broken(self, *a, **k):\n    old(self, *a, **k)\n    self.wte.data.fill_(float('nan'))\n"
        "model.GPT.__init__ = broken\nsys.exit(worker.main())\n"
    )
    found = probe(SHAPE, STEP, argv=[sys.executable, str(script)])
    assert (found.outcome, "not finite" in found.reason) == ("not_memory", True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_worker_that_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, signal, sys, torch\nfrom vramplan.trainer import step\nfrom vramplan.memory_probe import worker\n"
        "steps = []\n"
        "def update(self):\n"
        "    steps.append(1)\n"
        "    if len(steps) == 5:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return old(self)\n"
        "old, step.TrainStep.update = step.TrainStep.update, update\nsys.exit(worker.main())\n"
    )
    found = probe(SHAPE, STEP, argv=[sys.executable, str(script)])
    assert (found.outcome, found.reason) == ("killed", "killed from outside (SIGKILL) while running step 2")


def test_figures_that_make_no_sense_are_not_believed() -> None:
    lie = "import json, sys; open(sys.argv[2], 'w').write(json.dumps({'kind': 'measured', 'allocated_bytes': -5}))"
    found = probe(SHAPE, STEP, argv=[sys.executable, "-c", lie])
    assert (found.outcome, found.allocated_bytes) == ("not_memory", None)
    assert "make no sense" in found.reason


MAD = [
    "tell(kind='measured', step_seconds=5)", "tell(kind='doing')", "os.remove(sys.argv[2])",
    "os.remove(sys.argv[2]); os.mkdir(sys.argv[2])", "tell(kind='failed', types=[], text='no such file: \\udcff')",
    "tell(kind='measured', device='\\udcff')", "tell(kind='failed', types=7, text=None)", "tell(kind=['measured'])",
    "tell(kind='measured', total_bytes='all')", "tell(kind='measured', phase_peaks=[1], loss=float('nan'))",
]  # fmt: skip


@pytest.mark.parametrize("body", MAD)
def test_whatever_a_child_reports_its_parent_gets_a_measurement_that_can_be_kept(body: str, tmp_path: Path) -> None:
    script = f"import json, os, sys\ndef tell(**r): open(sys.argv[2], 'a').write(json.dumps(r) + chr(10))\n{body}"
    found = probe(SHAPE, STEP, argv=[sys.executable, "-c", script])
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.add([found]) == 1
        assert list(ledger.measurements()) == [found]


def test_a_child_cannot_change_what_its_parent_knows() -> None:
    lie = {
        "kind": "measured",
        "expected_allocated_bytes": 1000,
        "allocated_bytes": 900_000,
        "version": "9",
        "id": "0" * 8,
    }
    code = f"import json, sys; open(sys.argv[2], 'w').write(json.dumps({lie!r}))"
    found = probe(SHAPE, STEP, argv=[sys.executable, "-c", code])
    assert found.expected_allocated_bytes == estimate(SHAPE, STEP).peak_allocated_bytes
    assert (found.version != "9", found.allocated_bytes) == (True, 900_000)


def test_figures_of_a_child_that_then_crashed_are_no_evidence() -> None:
    code = "import json, os, sys; open(sys.argv[2], 'w').write(json.dumps({'kind': 'measured', 'allocated_bytes': 7}))"
    found = probe(SHAPE, STEP, argv=[sys.executable, "-c", f"{code}; os.abort()"])
    assert (found.outcome, found.residual) == ("not_memory", None)


def test_ctrl_c_is_a_measurement_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_child", interrupted)
    found = probe(SHAPE, STEP)
    assert (found.outcome, found.reason) == ("killed", "stopped by Ctrl-C")


@pytest.mark.parametrize(
    ("changes", "steps", "field"),
    [({}, 2, "steps"), ({"workload": "nanogpt"}, 5, "workload"), ({"batch_size": 0}, 5, "batch_size")],
)
def test_what_no_child_could_run_is_refused(changes: dict[str, Any], steps: int, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        probe(SHAPE, replace(STEP, **changes), steps=steps)
    assert field in [p.field for p in caught.value.problems]


# ------------------------------------------------------------------- any of them


@pytest.mark.parametrize("seed", range(6))
def test_random_configurations_are_measured_and_met(seed: int) -> None:
    """Ten here; ``benchmarks/random_probes.py`` ran 130, and what it recorded is asserted in test_calibration."""
    shape, step = random_configuration(seed)
    found = probe(shape, step, steps=3, seconds=120)
    assert found.outcome == "fits", found.reason
    assert found.allocated_error == pytest.approx(0, abs=0.01)


# ------------------------------------------------------------------- what only a card or another system has


class Allocator:
    """Stands for a card's statistics: a peak that can be reset."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def use(self, n_bytes: int) -> None:
        self.now = n_bytes
        self.peak = max(self.peak, n_bytes)

    def reset(self) -> None:
        self.peak = self.now


def test_peaks_are_read_and_reset_where_the_phase_changes() -> None:
    memory = Allocator()
    peaks = PhasePeaks(lambda: memory.peak, memory.reset)
    for phase, sizes in (("forward", (3, 9, 4)), ("backward", (7, 5)), ("forward", (2, 8)), ("", ())):
        peaks.enter(phase)
        for size in sizes:
            memory.use(size)
    assert peaks.found == {"forward": 9, "backward": 7}
    assert PhasePeaks(None, None).active is False


def test_the_phases_of_a_real_step_are_followed_by_name() -> None:
    train = trainer(SHAPE, STEP)
    train.allocate()
    entered: list[str] = []

    class Listening(PhasePeaks):
        def enter(self, phase: str) -> None:
            entered.append(phase)

    FollowedPhase(train.model, train.optimizer, Listening(None, None))
    train(random_batches(SHAPE, STEP), 1e-3)
    assert entered[1:] == [
        "forward", "loss forward", "loss backward", "block backward", "embedding backward", "optimizer step",
    ]  # fmt: skip


def test_a_card_is_named_and_its_driver_and_estimate_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    card = LiveGpu(0, "NVIDIA GeForce RTX 4070", 12282 * MIB, 11 * GIB, "580.1", (8, 9), ())
    monkeypatch.setattr(module, "live_gpu", lambda: card)
    monkeypatch.setattr(module, "host_memory", lambda: HostMemory(2**40, 2**40, "test"))
    shape, step = Shape(n_layer=12, n_head=12, n_embd=768), StepConfig(batch_size=8)
    expected = estimate(shape, step, module.card_of(card))
    told = {
        "kind": "measured", "method": "allocator statistics", "device": card.name, "architecture": "8.9",
        "allocated_bytes": 5 * GIB, "reserved_bytes": 6 * GIB, "process_bytes": expected.process_bytes + 2**26,
        "step_seconds": [0.1], "tokens_per_second": 81920.0, "total_bytes": 12 * GIB,
    }  # fmt: skip
    code = f"import json, sys; open(sys.argv[2], 'w').write(json.dumps({told!r}) + chr(10))"
    found = probe(shape, step, argv=[sys.executable, "-c", code])
    assert (found.outcome, found.device, found.architecture, found.driver) == ("fits", card.name, "8.9", "580.1")
    assert found.expected_process_bytes == expected.process_bytes
    assert found.residual == pytest.approx(2**26 / expected.process_bytes)
    assert found.expected_tokens_per_second is not None


@pytest.mark.parametrize(
    ("spills", "process", "rate", "word"),
    [
        (True, 16 * GIB, 1000.0, "went to host"), (True, 11.9 * GIB, 100.0, "swapped"), (True, 11.9 * GIB, 900.0, ""),
        (True, 6 * GIB, 100.0, ""), (False, 16 * GIB, 10.0, ""),
    ],
)  # fmt: skip
def test_memory_that_went_elsewhere_without_a_word(spills: bool, process: float, rate: float, word: str) -> None:
    found = spilled(
        spills=spills, process_bytes=int(process), total_bytes=12 * GIB, tokens_per_second=rate,
        expected_tokens_per_second=1000.0,
    )  # fmt: skip
    assert (word in found) if word else found == ""


def test_systems_that_spill_are_known(tmp_path: Path) -> None:
    release = tmp_path / "version"
    release.write_text("5.15.167.4-microsoft-standard-WSL2\n")
    assert spills_silently("win32", tmp_path / "none")
    assert spills_silently("linux", tmp_path)
    release.write_text("6.8.0-45-generic\n")
    assert not spills_silently("linux", tmp_path)
    assert not spills_silently("linux", tmp_path / "none")


@pytest.mark.gpu
def test_a_real_out_of_memory_under_a_cap() -> None:
    shape, step = Shape(n_layer=12, n_head=12, n_embd=768), StepConfig(batch_size=16, loss="full")
    assert torch.cuda.is_available()
    found = probe(shape, step, cap_bytes=4 * GIB)
    assert found.outcome == "out_of_memory"
