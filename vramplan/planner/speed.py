"""Expected speed of one optimizer step: a roofline over matrix products, attention, memory traffic and launches.

Each term is work / (what the card could do x one efficiency). The work is counted from the shape; there are three
efficiencies per kind of card (EFFICIENCY), and none per model. Numeric fields of Shape and StepConfig may be numpy
arrays that broadcast together; everything here then returns arrays.

Not modelled: dropout, attention where FlashAttention does not run, the data loader, evaluation pauses, thermal limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .gpu import Gpu
from .shape import Shape
from .step import StepConfig, tokens_per_step

Numbers = Any  # a float, or a numpy array of them


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Share of the rated figure that a training step reaches. ``source`` says how it is known.

    ``matmul`` can exceed 1: GeForce cards run above their rated boost. ``bandwidth`` can reach 1: the listed traffic
    counts every read, and a large L2 serves part of them.
    """

    matmul: float
    attention: float
    bandwidth: float
    source: str


_LARGE_MATMUL = "large bfloat16 products of github.com/zzc0721/torch-performance-test-data, measured over rated"
_ADA_RUNS = "attention and bandwidth: the RTX 4070 runs in speed_public.jsonl"
EFFICIENCY = {
    ("turing", "geforce"): Efficiency(
        0.95, 0.45, 0.90, f"{_LARGE_MATMUL}: RTX 2080 0.97; attention assumed (no flash kernel on 7.5), rest as Ampere"
    ),
    ("ampere", "geforce"): Efficiency(
        1.05, 0.70, 0.90, f"{_LARGE_MATMUL}: 3090 1.07, 3080 Ti 1.12, 3060 Laptop 0.99; attention as Ada; small L2"
    ),
    ("ada", "geforce"): Efficiency(
        1.05, 0.70, 1.00, f"{_LARGE_MATMUL}: 4070 SUPER 1.04-1.08, 4090 0.97-1.05, 4060 1.03; {_ADA_RUNS}"
    ),
    ("blackwell", "geforce"): Efficiency(
        1.08, 0.70, 1.00, f"{_LARGE_MATMUL}: 5070 1.01-1.09, 5090 1.13-1.15; attention and bandwidth as Ada"
    ),
    ("turing", "professional"): Efficiency(0.65, 0.40, 0.90, "as the T4"),
    ("ampere", "professional"): Efficiency(
        0.80, 0.55, 0.90, f"{_LARGE_MATMUL}: RTX A6000 0.80 (power limit); attention scaled with it"
    ),
    ("ada", "professional"): Efficiency(0.74, 0.50, 1.00, "as the L40S"),
    ("blackwell", "professional"): Efficiency(
        0.82, 0.50, 1.00, f"{_LARGE_MATMUL}: RTX PRO 6000 0.81-0.83; attention and bandwidth as Ada"
    ),
    ("turing", "datacenter"): Efficiency(0.65, 0.40, 0.90, f"{_LARGE_MATMUL}: T4 0.65 (70 W); attention assumed"),
    ("ampere", "datacenter"): Efficiency(
        0.68, 0.55, 0.85, f"{_LARGE_MATMUL}: A100 0.79-0.85, x 0.83 for a GPT's shapes, from the A100 run"
    ),
    ("ada", "datacenter"): Efficiency(
        0.74, 0.50, 1.00, f"{_LARGE_MATMUL}: L40S 0.74; attention scaled with it; an L4 (72 W) will be slower"
    ),
    ("hopper", "datacenter"): Efficiency(
        0.66, 0.45, 0.90, f"{_LARGE_MATMUL}: H100 and H200 0.79-0.80, x 0.83 for a GPT's shapes, from the H200 run"
    ),
    ("blackwell", "datacenter"): Efficiency(
        0.62, 0.30, 0.90, f"{_LARGE_MATMUL}: B200 0.75, x 0.83 as on Hopper; attention assumed"
    ),
}

SHARED_FLOAT32_LANES = frozenset({(8, 6), (8, 9), (12, 0)})
FLOAT32_MATMUL = 0.67
"""Plain float32 products where half of the lanes also serve integers, over rated: 3090 0.70, 4070 SUPER 0.63-0.68,
4090 0.65, 5090 0.63, 5070 0.73 (same measurements as above). Elsewhere they reach what the tensor cores reach."""

HEAD_DIM_TEMPLATES = (32, 64, 96, 128, 192, 256)
"""Head widths that FlashAttention-2 is compiled for; others run in the next larger one (its static_switch.h)."""

FORWARD_ATTENTION_FLOPS, BACKWARD_ATTENTION_FLOPS = 4, 10
"""Per score and head_dim: two products forward, five backward, one of them the recomputed scores (arXiv:2307.08691)."""

