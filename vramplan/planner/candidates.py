"""The shapes near a target size: those that were published, and every other one of usual proportions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import ConfigError, Problem
from ..units import count
from .shape import LARGEST, Shape, check_shape, divisors


@dataclass(frozen=True, slots=True)
class PublishedShape:
    """A shape that somebody trained and published."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int


PUBLISHED = (
    # Pythia: Biderman et al. 2023, table 1; GPT-2: Radford et al. 2019; GPT-3: Brown et al. 2020, table 2.1
    PublishedShape("Pythia 14M", 6, 4, 128),
    PublishedShape("Pythia 31M", 6, 8, 256),
    PublishedShape("Pythia 70M", 6, 8, 512),
    PublishedShape("GPT-2 / GPT-3 small", 12, 12, 768),
    PublishedShape("GPT-2 / GPT-3 medium", 24, 16, 1024),
    PublishedShape("GPT-2 large", 36, 20, 1280),
    PublishedShape("GPT-3 large", 24, 16, 1536),
    PublishedShape("Pythia 1B", 16, 8, 2048),
    PublishedShape("GPT-2 XL", 48, 25, 1600),
    PublishedShape("Pythia 1.4B", 24, 16, 2048),
    PublishedShape("Pythia 2.8B", 32, 32, 2560),
    PublishedShape("Pythia 6.9B", 32, 32, 4096),
)

CONVENTIONAL_ASPECT = (33.0, 128.0)
"""Width/depth of the published shapes: from 33 (GPT-2 XL) to 128 (Pythia 1B); only the toy Pythia 14M is narrower."""

DEEPEST = 200
"""Layers beyond which no candidate is offered; GPT-3 has 96."""

TIE = 0.02
"""Two shapes whose distances from the target fall into the same 2 % step are equally near."""


def published_name(shape: Shape) -> str | None:
    """Name of the published model with these dimensions, if there is one."""
    if shape.variant:
        return None
    key = (shape.n_layer, shape.n_head, shape.n_embd)
    return next((p.name for p in PUBLISHED if (p.n_layer, p.n_head, p.n_embd) == key), None)


def disproportion(shape: Shape) -> float:
    """How far width/depth lies outside what is usual, as the logarithm of the ratio; 0 inside."""
    low, high = CONVENTIONAL_ASPECT
    aspect = shape.n_embd / shape.n_layer
    return max(0.0, math.log(low / aspect), math.log(aspect / high))


def conventional(shape: Shape) -> bool:
    """Whether proportions are those of published GPTs: head_dim 64 or 128, width a multiple of 64, usual width/depth.

    A shape that was itself published counts as conventional whatever its proportions.
    """
    if published_name(shape) is not None:
        return True
    return (
        shape.n_embd % shape.n_head == 0
        and shape.head_dim in (64, 128)
        and shape.n_embd % 64 == 0
        and disproportion(shape) == 0
    )


def candidates_near(target: int, tolerance: float, like: Shape) -> list[Shape]:
    """Every legal shape within ``tolerance`` (a fraction) of ``target`` parameters, nearest and most usual first.

    Widths are multiples of 64 from 64 to 8192, heads 64 or 128 wide, any depth; published shapes are always offered.
    ``like`` gives everything else; where it has ``n_kv_head``, heads are multiples of that. Sorted by: how far out of
    proportion (not at all for conventional ones), distance in steps of TIE, published, distance, head_dim 64 before
    128.
    """
    low, high = target * (1 - tolerance), target * (1 + tolerance)
    found: dict[tuple[int, int, int], Shape] = {}
    for p in PUBLISHED:
        shape = replace(like, n_layer=p.n_layer, n_head=p.n_head, n_embd=p.n_embd)
        if low <= shape.parameters <= high and _groups(p.n_head, like.n_kv_head):
            found[(p.n_layer, p.n_head, p.n_embd)] = shape
    for n_embd in range(64, 8193, 64):
        for head_dim in (64, 128):
            n_head = n_embd // head_dim
            if n_embd % head_dim or not _groups(n_head, like.n_kv_head):
                continue
            one = replace(like, n_layer=1, n_head=n_head, n_embd=n_embd)
            per_layer = one.block_parameters
            outside = one.parameters - per_layer
            fewest = max(1, math.ceil((low - outside) / per_layer))
            most = min(DEEPEST, math.floor((high - outside) / per_layer))
            for n_layer in range(fewest, most + 1):
                found.setdefault((n_layer, n_head, n_embd), replace(one, n_layer=n_layer))

    def key(s: Shape) -> tuple[float, int, bool, float, bool]:
        distance = abs(s.parameters - target) / target
        unusual = 0.0 if conventional(s) else disproportion(s)
        return (unusual, math.floor(distance / TIE), published_name(s) is None, distance, s.head_dim != 64)

    return sorted(found.values(), key=key)


