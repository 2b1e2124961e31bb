"""Which kernel ``scaled_dot_product_attention`` runs on a CUDA device, and what that kernel takes for itself.

Read from torch's sources: ``sdp_utils.cpp`` says which kernel takes which heads, ``attention_backward.cu`` and
``mem_eff_attention/kernel_backward.h`` what the memory-efficient one works in. cuDNN's attention, which torch prefers
on data-centre cards of Hopper and Blackwell, has no rows; our trainer does not use it.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from .shape import Ints, Shape
from .step import StepConfig

Kernel = Literal["flash", "padded flash", "efficient", "math"]
"""FlashAttention, as it is and behind copies in which heads are padded to a multiple of 8; memory-efficient attention;
and torch's composite of products and a softmax, which holds the scores. On a CPU, whose fused kernel takes every head,
"flash" stands for that one."""

KERNELS: tuple[Kernel, ...] = get_args(Kernel)

Capability = tuple[int, int]

MAX_FLASH_HEAD_DIM = 256
"""FlashAttention takes no wider heads."""

NARROW_FLASH = (((8, 6), (8, 9)), ((12, 0), (12, 1)))
LEAST_NARROW, MOST_NARROW = 192, 224
"""From and to which architectures FlashAttention has no backward for heads between these widths, nor with dropout for
wider ones."""

TILE = 64
"""Rows and columns of a tile in the memory-efficient backward. Wider tiles, which cards with more shared memory take
for wide heads, only round the sequence up further."""

REGISTERS = 128
"""Up to this width the memory-efficient kernels for half precision accumulate in registers."""

KEY_SPLITS = 200
"""Blocks over which that backward spreads the keys, where it accumulates in memory."""


def takes_flash(width: Ints, half: bool, capability: Capability, dropout: float = 0.0) -> Ints:
    """Whether FlashAttention trains heads of ``width``; vectorised."""
    if not half or capability < (8, 0):
        return np.zeros(np.shape(width), dtype=np.bool_)
    taken = np.asarray(width) <= MAX_FLASH_HEAD_DIM
    if any(first <= capability <= last for first, last in NARROW_FLASH):
        taken &= (np.asarray(width) <= LEAST_NARROW) | ((np.asarray(width) > MOST_NARROW) & (dropout == 0))
    return taken


def prefers_cudnn(half: bool, capability: Capability) -> bool:
    """Whether torch asks cuDNN before FlashAttention on this architecture (``check_prefer_cudnn_attention``)."""
    return half and capability[0] in (9, 10)


def kernel_numbers(shape: Shape, step: StepConfig, capability: Capability) -> Ints:
    """Which of KERNELS each candidate's attention runs; vectorised over ``shape``.

    Where it is not FlashAttention, every query head has its own keys: the other kernels take no groups.
    """
    width = np.asarray(shape.head_dim)
    if step.device == "cpu":
        return np.zeros(width.shape, dtype=np.int64)
    # 16 bytes, which tensor cores take at once; before Ampere those do not multiply float32, nor anything bfloat16
    modern = capability >= (8, 0)
    aligned = width % (8 if step.half else 4 if modern else 1) == 0
    known = modern or step.dtype not in ("bfloat16", "pure-bfloat16")
    fused = np.where(aligned & known, KERNELS.index("efficient"), KERNELS.index("math"))
    flash = np.where(width % 8 == 0, KERNELS.index("flash"), KERNELS.index("padded flash"))
    return np.where(takes_flash(width, step.half, capability, step.dropout), flash, fused)


def efficient_workspace(heads: Ints, width: Ints, tokens: Ints, half: bool) -> Ints:
    """Bytes in which the memory-efficient backward of ``heads`` (of all sequences) accumulates; vectorised.

    The gradient of q in whole tiles, each with a lock and a counter; of k and v where registers do not hold them.
    """
    tiles = -(-tokens // TILE) * -(-width // TILE)
    elements = tiles * (TILE * TILE + 4)
    if half:
        splits = np.clip(KEY_SPLITS // heads, 1, -(-tokens // TILE))
        gathered = 2 * splits * TILE * (-(-width // TILE) * TILE)
        elements = elements + np.where(np.asarray(width) > REGISTERS, gathered, 0)
    return 4 * heads * elements