SOFTMAX_CLOCKS = 0.3
"""Clocks of an SM per score, forward and backward, outside the tensor cores: an exponential each way (16 per clock)
and about a dozen float32 operations each way (128 per clock). It is why narrow heads are slow on fast tensor cores."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that the elementwise kernels of one block move, per token and n_embd: a x residual + b x branch + casts.

    ``residual`` counts values of the residual stream, ``branch`` those of the matrix products' dtype, and ``casts``
    conversions between the two (one of each), absent where both have the same width.
    """

    residual: int
    branch: int
    casts: int

    def bytes(self, residual_width: int, branch_width: int) -> int:
        """Bytes per token and n_embd for these two element widths."""
        casts = self.casts * (residual_width + branch_width) if residual_width != branch_width else 0
        return self.residual * residual_width + self.branch * branch_width + casts


# Eager, each kernel reading its inputs and writing its output, from a trace of nanoGPT's block (torch 2.13), with
# r and b for the element widths of residual stream and branch:
#   forward   LayerNorm 2x 2r; residual add 2x 2r + b; GELU 8b; casts into the branch 2
#   backward  GELU 12b; q, k and v gradients joined 6b; residual add 2x 3r; LayerNorm 2x 3r, and 2r for its weight;
#             casts of the gradient 4
# Compiled, by what inductor's scheduler fuses in the same block (torch 2.13; read and write buffers of each kernel):
#   forward   residual add and LayerNorm 2x 2r + 2b; GELU 8b
#   backward  GELU 12b; LayerNorm and residual add 2x 3r + b; its weight 2x r + b; join 6b; casts of the gradient 2
# Under checkpointing the forward part is paid twice.
BLOCK_TRAFFIC = {False: Traffic(residual=24, branch=28, casts=6), True: Traffic(residual=12, branch=34, casts=2)}
FORWARD_TRAFFIC = {False: Traffic(residual=8, branch=10, casts=2), True: Traffic(residual=4, branch=12, casts=0)}

SELECTIVE_TRAFFIC = Traffic(residual=4, branch=8, casts=0)
"""What selective checkpointing repeats: two norms and the activation function."""

LOSS_TRAFFIC = {
    # Bytes per token and vocabulary entry as (half precision, float32), beside the head's own products.
    # log_softmax 2+2, float32 copy 2+4; gradient of the pick 4, copy back 4+2, log_softmax backward 2+2+2
    "nanogpt": (26, 24),
    # float32 copy 2+4, log_softmax 4+4; gradient of the pick 4, log_softmax backward 4+4+4, copy back 4+2
    "autocast": (36, 24),
    "vramplan": (36, 24),
    # log_softmax 2+2; gradient of the pick 2, log_softmax backward 2+2+2
    "plain": (12, 24),
    # float32 copy 2+4, maximum 4, subtract 8, exponential 8, sum 4, divide 8, copy back 4+2
    "chunked": (44, 32),
    # maximum, sum of exponentials, and one read and one write for the gradient
    "compiled": (8, 16),
}

WEIGHT_CAST_BYTES = 12
"""Per matmul parameter and micro-step: float32 to half before the forward, and the gradient back (2+4 each)."""
ACCUMULATE_BYTES = 12
"""Per parameter and micro-step after the first: read both gradients, write one, in float32."""
EMBEDDING_BYTES = 16
"""Per token-embedding weight and micro-step: a dense float32 gradient is zeroed (4) and added to the head's (12)."""
CLIP_BYTES = 12
"""Per parameter and step: read for the norm (4), read and write to scale (8)."""
OPTIMIZER_BYTES = {
    # per parameter and step
    "adamw-fused": 28,  # read p, g, m, v; write p, m, v
    "adamw-foreach": 80,  # decay 8, lerp 12, mul 8, addcmul 12, sqrt 8, divide 8, add 8, addcdiv 16
    "adamw8bit": 16,  # as fused with one-byte moments
    "adamw-in-backward": 28,
    "adamw-stochastic": 150,  # as foreach, each value widened before and rounded with noise after
    "muon": 90,  # as foreach for the momentum; its products are counted apart
    "adamw-offload": 0,  # on the host, which is counted apart like the way there
}

HOST_LINK_BYTES_PER_SECOND = 20e9
HOST_MEMORY_BYTES_PER_SECOND = 25e9
"""PCIe 4.0 x16 with pinned memory, and a desktop's two channels: usual figures, measured by no run we have."""