def _groups(n_head: int, n_kv_head: int) -> bool:
    """Whether so many keys can be shared by so many queries; without a wish every number of heads will do."""
    return n_kv_head == 0 or (n_head > n_kv_head and n_head % n_kv_head == 0)


def settle_shapes(
    params: int | None, tolerance: float, stated: dict[str, int], like: Shape
) -> tuple[tuple[Shape, ...], list[str]]:
    """The shape that is meant first, then every other one of usual proportions near the target; and what was assumed.

    ``stated`` holds those of n_layer, n_head and n_embd that were given; ``like`` vocabulary, block size, biases and
    tying. With ``params`` (and not all three stated) the candidates are all conventional shapes within ``tolerance``,
    or all legal ones where none is conventional. Raises ConfigError when the request is not clear or cannot be met.
    """
    if params is None and not stated:
        raise ConfigError(
            Problem("--params", "missing", "is required", "give --params 125M, or --n-layer, --n-head, --n-embd")
        )
    shape, assumed = _completed(like, stated)
    if params is None or len(stated) == 3:
        problems = check_shape(shape)
        if problems:
            raise ConfigError(problems)
        return (shape,), assumed
    wrong = [p for p in check_shape(shape) if p.field in stated]
    if wrong:
        raise ConfigError(wrong)

    def near(width: float) -> list[Shape]:
        return [s for s in candidates_near(params, width, like) if all(getattr(s, n) == v for n, v in stated.items())]

    found = near(tolerance)
    if found:
        return tuple([s for s in found if conventional(s)] or found), []
    closest = sorted(near(0.9), key=lambda s: abs(s.parameters - params))[:3]
    remedy = "nearest: " + "; ".join(f"{s.label} with {count(s.parameters)}" for s in closest)
    if not closest:
        remedy = "give --n-layer, --n-head and --n-embd"
        if not stated:
            least = replace(like, n_layer=1, n_head=1, n_embd=64).embedding_parameters
            remedy += f", or a smaller --vocab-size (embeddings 64 wide alone take {count(least)})"
    beside = "".join(f", {name}={value}" for name, value in stated.items())
    raise ConfigError(Problem("--params", count(params), f"has no usual shape within {tolerance:.3g}{beside}", remedy))


def _completed(like: Shape, stated: dict[str, int]) -> tuple[Shape, list[str]]:
    """Fill in what was not stated: 12 layers, heads about 64 wide that divide the width."""
    n_embd = stated.get("n_embd", 64 * stated.get("n_head", 12))
    n_head = stated.get("n_head", 0)
    if "n_head" not in stated:
        heads = divisors(n_embd) if 0 < n_embd <= LARGEST["n_embd"] else (1,)
        n_head = min(heads, key=lambda k: abs(math.log(n_embd / k / 64)) if n_embd > 0 else 0)
    filled = {"n_layer": stated.get("n_layer", 12), "n_head": n_head, "n_embd": n_embd}
    missing = [f"{name} {value}" for name, value in filled.items() if name not in stated]
    return replace(like, n_layer=filled["n_layer"], n_head=n_head, n_embd=n_embd), [
        f"Not given, so assumed: {', '.join(missing)}."
    ] if missing else []
