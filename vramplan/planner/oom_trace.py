"""What a traceback says about the moment of a failure: the phase of the step, and the buffer that was being made."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Moment = Literal["forward", "loss", "backward", "optimizer", "evaluation", "sampling", "loading"]

LONGEST_TRACE = 60_000
"""Characters before the error in which its traceback begins."""

WITHOUT_HEAD = 12_000
"""Characters that are taken for the traceback where its first line is missing."""

_HEAD = "Traceback (most recent call last)"
_DURING = ("During handling of the above exception", "The above exception was the direct cause")

_MOMENTS: tuple[tuple[Moment, re.Pattern[str]], ...] = (
    ("optimizer", re.compile(
        r"torch[\\/]optim[\\/]|\b(?:optimizer|opt|optim)\d?\.step\(|scaler\.step\(|_multi_tensor_adam|_init_group"
        r"|bitsandbytes[\\/]optim", re.IGNORECASE)),
    ("sampling", re.compile(r"\.generate\(|\bin generate\b")),
    ("backward", re.compile(
        r"\.backward\(|torch[\\/]autograd[\\/]|_engine_run_backward|CompiledFunctionBackward|run_backward")),
    ("evaluation", re.compile(r"estimate_loss\(|\bin (?:evaluate|validate|estimate_loss|evaluation_loop)\b|"
                              r"eval_step|validation_step")),
    ("loading", re.compile(
        r"\bmodel(?:\.module)?\.(?:to|cuda|half)\(|load_state_dict|torch\.load\(|from_pretrained|in _apply\b|"
        r"\bin convert\b|safetensors")),
)  # fmt: skip
"""The first that is found in the traceback, the more telling ones first."""
_LOSS = re.compile(r"cross_entropy|nll_loss|log_softmax|in compute_loss|loss_fn\(|criterion\(")
_FORWARD = re.compile(r"\bin forward\b|_call_impl|_wrapped_call_impl|\bmodel\(|CompiledFunction\b|aot_autograd")

_BUFFER = re.compile(
    r"(?:(\w{1,40})\s*=\s*)?empty_strided(?:_(?:cuda|cpu|hip|xpu))?\(\s*\(([\d,\s]{0,120})\)\s*,\s*\([\d,\s]{0,160}\)\s*,"
    r"([^\n]{0,120})"
)
MADE_BY = {
    "exp_avg_sq": ("exp_avg_sq",),
    "exp_avg": ("exp_avg",),
    "lm_head": ("logits", "head.weight copy"),
    "cross_entropy": ("log-prob",),
    "c_fc": ("mlp.fc",),
    "gelu": ("gelu",),
    "c_attn": ("qkv",),
    "c_proj": (".proj",),
}
"""Names in nanoGPT-like code and in torch's optimizers that tell which tensor a line makes, the longer of two first,
with words of the table's names for it; the last of them in a traceback tells tensors of one size apart."""

_OPERATION = re.compile(r"(?<![A-Za-z])(?:" + "|".join(MADE_BY) + r")(?![a-z]|_\w)")
_DTYPE = re.compile(r"torch\.(\w+)")


@dataclass(frozen=True, slots=True)
class Trace:
    """The phase a traceback shows, the buffer its last line of generated code was making, and the last of the telling
    names of MADE_BY in it (None: not shown)."""

    moment: Moment | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    buffer: str | None = None
    operation: str | None = None


def trace_before(text: str, at: int) -> Trace:
    """Read the traceback that ends at the error ``at``."""
    start = text.rfind(_HEAD, max(0, at - LONGEST_TRACE), at)
    block = text[start:at] if start >= 0 else text[max(0, at - WITHOUT_HEAD) : at]
    for words in _DURING:
        block = block.rpartition(words)[2]
    shape = dtype = buffer = None
    for found in _BUFFER.finditer(block):
        shape = tuple(int(n) for n in re.findall(r"\d{1,15}", found[2]))
        named = _DTYPE.search(found[3])
        dtype, buffer = named[1] if named else None, found[1]
    operations = _OPERATION.findall(block)
    return Trace(_moment(block), shape, dtype, buffer, operations[-1] if operations else None)


def _moment(block: str) -> Moment | None:
    found = next((moment for moment, pattern in _MOMENTS if pattern.search(block)), None)
    if found is not None and found != "evaluation":
        return found
    last = block[-900:]
    if _LOSS.search(last):
        return found or "loss"
    return found or ("forward" if _FORWARD.search(block) else None)