LAUNCHES_PER_BLOCK = {False: 46, True: 40}
LAUNCHES_OUTSIDE = 30
LAUNCH_SECONDS = {False: 8e-6, True: 5e-6}
"""Host time per kernel, eager and compiled: usual on desktop CPUs, constrained by no run we have. The counts are from
the traces above, one micro-step forward and backward, products and weight casts included."""
MICRO_STEP_HOST_SECONDS = 0.5e-3
"""Python around one micro-step: the batch, autocast, the call into autograd. It overlaps with the GPU's work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step over all micro-steps. ``step_seconds`` is the sum of the others.

    ``overhead_seconds`` is only the part of the launches during which the GPU would wait.
    """

    matmul_seconds: Numbers
    attention_seconds: Numbers
    memory_seconds: Numbers
    optimizer_seconds: Numbers
    overhead_seconds: Numbers

    @property
    def step_seconds(self) -> Numbers:
        """The whole step."""
        busy = self.matmul_seconds + self.attention_seconds + self.memory_seconds + self.optimizer_seconds
        return busy + self.overhead_seconds


def efficiency(gpu: Gpu) -> Efficiency:
    """The three efficiencies of this kind of card, with their source."""
    return EFFICIENCY[(gpu.architecture, gpu.market)]


def matmul_dtype(step: StepConfig, gpu: Gpu) -> str:
    """What the products run in: the step's dtype, but nanoGPT allows TF32 for its float32 (train.py, allow_tf32)."""
    tf32 = step.workload == "nanogpt" and step.dtype == "float32" and gpu.supports_bf16
    return "tf32" if tf32 else "bfloat16" if step.dtype == "pure-bfloat16" else step.dtype


def step_time(shape: Shape, step: StepConfig, gpu: Gpu) -> StepTime:
    """Predict the seconds of one optimizer step.

    Raises ConfigError when the card has no such dtype (bfloat16 on Turing).
    """
    reached = efficiency(gpu)
    dtype = matmul_dtype(step, gpu)
    peak = gpu.peak_flops(dtype)
    bandwidth = gpu.bandwidth_bytes_per_second * reached.bandwidth
    tokens = tokens_per_step(shape, step)
    slow_lanes = dtype == "float32" and gpu.capability in SHARED_FLOAT32_LANES
    products = peak * (FLOAT32_MATMUL if slow_lanes else reached.matmul)
    matmul = tokens * _matmul_flops_per_token(shape, step) / products
    attention = tokens * _attention_seconds_per_token(shape, step, gpu, peak) / reached.attention
    memory = (tokens * _bytes_per_token(shape, step) + _weight_bytes(shape, step)) / bandwidth
    optimizer = shape.parameters * (OPTIMIZER_BYTES[step.optimizer] + CLIP_BYTES) / bandwidth
    if step.optimizer == "muon":
        optimizer = optimizer + _newton_schulz_flops(shape) / products
    if step.optimizer == "adamw-offload":
        there_and_back = 4 if step.pure else 8  # gradients and weights as they are on the device
        optimizer = optimizer + there_and_back * shape.parameters / HOST_LINK_BYTES_PER_SECOND
        optimizer = optimizer + OPTIMIZER_BYTES["adamw-fused"] * shape.parameters / HOST_MEMORY_BYTES_PER_SECOND
    launches = shape.n_layer * LAUNCHES_PER_BLOCK[step.compile] + LAUNCHES_OUTSIDE
    host = step.grad_accum * (launches * LAUNCH_SECONDS[step.compile] + MICRO_STEP_HOST_SECONDS)
    waiting = np.maximum(host - (matmul + attention + memory), 0.0)
    return StepTime(
        matmul_seconds=matmul,
        attention_seconds=attention,
        memory_seconds=memory,
        optimizer_seconds=optimizer,
        overhead_seconds=waiting,
    )


def _matmul_flops_per_token(shape: Shape, step: StepConfig) -> Numbers:
    """6 per matmul parameter (Kaplan et al. 2020); block checkpointing repeats the blocks' forward, 2 each.

    The chunked loss forms the head's gradients in its forward: no product runs twice.
    """
    flops = 6 * shape.matmul_parameters
    if step.checkpointing == "block":
        flops = flops + 2 * (shape.matmul_parameters - shape.vocab_size * shape.n_embd)
    return flops


def flops_per_token(shape: Shape, step: StepConfig) -> Numbers:
    """FLOPs that a token costs in a training step: products, causal attention, and what checkpointing repeats."""
    passes = FORWARD_ATTENTION_FLOPS * (2 if step.checkpointing == "block" else 1) + BACKWARD_ATTENTION_FLOPS
    return _matmul_flops_per_token(shape, step) + passes * shape.n_layer * shape.n_embd * shape.block_size // 2


