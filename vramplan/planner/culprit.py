"""Which tensor of a step could not be allocated: the size that a failure names, looked up in the tensor table.

A message prints what torch asked of the driver: the tensor's size rounded up to 2 MiB, or 2 and 20 MiB for tensors
below 1 and 10 MiB (c10/cuda/CUDACachingAllocator.cpp), with two decimals. A compiled graph's traceback has the exact
shape. Equal sizes are told apart by the phase that the traceback shows, and by what was allocated already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from ..units import GIB, KIB, MIB
from .allocator import MIN_BLOCK, SMALL_SEGMENT
from .allocator_settings import LARGE_SEGMENT
from .memory import STEP_PARTS, Estimate, TensorBytes, alive_after
from .oom_cause import driver_request
from .oom_text import OomText
from .oom_trace import MADE_BY, Moment
from .shape import Shape
from .step import StepConfig
from .tape import Change

PHASES: dict[Moment, tuple[str, ...]] = {
    "forward": STEP_PARTS["forward"],
    "loss": ("loss forward",),
    "backward": STEP_PARTS["backward"],
    "optimizer": (*STEP_PARTS["optimizer step"], "persistent"),
    "evaluation": ("evaluation", *STEP_PARTS["forward"]),
    "sampling": (),
    "loading": ("persistent",),
}
"""The table's phases in which a traceback's moment lies."""

WIDTHS = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "float64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by torch's name of the dtype."""

MOST_NAMES = 3
"""Tensors of one size that are named together; of more it is said only that they are many."""

NEAR = 0.05
"""How far what was allocated may be from the table's, relative, to tell equal tensors apart."""

ALSO_ALIVE = 5


@dataclass(frozen=True, slots=True)
class Culprit:
    """The tensor that could not be had: the table's ``name``, its ``phase``, its size in bytes as a ``product``, the
    largest tensors that were alive beside it, and the bytes of all of them."""

    name: str
    phase: str
    n_bytes: int
    product: str
    also_alive: tuple[TensorBytes, ...]
    alive_bytes: int

    def as_dict(self) -> dict[str, object]:
        """``tensor`` of ``explain --json``."""
        return {
            "name": self.name,
            "phase": self.phase,
            "bytes": self.n_bytes,
            "product": self.product,
            "also_alive": [{"name": tensor.name, "bytes": tensor.n_bytes} for tensor in self.also_alive],
            "alive_bytes": self.alive_bytes,
        }


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the table says of a failure: the tensor, or None and the reason why it names none."""

    culprit: Culprit | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An allocation, what was alive before it, and how much of that came only with the first update or micro-step."""

    index: int
    change: Change
    alive_bytes: int
    later_bytes: int

    def distance(self, allocated: int) -> float:
        """How far what was alive is from ``allocated``, relative: in the first step of a run, or in a later one."""
        alive = (self.alive_bytes, self.alive_bytes - self.later_bytes)
        return min(abs(n - allocated) for n in alive) / max(allocated, 1)


def find_culprit(found: OomText, full: Estimate) -> Lookup:
    """The tensor of ``full`` whose size the text names."""
    asked = found.figures.requested_bytes
    exact = _exact_bytes(found)
    if exact is None and asked is None:
        return Lookup(None, "the text names no size")
    if exact is None and full.step.device == "cuda" and asked in (SMALL_SEGMENT, LARGE_SEGMENT):
        return Lookup(None, "so little is asked of the driver for any of many small tensors")
    allowed = PHASES.get(found.moment) if found.moment is not None else None
    candidates = [c for c in _allocations(full.changes) if _matches(int(c.change.row.size), exact, asked, full.step)]
    if not candidates:
        return Lookup(None, "no tensor of this configuration has that size")
    inside = candidates if allowed is None else [c for c in candidates if c.change.phase in allowed]
    if not inside:
        phases = ", ".join(sorted({c.change.phase for c in candidates}))
        return Lookup(None, f"tensors of that size are made in another phase ({phases}) than the traceback shows")
    if found.moment == "optimizer":  # its first step makes the states, and nothing else
        inside = [c for c in inside if c.change.row.category == "optimizer"]
        if not inside:
            return Lookup(None, "the optimizer's states have no tensor of that size")
    return _chosen(_narrowed(_made_by(found.operation, inside), found), full, found)


def _exact_bytes(found: OomText) -> int | None:
    width = WIDTHS.get(found.dtype or "")
    return None if found.shape is None or width is None else prod(found.shape) * width


