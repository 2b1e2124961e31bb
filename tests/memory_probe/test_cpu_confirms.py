"""Real optimizer steps on this machine's CPU have the size, the composition and the place that the table says."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch

from vramplan.errors import ConfigError
from vramplan.memory_probe import cpu_events
from vramplan.memory_probe.cpu import StepMeasurement, measure_cpu_step
from vramplan.planner.memory import Estimate, estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import DType, Optimizer, StepConfig
from vramplan.runconfig import RunConfig
from vramplan.trainer.model import GPT
from vramplan.trainer.optimizer import build_optimizer
from vramplan.trainer.step import TrainStep

PEAK_TOLERANCE = 0.005
NET_TOLERANCE = 0.01
CATEGORY_SHARE = 0.20

SHAPES = {
    "wide vocabulary": Shape(n_layer=2, n_head=4, n_embd=96, vocab_size=3000, block_size=64),
    "deep": Shape(n_layer=6, n_head=2, n_embd=48, vocab_size=384, block_size=64),
    "one layer": Shape(n_layer=1, n_head=4, n_embd=96, vocab_size=67, block_size=128),
    "all embedding": Shape(n_layer=1, n_head=2, n_embd=48, vocab_size=8000, block_size=16),
    "all blocks": Shape(n_layer=3, n_head=4, n_embd=192, vocab_size=256, block_size=16),
    "half": Shape(n_layer=3, n_head=2, n_embd=32, vocab_size=256, block_size=64),  # slow: no units for it on a CPU
    "odd": Shape(n_layer=2, n_head=3, n_embd=60, vocab_size=501, block_size=47),
}
MODERN: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 2, "qk_norm": True, "logit_softcap": 15.0,
}  # fmt: skip
SHAPES |= {
    "modern": replace(SHAPES["wide vocabulary"], **MODERN),
    "modern, deep": replace(SHAPES["deep"], **MODERN),
    "modern, half": replace(SHAPES["half"], **MODERN | {"n_kv_head": 1}),
    "squared ReLU": replace(SHAPES["all blocks"], mlp="relu2", qk_norm=True),
    "one key": replace(SHAPES["deep"], n_kv_head=1),
}
STEP = StepConfig(batch_size=4, dtype="float32", loss="full", device="cpu")


def case(shape: str, batch_size: int, *, bias: bool = False, tied: bool = True, **step: Any) -> Any:
    config = (
        replace(SHAPES[shape], bias=bias, tied=tied),
        replace(STEP, batch_size=batch_size, **step),
    )
    words = [shape, f"batch {batch_size}", *(["bias"] if bias else []), *([] if tied else ["untied"])]
    return pytest.param(config, id=", ".join([*words, *(f"{k}={v}" for k, v in step.items())]))


def chunked(tokens: int) -> dict[str, Any]:
    return {"loss": "chunked", "loss_chunk_tokens": tokens}


BLOCK: dict[str, Any] = {"checkpointing": "block"}
SELECTIVE: dict[str, Any] = {"checkpointing": "selective"}
FOREACH: dict[str, Any] = {"optimizer": "adamw-foreach"}
EIGHT_BIT: dict[str, Any] = {"optimizer": "adamw8bit"}
BF16: dict[str, Any] = {"dtype": "bfloat16"}
FP16: dict[str, Any] = {"dtype": "float16"}
WIDE: dict[str, Any] = {"residual": "float32"}

CASES = [
    case("wide vocabulary", 4),
    case("wide vocabulary", 4, grad_accum=3, tied=False),
    case("wide vocabulary", 8, bias=True, **FOREACH),
    case("wide vocabulary", 4, grad_accum=3, bias=True, **EIGHT_BIT),
    case("wide vocabulary", 8, **chunked(256)),
    case("wide vocabulary", 8, grad_accum=3, tied=False, **chunked(100)),
    case("wide vocabulary", 4, **chunked(128), **BLOCK),
    case("wide vocabulary", 4, tied=False, bias=True, **chunked(512), **BLOCK, **FOREACH),
    case("deep", 8),
    case("deep", 8, bias=True, tied=False, grad_accum=3, **FOREACH),
    case("deep", 8, **chunked(200)),
    case("deep", 16, **BLOCK),
    case("deep", 16, bias=True, grad_accum=3, **chunked(1024), **BLOCK),
    case("deep", 4, **chunked(64), **EIGHT_BIT),
    case("one layer", 8),
    case("one layer", 16, bias=True, **BLOCK),
    case("one layer", 8, grad_accum=3, tied=False, **chunked(300), **BLOCK),
    case("all embedding", 4, **chunked(16), **BLOCK),
    case("all embedding", 4, bias=True, grad_accum=3, **chunked(16)),
    case("all embedding", 4, **chunked(16), **EIGHT_BIT),
    case("all embedding", 4, tied=False, **chunked(16), **FOREACH),
    case("all blocks", 4, **FOREACH),
    case("all blocks", 4, grad_accum=3, bias=True, **chunked(64), **FOREACH),
    case("all blocks", 4, **EIGHT_BIT),
    case("all blocks", 4, grad_accum=3, **BLOCK, **EIGHT_BIT),
    case("odd", 5, bias=True),
    case("odd", 5, tied=False, grad_accum=3, **chunked(97), **BLOCK),
    case("odd", 1, bias=True, **EIGHT_BIT),
    case("half", 4, **BF16),
    case("half", 4, **FP16),
    case("half", 4, bias=True, tied=False, grad_accum=3, **BF16),
    case("half", 4, bias=True, grad_accum=3, **FP16, **FOREACH),
    case("half", 4, **chunked(100), **BF16),
    case("half", 4, tied=False, bias=True, **chunked(64), **FP16),
    case("half", 4, **BLOCK, **BF16),
    case("half", 4, bias=True, grad_accum=3, **chunked(64), **BLOCK, **BF16),
    case("half", 4, tied=False, **BLOCK, **FP16, **EIGHT_BIT),
    case("half", 1, **chunked(32), **BLOCK, **BF16, **EIGHT_BIT),
    case("half", 1, grad_accum=3, **FP16, **chunked(32), **BLOCK, **FOREACH),
    case("wide vocabulary", 1),
    case("wide vocabulary", 2, bias=True, tied=False),
    case("wide vocabulary", 16, **chunked(1024)),
    case("wide vocabulary", 8, grad_accum=3, **BLOCK, **FOREACH),
    case("wide vocabulary", 4, **chunked(64), **EIGHT_BIT),
    case("deep", 1, grad_accum=3),
    case("deep", 16, tied=False, **FOREACH),
    case("deep", 8, bias=True, **chunked(256), **BLOCK),
    case("deep", 2, grad_accum=3, **chunked(32), **EIGHT_BIT),
    case("deep", 8, tied=False, **BLOCK, **EIGHT_BIT),
    case("one layer", 32),
    case("one layer", 4, bias=True, grad_accum=3, **FOREACH),
    case("one layer", 16, tied=False, **chunked(512)),
    case("one layer", 2, **BLOCK, **EIGHT_BIT),
    case("all embedding", 8),
    case("all embedding", 2, grad_accum=3, tied=False, **chunked(8), **BLOCK),
    case("all embedding", 16, bias=True, **chunked(64), **FOREACH),
    case("all blocks", 16),
    case("all blocks", 8, bias=True, tied=False, **BLOCK),
    case("all blocks", 2, grad_accum=3, **chunked(16), **BLOCK, **FOREACH),
    case("all blocks", 8, **chunked(128), **EIGHT_BIT),
    case("odd", 3, **chunked(47)),
    case("odd", 7, bias=True, tied=False, grad_accum=3, **FOREACH),
    case("odd", 9, **BLOCK),
    case("modern", 8),
    case("modern", 4, grad_accum=3, tied=False, **chunked(100)),
    case("modern", 8, bias=True, **chunked(256), **BLOCK),
    case("modern, deep", 8),
    case("modern, deep", 16, grad_accum=3, bias=True, **BLOCK),
    case("modern, half", 4, **BF16),
    case("modern, half", 4, tied=False, grad_accum=3, **chunked(64), **BLOCK, **FP16),
    case("squared ReLU", 4),
    case("squared ReLU", 4, grad_accum=3, bias=True, **BLOCK),
    case("one key", 8, bias=True),
    case("one key", 8, tied=False, **chunked(64), **BLOCK),
    case("deep", 16, **SELECTIVE),
    case("deep", 2, optimizer="adamw-in-backward"),
    case("all blocks", 2, tied=False, **chunked(64), optimizer="adamw-in-backward"),
    case("all blocks", 1, optimizer="muon"),
    case("deep", 4, bias=True, grad_accum=3, optimizer="muon"),
    case("half", 4, **chunked(64), dtype="pure-bfloat16", optimizer="adamw-stochastic"),
    case("half", 1, tied=False, grad_accum=3, dtype="pure-bfloat16", optimizer="adamw-stochastic"),
    case("wide vocabulary", 4, dtype="tf32"),
    case("deep", 8, bias=True, grad_accum=3, **chunked(256), **SELECTIVE),
    case("all blocks", 8, tied=False, **SELECTIVE, **FOREACH),
    case("half", 4, bias=True, **BF16, **SELECTIVE),
    case("modern, half", 4, grad_accum=3, **FP16, **SELECTIVE),
    case("modern, deep", 8, **chunked(100), **SELECTIVE, **EIGHT_BIT),
    case("half", 4, **BF16, **WIDE),
    case("half", 4, bias=True, tied=False, grad_accum=3, **chunked(64), **FP16, **WIDE),
    case("half", 4, **BLOCK, **BF16, **WIDE),
    case("half", 4, bias=True, **SELECTIVE, **BF16, **WIDE),
    case("modern, half", 4, **BF16, **WIDE),
    case("modern, half", 4, grad_accum=3, **chunked(64), **SELECTIVE, **FP16, **WIDE),
]
CONFIGS: list[tuple[Shape, StepConfig]] = [case.values[0] for case in CASES]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small products gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def measured(config: tuple[Shape, StepConfig]) -> StepMeasurement:
    return measure_cpu_step(config, steps=2)


@cache
def estimated(config: tuple[Shape, StepConfig]) -> Estimate:
    return estimate(*config)


def persistent(e: Estimate) -> int:
    """Weights, optimizer states, and the gradients that accumulation keeps."""
    return e.persistent_bytes


@pytest.mark.parametrize("config", CASES)
def test_the_estimate_is_what_a_real_step_needs(config: tuple[Shape, StepConfig]) -> None:
    real, e = measured(config), estimated(config)
    assert e.peak_allocated_bytes == pytest.approx(real.peak_bytes, rel=PEAK_TOLERANCE)
    net, real_net = e.peak_allocated_bytes - persistent(e), real.peak_bytes - real.persistent_bytes
    assert net == pytest.approx(real_net, rel=NET_TOLERANCE)
    assert persistent(e) == real.persistent_bytes
    assert (e.peak_phase, real.peak_operation != "") == (real.peak_phase, True)


@pytest.mark.parametrize("config", CASES)
def test_every_phase_is_estimated_not_only_the_highest(config: tuple[Shape, StepConfig]) -> None:
    real, e = measured(config), estimated(config)
    assert set(real.phase_peaks) == set(e.phase_peaks) - {"persistent"}
    for phase, peak in real.phase_peaks.items():
        assert e.phase_peaks[phase] == pytest.approx(peak, rel=PEAK_TOLERANCE), phase
    net, real_net = (peaks["evaluation"] - real.persistent_bytes for peaks in (e.phase_peaks, real.phase_peaks))
    assert net == pytest.approx(real_net, rel=NET_TOLERANCE)


def test_the_cases_cover_every_setting() -> None:
    assert len(CONFIGS) == len(set(CONFIGS)) >= 60
    for field, values in {
        "dtype": set(get_args(DType)),
        "loss": {"full", "chunked"},
        "checkpointing": {"none", "selective", "block"},
        "grad_accum": {1, 3},
        "optimizer": set(get_args(Optimizer)) - {"adamw-offload"},
    }.items():
        assert {getattr(step, field) for _, step in CONFIGS} == values
    assert {(shape.bias, shape.tied) for shape, _ in CONFIGS} == {(b, t) for b in (True, False) for t in (True, False)}


def test_every_category_is_a_large_part_of_some_confirmed_peak() -> None:
    """A tensor that is missing from the table would show: it is never a rounding error everywhere."""
    largest: dict[str, float] = {}
    for config in CONFIGS:
        e = estimated(config)
        for category, size in e.breakdown.items():
            largest[category] = max(largest.get(category, 0.0), size / e.peak_allocated_bytes)
    for category in ("weights", "gradients", "optimizer", "activations", "logits_and_loss", "temporaries"):
        assert largest[category] >= CATEGORY_SHARE, category


def test_different_phases_win() -> None:
    winners = Counter(measured(config).peak_phase for config in CONFIGS)
    assert {"loss forward", "loss backward", "block backward", "embedding backward", "optimizer step"} <= set(winners)


def test_the_peaks_are_not_all_optimizer_state() -> None:
    shares = [1 - persistent(estimated(c)) / estimated(c).peak_allocated_bytes for c in CONFIGS]
    assert sorted(shares)[len(shares) // 2] > 0.5


# ------------------------------------------------------------------- other witnesses


class Steps:
    """The same optimizer steps that the meter watches, for a witness that watches in another way."""

    def __init__(self, shape: Shape, step: StepConfig) -> None:
        self.shape, self.step = shape, step
        self.model = GPT(shape, step)
        self.optimizer = build_optimizer(self.model, step, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        self._train = TrainStep(self.model, self.optimizer, step, grad_clip=1.0, device=torch.device("cpu"))
        self._train.allocate()

    def run(self) -> None:
        self._train(self._batches(), 1e-3)

    def evaluate(self) -> None:
        self._train.evaluate(self._batches())

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = (self.step.batch_size, self.shape.block_size)
        for _ in range(self.step.grad_accum):
            yield torch.randint(0, self.shape.vocab_size, size), torch.randint(0, self.shape.vocab_size, size)


def allocator_peak(shape: Shape, step: StepConfig, *, evaluation: bool = False) -> int:
    """Most bytes that the CPU allocator itself had handed out during the second step, kernels' scratch included.

    Or, instead of that step, during the second of two evaluations that follow the first.
    """

    def begin() -> Callable[[], None]:
        steps = Steps(shape, step)
        steps.run()
        if evaluation:
            steps.evaluate()  # compiles
        return steps.evaluate if evaluation else steps.run

    return cpu_events.allocator_peak(begin)


@pytest.mark.parametrize(
    "config",
    [
        case("wide vocabulary", 4),
        case("wide vocabulary", 4, grad_accum=3, tied=False, **chunked(128)),
        case("deep", 8, **BLOCK),
        case("all embedding", 4, bias=True, grad_accum=3, **chunked(16)),
        case("all embedding", 4, **chunked(16), **BLOCK),
        case("all blocks", 4, **FOREACH),
    ],
)
def test_the_allocator_itself_agrees_with_the_meter(config: tuple[Shape, StepConfig]) -> None:
    assert measured(config).peak_bytes == pytest.approx(allocator_peak(*config), rel=0.01)


@pytest.mark.parametrize("config", [case("wide vocabulary", 4), case("deep", 8, bias=True, tied=False)])
def test_torchs_own_tracker_agrees(config: tuple[Shape, StepConfig]) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    with tracker:
        steps = Steps(*config)
        tracker.track_external(steps.model, steps.optimizer)
        steps.run()
        tracker.reset_mod_stats()
        steps.run()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert estimated(config).peak_allocated_bytes == pytest.approx(peak, rel=0.01)


# ------------------------------------------------------------------- the function's own rules


def test_a_run_configuration_can_be_measured_as_it_is() -> None:
    shape, step = SHAPES["half"], replace(STEP, batch_size=1)
    assert measure_cpu_step(RunConfig.build(shape, step), steps=2) == measure_cpu_step((shape, step), steps=2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"device": "cuda"}, "device"),
        ({"compile": True}, "compile"),
        ({"workload": "nanogpt"}, "workload"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_a_cpu_step_cannot_confirm_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        measure_cpu_step((SHAPES["half"], replace(STEP, **change)))


def test_one_step_is_not_enough() -> None:
    with pytest.raises(ConfigError, match="steps=1 must be at least 2"):
        measure_cpu_step((SHAPES["half"], STEP), steps=1)


COMPILED = [
    pytest.param({"grad_accum": 2, "loss": "full"}, id="full loss, accumulating"),
    pytest.param({"loss": "chunked", "loss_chunk_tokens": 256}, id="chunked loss"),
    pytest.param({"loss": "full", "checkpointing": "selective"}, id="selective checkpointing"),
    pytest.param({"loss": "full", "checkpointing": "block"}, id="checkpointing"),
    pytest.param({"loss": "full"}, id="full loss"),
]
needs_a_compiler = pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("clang") is None, reason="inductor needs a C++ compiler"
)


@needs_a_compiler
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        *(pytest.param({}, *p.values, id=p.id) for p in COMPILED),
        pytest.param({"logit_softcap": 15.0}, {"loss": "full"}, id="capped logits"),
        pytest.param(
            {"norm": "rmsnorm", "positions": "rotary", "qk_norm": True, "n_kv_head": 2}, {"loss": "full"}, id="modern"
        ),
        pytest.param({"mlp": "swiglu"}, {"loss": "full"}, id="gated MLP"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_compiled_step_needs_what_the_compiled_table_says(options: dict[str, Any], settings: dict[str, Any]) -> None:
    n_layer = 2 + (settings == {"loss": "full"})  # each layer takes the compiler seconds
    shape = replace(Shape(n_layer=n_layer, n_head=4, n_embd=128, vocab_size=2048, block_size=128), **options)
    step = replace(STEP, batch_size=8, compile=True, **settings)
    torch._dynamo.reset()
    assert estimate(shape, step).peak_allocated_bytes == pytest.approx(allocator_peak(shape, step), rel=0.02)


@needs_a_compiler
@pytest.mark.parametrize("settings", [{"loss": "full"}, {"loss": "chunked", "loss_chunk_tokens": 1024}])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_evaluation_needs_what_the_compiled_table_says(settings: dict[str, Any]) -> None:
    shape = Shape(n_layer=2, n_head=4, n_embd=128, vocab_size=2048, block_size=128)
    step = replace(STEP, batch_size=8, compile=True, **settings)
    torch._dynamo.reset()
    real = allocator_peak(shape, step, evaluation=True)
    assert estimate(shape, step).phase_peaks["evaluation"] == pytest.approx(real, rel=0.02)