def _attention_seconds_per_token(shape: Shape, step: StepConfig, gpu: Gpu, peak: float) -> Numbers:
    """Seconds at peak rate: causal scores (half of T per token and head), on tensor cores and in the softmax."""
    templates = np.asarray(HEAD_DIM_TEMPLATES)
    head_dim = np.asarray(shape.head_dim)
    index = np.minimum(np.searchsorted(templates, head_dim), len(templates) - 1)
    width = np.maximum(templates[index], head_dim)
    passes = FORWARD_ATTENTION_FLOPS + BACKWARD_ATTENTION_FLOPS
    softmax = SOFTMAX_CLOCKS
    if step.checkpointing == "block":
        passes += FORWARD_ATTENTION_FLOPS
        softmax *= 1.5
    per_score = passes * width / peak + softmax / (gpu.sms * gpu.boost_mhz * 1e6)
    return shape.n_layer * shape.n_head * (shape.block_size / 2) * per_score


def _bytes_per_token(shape: Shape, step: StepConfig) -> Numbers:
    """Elementwise traffic of the blocks and of the loss, per token."""
    branch = 2 if step.half else 4
    residual = branch if step.workload in ("vramplan", "plain") and not step.wide_residual else 4
    per_width = BLOCK_TRAFFIC[step.compile].bytes(residual, branch) + branch * _variant_traffic(shape, step)
    if step.checkpointing != "none":
        again = FORWARD_TRAFFIC[step.compile] if step.checkpointing == "block" else SELECTIVE_TRAFFIC
        per_width = per_width + again.bytes(residual, branch)
    loss = LOSS_TRAFFIC[_loss_kind(step)][0 if step.half else 1] * shape.vocab_size
    if step.loss == "chunked":
        # every slice adds its part to the head's float32 gradient: half-precision product out and in, sum in and out
        loss = loss + (12 if step.half else 8) * shape.vocab_size * shape.n_embd / step.loss_chunk_tokens
    return per_width * shape.n_embd * shape.n_layer + loss


def _newton_schulz_flops(shape: Shape) -> Numbers:
    """Five iterations, each of two products with the long side and one of the short side, for every block matrix."""
    h = shape.n_embd
    sides = ((shape.qkv_width, h), (h, h), (shape.fc_width, h), (h, shape.mlp_width))
    one = sum(4 * np.minimum(a, b) ** 2 * np.maximum(a, b) + 2 * np.minimum(a, b) ** 3 for a, b in sides)
    return 5 * shape.n_layer * one


def _variant_traffic(shape: Shape, step: StepConfig) -> Numbers:
    """Values per token and n_embd that the elementwise kernels of the options move beyond GPT-2's.

    Counted from the kernels of ``trainer.pointwise`` (eager: each reads its inputs and writes its output; compiled: one
    kernel each way); no run confirms it. GELU moves 8 forward and 12 back.
    """
    inner, qk = shape.mlp_width / shape.n_embd, 1 + shape.kv_width / shape.n_embd
    values = {"gelu": 20.0, "relu2": 20.0 if step.compile else 44.0, "swiglu": (8 if step.compile else 16) * inner}
    more = values[shape.mlp] - values["gelu"]
    if shape.positions == "rotary":
        more = more + (4 if step.compile else 10) * qk
    if shape.qk_norm:
        more = more + (5 if step.compile else 9) * qk
    return more + 4 * (qk - 2)  # fewer keys and values are joined, and so are their gradients


def _loss_kind(step: StepConfig) -> str:
    if step.compile:
        return "compiled"  # the slices' arithmetic too is one fused kernel
    return "chunked" if step.loss == "chunked" else step.workload


def _weight_bytes(shape: Shape, step: StepConfig) -> Numbers:
    """Traffic over the weights and their gradients in one step, without the optimizer's."""
    casts = WEIGHT_CAST_BYTES * shape.matmul_parameters if step.half and not step.pure else 0
    per_micro_step = casts + EMBEDDING_BYTES * shape.vocab_size * shape.n_embd
    return per_micro_step * step.grad_accum + ACCUMULATE_BYTES * shape.matmul_parameters * (step.grad_accum - 1)


def tokens_per_second(shape: Shape, step: StepConfig, gpu: Gpu) -> Numbers:
    """Predicted tokens per second: batch_size x grad_accum x block_size over the step's seconds."""
    return tokens_per_step(shape, step) / step_time(shape, step, gpu).step_seconds


def mfu(shape: Shape, tokens_per_second: Numbers, gpu: Gpu, dtype: str) -> Numbers:
    """Model FLOPs utilisation, a fraction: flops_per_token x tokens/s over this card's peak in ``dtype``.

    Not halved for causality, recomputation not counted (PaLM, appendix B). nanoGPT prints the same over 312 TFLOPS.
    """
    return shape.flops_per_token * tokens_per_second / gpu.peak_flops(dtype)


def seconds_to_tokens(n_tokens: Numbers, tokens_per_second: Numbers) -> Numbers:
    """Seconds of pure training until ``n_tokens`` have been seen; evaluations and checkpoints come on top."""
    return n_tokens / tokens_per_second
