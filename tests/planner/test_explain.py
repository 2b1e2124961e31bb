"""A failure beside the configuration that failed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vramplan.planner.culprit import find_culprit, product
from vramplan.planner.explain import Available, Explanation, available_in, explain
from vramplan.planner.gpu import find_gpu
from vramplan.planner.levers import EXPANDABLE
from vramplan.planner.memory import estimate
from vramplan.planner.oom_cause import driver_request
from vramplan.planner.oom_text import read_oom
from vramplan.planner.risk import needed_for
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig, tokens_per_step
from vramplan.units import GIB, MIB

SHAPE = Shape(n_layer=12, n_head=12, n_embd=576)
STEP = StepConfig(batch_size=16, grad_accum=32, compile=True, loss="full", workload="nanogpt")
LOGITS = 16 * 1024 * 50304 * 2

TRACE = """Traceback (most recent call last):
  File "/w/nanoGPT/train.py", line 304, in <module>
    {frame}
  File "/tmp/torchinductor_me/q7/cq7.py", line 512, in call
    {line}
torch.OutOfMemoryError: CUDA out of memory.{rest}
"""
BUFFER = "buf1 = empty_strided_cuda((16, 1024, 50304), (51511296, 50304, 1), torch.bfloat16)"
BACKWARD = "scaler.scale(loss).backward()"
FIGURES = (
    " Tried to allocate {asked}. GPU 0 has a total capacity of {total} GiB of which {free} GiB is free. Including "
    "non-PyTorch memory, this process has {own} GiB memory in use. Of the allocated memory {allocated} GiB is "
    "allocated by PyTorch, and {idle} GiB is reserved by PyTorch but unallocated."
)


def text(frame: str = BACKWARD, line: str = BUFFER, rest: str = "") -> str:
    return TRACE.format(frame=frame, line=line, rest=rest)


def figures(asked: str = "1.54 GiB", total: float = 11.71, free: float = 0.5, own: float = 8.2,
            allocated: float = 7.6, idle: float = 0.3) -> str:  # fmt: skip
    return FIGURES.format(asked=asked, total=total, free=free, own=own, allocated=allocated, idle=idle)


def explained(words: str, available: Available | None = None, step: StepConfig = STEP, shape: Shape = SHAPE,
              gpu: str | None = None) -> Explanation:  # fmt: skip
    return explain(read_oom(words), (shape, step), find_gpu(gpu) if gpu else None, available)


# -------------------------------------------------------------------- the tensor


def test_the_seeds_failure_is_the_gradient_of_the_logits_beside_the_logits() -> None:
    lookup = find_culprit(read_oom(text()), estimate(SHAPE, STEP))
    assert lookup.culprit is not None
    assert lookup.culprit.name == "gradient of the logits"
    assert lookup.culprit.phase == "loss backward"
    assert lookup.culprit.n_bytes == LOGITS
    assert lookup.culprit.product == "16 x 1024 x 50304 x 2 bytes"
    beside = lookup.culprit.also_alive[0]
    assert (beside.name, beside.n_bytes) == ("logits", LOGITS)


def test_the_forward_names_the_logits_of_the_same_size() -> None:
    lookup = find_culprit(read_oom(text(frame="logits, loss = model(X, Y)")), estimate(SHAPE, STEP))
    assert lookup.culprit is not None
    assert lookup.culprit.name == "logits"


def test_the_printed_size_is_enough() -> None:
    found = read_oom(text(line="pass", rest=figures()))
    assert found.shape is None
    lookup = find_culprit(found, estimate(SHAPE, STEP))
    assert lookup.culprit is not None
    assert lookup.culprit.name == "gradient of the logits"


def test_float32_logits_of_eager_nanogpt_are_told_by_the_phase() -> None:
    step = replace(STEP, batch_size=32, grad_accum=1, compile=False)
    shape = Shape(n_layer=12, n_head=12, n_embd=768)
    words = text(frame="logits, loss = model(X, Y)", line="return F.cross_entropy(x, y)", rest=figures("6.14 GiB"))
    lookup = find_culprit(read_oom(words), estimate(shape, step))
    assert lookup.culprit is not None
    assert lookup.culprit.n_bytes == 32 * 1024 * 50304 * 4
    assert lookup.culprit.product == "32 x 1024 x 50304 x 4 bytes"
    assert lookup.culprit.name == "log-probabilities, float32"


def test_what_was_allocated_tells_equal_tensors_apart() -> None:
    full = estimate(SHAPE, STEP)
    names = {}
    for name in ("logits", "gradient of the logits"):
        alive = 0
        for change in full.changes:
            if change.alloc and change.row.name == name:
                names[name] = alive
            alive += int(change.row.size) if change.alloc else -int(change.row.size)
    for name, alive in names.items():
        rest = figures(allocated=round(alive / GIB, 2), own=round(alive / GIB + 0.5, 2))
        lookup = find_culprit(read_oom(f"torch.OutOfMemoryError: CUDA out of memory.{rest}"), full)
        assert lookup.culprit is not None
        assert name in lookup.culprit.name.split(" or ")


@pytest.mark.parametrize(
    ("line", "asked", "name"),
    [
        ("state['exp_avg_sq'] = torch.zeros_like(p)", 50304 * 576 * 4, "wte exp_avg_sq"),
        ("state['exp_avg'] = torch.zeros_like(p)", 50304 * 576 * 4, "wte exp_avg"),
        ("logits = self.lm_head(x)", 16 * 1024 * 50304 * 2, "logits"),
        ("x = self.gelu(x)", 16 * 1024 * 2304 * 2, "gelu output"),
        ("x = self.c_fc(x)", 16 * 1024 * 2304 * 2, "mlp.fc output"),
    ],
)
def test_the_last_telling_line_of_the_traceback_tells_equal_tensors_apart(line: str, asked: int, name: str) -> None:
    caller = "optimizer.step()" if "state" in line else "logits, loss = model(X, Y)"
    words = f"CUDA out of memory. Tried to allocate {driver_request(asked) / MIB:.2f} MiB."
    crash = (
        f"Traceback (most recent call last):\n    {caller}\n    {line}\n    inner()\ntorch.OutOfMemoryError: {words}"
    )
    lookup = find_culprit(read_oom(crash), estimate(SHAPE, STEP))
    assert lookup.culprit is not None, lookup.reason
    assert lookup.culprit.name == name


def test_an_optimizers_step_makes_its_states_and_no_gradient() -> None:
    words = f"CUDA out of memory. Tried to allocate {driver_request(50304 * 576 * 4) / MIB:.2f} MiB."
    crash = f"Traceback (most recent call last):\n    scaler.step(optimizer)\ntorch.OutOfMemoryError: {words}"
    lookup = find_culprit(read_oom(crash), estimate(SHAPE, STEP))
    assert lookup.culprit is not None, lookup.reason
    assert lookup.culprit.name == "wte exp_avg or wte exp_avg_sq"


def test_a_size_that_no_tensor_has_names_none() -> None:
    lookup = find_culprit(read_oom(text(line="pass", rest=figures("3.33 GiB"))), estimate(SHAPE, STEP))
    assert lookup.culprit is None
    assert "no tensor" in lookup.reason


def test_the_segment_of_small_tensors_names_none() -> None:
    lookup = find_culprit(read_oom(text(line="pass", rest=figures("20.00 MiB"))), estimate(SHAPE, STEP))
    assert lookup.culprit is None
    assert "small" in lookup.reason


def test_a_size_of_another_phase_than_the_traceback_shows_names_none() -> None:
    lookup = find_culprit(read_oom(text(frame="optimizer.step()")), estimate(SHAPE, STEP))
    assert lookup.culprit is None
    assert "phase" in lookup.reason


@pytest.mark.parametrize(
    ("tensor", "asked"),
    [(512, 2 * MIB), (1 * MIB, 2 * MIB), (1 * MIB + 512, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 512, 12 * MIB)],
)
def test_what_torch_asks_of_the_driver(tensor: int, asked: int) -> None:
    assert driver_request(tensor) == asked


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("mlp.fc output", 16 * 1024 * 4 * 576 * 2, "16 x 1024 x 2304 x 2 bytes"),
        ("attn.qkv output", 16 * 1024 * 3 * 576 * 2, "16 x 1024 x 1728 x 2 bytes"),
        ("wte gradient", 50304 * 576 * 4, "50304 x 576 x 4 bytes"),
        ("loss scalars", 7_777_777, "7,777,777 bytes"),
    ],
)
def test_a_size_is_shown_as_a_product(name: str, size: int, words: str) -> None:
    assert product(name, size, SHAPE, STEP) == words


# -------------------------------------------------------------------- prediction and repair


def test_what_the_model_does_not_explain_is_said_with_its_size() -> None:
    result = explained(text(), Available(int(10.96 * GIB), "a card"), gpu="4070")
    assert result.predicted is not None
    assert 9.1 < result.predicted.process_bytes / GIB < 9.4
    assert result.predicted.unexplained_bytes == int(10.96 * GIB) - result.predicted.process_bytes
    assert result.repair is not None
    assert result.repair.after_bytes < result.predicted.process_bytes


def test_where_the_model_explains_it_nothing_is_left_unexplained() -> None:
    result = explained(text(), Available(8_900_000_000, "given"), gpu="4070")
    assert result.predicted is not None
    assert result.predicted.unexplained_bytes is None


def test_the_repair_fits_and_keeps_the_tokens_of_a_step() -> None:
    result = explained(text(), Available(8_900_000_000, "given"), gpu="4070")
    assert result.repair is not None
    assert needed_for(estimate(SHAPE, result.repair.step, find_gpu("4070")), 0.01) <= 8_900_000_000
    assert tokens_per_step(SHAPE, result.repair.step) == 16 * 32 * 1024
    assert result.repair.step.batch_size * result.repair.step.grad_accum == 512
    assert result.repair.step.workload == "nanogpt"


def test_without_any_size_the_repair_needs_less_than_what_failed() -> None:
    result = explained(text())
    assert result.available is None
    assert result.repair is not None
    assert result.repair.after_bytes < result.repair.before_bytes


def test_fragmentation_is_met_with_the_allocators_setting() -> None:
    words = text(rest=figures(total=11.71, free=0.1, own=11.5, allocated=8.2, idle=3.0))
    result = explained(words)
    assert result.found.cause == "fragmentation"
    assert result.repair is not None
    assert result.repair.environment == EXPANDABLE
    assert result.repair.step == STEP
    assert result.repair.after_bytes < result.repair.before_bytes


def test_a_configuration_of_another_kind_of_memory_gets_advice_only() -> None:
    result = explained("MemoryError: Unable to allocate 9.00 GiB for an array with shape (9,) and data type int8")
    assert (result.lookup, result.predicted, result.repair) == (None, None, None)
    assert result.advice


def test_no_memory_failure_is_only_said() -> None:
    result = explained("KeyError: 'x'")
    assert (result.lookup, result.predicted, result.repair, result.advice) == (None, None, None, ())


# -------------------------------------------------------------------- what was available


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (figures(free=0.5, own=8.2), 0.5 + 8.2),
        (figures().replace("Including", "Process 7 has 3.00 GiB memory in use. Including"), 0.5 + 8.2),
        (" Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 11.71 GiB of which", 11.71),
    ],
)
def test_the_text_says_what_was_available(rest: str, expected: float) -> None:
    available = available_in(read_oom(text(rest=rest)))
    assert available is not None
    assert available.n_bytes == pytest.approx(expected * GIB, abs=0.01 * GIB)


def test_an_old_text_counts_a_context_beside_what_torch_had_reserved() -> None:
    words = (
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 12.00 GiB total capacity; 8.00 GiB already allocated; "
        "1.00 GiB free; 8.50 GiB reserved in total by PyTorch)"
    )
    available = available_in(read_oom(words))
    assert available is not None
    assert 9.5 * GIB < available.n_bytes < 10 * GIB


def test_a_limit_bounds_what_was_available() -> None:
    words = text(
        rest=figures(free=6.0, own=4.0, allocated=3.7, idle=0.1).replace("in use. Of", "in use. 4.00 GiB allowed; Of")
    )
    available = available_in(read_oom(words))
    assert available is not None
    assert 4 * GIB < available.n_bytes < 4.5 * GIB


def test_a_text_without_sizes_says_nothing_of_what_was_available() -> None:
    assert available_in(read_oom("RuntimeError: CUDA error: out of memory")) is None


def test_where_the_text_gives_no_cause_the_model_does_if_it_can() -> None:
    bare = explained(text(), Available(8_900_000_000, "given"))
    assert bare.found.cause == "exhausted"
    assert "by the model the step needs 9.27 GiB, of 8.29 GiB" in bare.found.reason
    roomy = explained(text(), Available(12 * GIB, "given"))
    assert roomy.found.cause == "unknown"
    nonsense = explained(text(rest=figures(asked="17179869184.00 GiB")), Available(8_900_000_000, "given"))
    assert nonsense.found.cause == "unknown"