def _allocations(changes: Iterable[Change]) -> Iterator[_Candidate]:
    alive = later = 0
    for index, change in enumerate(changes):
        size, row = int(change.row.size), change.row
        carried = row.name.startswith("logits of the previous")  # made in the micro-step before
        if change.alloc and size > 0 and not carried:
            yield _Candidate(index, change, alive, later)
        signed = size if change.alloc else -size
        alive += signed
        if carried or row.category == "optimizer" or (row.category == "gradients" and change.phase == "persistent"):
            later += signed


def _matches(size: int, exact: int | None, asked: int | None, step: StepConfig) -> bool:
    if exact is not None:
        return abs(size - exact) < MIN_BLOCK
    if asked is None:
        return False
    if step.device == "cpu":
        return size == asked
    return any(abs(printed - asked) <= _half_a_digit(printed) for printed in (driver_request(size), size))


def _half_a_digit(n_bytes: int) -> float:
    """Half of the last of two decimals in the unit that torch prints a size in."""
    unit = GIB if n_bytes > GIB else MIB if n_bytes > MIB else KIB
    return 0.005 * unit + 1


def _made_by(operation: str | None, candidates: list[_Candidate]) -> list[_Candidate]:
    """Of several, those that the traceback's last telling line makes; all of them where it makes none."""
    words = MADE_BY.get(operation or "", ())
    own = [c for c in candidates if any(_makes(word, c.change.row.name) for word in words)]
    return own or candidates


def _makes(word: str, name: str) -> bool:
    return name.endswith(word) if word.startswith("exp_avg") else word in name


def _narrowed(candidates: list[_Candidate], found: OomText) -> list[_Candidate]:
    """Of several, those whose surroundings are what was allocated."""
    allocated = found.figures.allocated_bytes
    if allocated is None or len({c.change.row.name for c in candidates}) == 1:
        return candidates
    distances = {c.index: c.distance(allocated) for c in candidates}
    best = min(distances.values())
    near = [c for c in candidates if distances[c.index] <= best + NEAR / 5]
    return near if best <= NEAR else candidates


def _chosen(candidates: list[_Candidate], full: Estimate, found: OomText) -> Lookup:
    names = list(dict.fromkeys(c.change.row.name for c in candidates))
    if len(names) > MOST_NAMES:
        return Lookup(
            None, f"{len(names)} tensors have that size: {', '.join(names[:3])}{' and others' * (len(names) > 3)}"
        )
    allocated = found.figures.allocated_bytes
    if allocated is None:
        at = max(candidates, key=lambda c: c.alive_bytes)
    else:
        at = min(candidates, key=lambda c: c.distance(allocated))
    phases = list(dict.fromkeys(c.change.phase for c in candidates))
    size = int(at.change.row.size)
    return Lookup(
        Culprit(
            name=" or ".join(names),
            phase=at.change.phase if len(names) == 1 else " or ".join(phases),
            n_bytes=size,
            product=product(names[0], size, full.shape, full.step),
            also_alive=alive_after(full.table, at.index)[:ALSO_ALIVE],
            alive_bytes=at.alive_bytes,
        )
    )


def product(name: str, size: int, shape: Shape, step: StepConfig) -> str:
    """A size in bytes as the product of dimensions that it is: ``16 x 1024 x 50304 x 2 bytes``."""
    tokens = [f"{step.batch_size} x {shape.block_size}", str(step.loss_chunk_tokens)]
    vocab, wide, qkv, h = shape.vocab_size, shape.fc_width, shape.qkv_width, shape.n_embd
    order = [h, wide, qkv, vocab]
    if any(word in name for word in ("logit", "probabilit", "slope")):
        order = [vocab, h, wide, qkv]
    elif any(word in name for word in ("mlp", "gelu", "swiglu", "relu2", "gate")):
        order = [wide, h, qkv, vocab]
    elif "qkv" in name:
        order = [qkv, h, wide, vocab]
    matrices = [f"{out} x {h}" for out in (vocab, wide, qkv, h, shape.block_size)]
    widths = (2, 4, 1, 8) if step.half else (4, 2, 1, 8)
    for words in [f"{t} x {width}" for t in tokens for width in order] + matrices + [f"{h} x {shape.mlp_width}"]:
        for width in widths:
            if 0 <= size - prod(int(n) for n in words.split(" x ")) * width < MIN_BLOCK:
                return f"{words} x {width} bytes"
    return f"{size:,} bytes"
