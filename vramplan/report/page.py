"""The planner's page: from the values of its controls to what it shows. The page itself computes nothing.

The report's data and templates are used as they are; :mod:`page_server` puts them behind a local address.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..errors import ConfigError, Problem, command
from ..planner.candidates import settle_shapes
from ..planner.gpu import Gpu
from ..planner.plan import PlanSet
from ..planner.search import LOSS_CHUNKS, check_tokens_per_step
from ..planner.shape import SHAPE_CHOICES, Shape, divisors
from ..planner.step import CHOICES, StepConfig, check, tokens_per_step
from ..units import GIB, count, parse_bytes
from .exports import new_run
from .html import environment, sections_context, style
from .risk import RiskReport, build_report

SIZES = tuple(
    m * 10**6
    for m in (
        10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 350, 400, 500, 600, 800, 1000, 1300, 1500,
        2000, 2500, 3000,
    )
)  # fmt: skip
"""Parameters that the size slider stops at."""

DEFAULT_SIZE = 125 * 10**6
TOLERANCE = 0.10
"""How far from its stop the nearest usual shape may lie."""

TOKENS_PER_STEP = (32768, 65536, 131072, 262144, 524288, 1048576)
BLOCK_SIZES = (256, 512, 1024, 2048, 4096)
LOSSES = ("full", *(f"chunked {tokens}" for tokens in LOSS_CHUNKS))
SELECTS: dict[str, tuple[str, ...]] = {
    "tokens_per_step": tuple(map(str, TOKENS_PER_STEP)), "block_size": tuple(map(str, BLOCK_SIZES)),
    "dtype": CHOICES["dtype"], "compile": ("on", "off"), "loss": LOSSES, "checkpointing": CHOICES["checkpointing"],
    "optimizer": CHOICES["optimizer"], "workload": CHOICES["workload"], "norm": SHAPE_CHOICES["norm"],
    "positions": SHAPE_CHOICES["positions"], "mlp": SHAPE_CHOICES["mlp"],
}  # fmt: skip
"""Controls with a list of choices, under the names that the query string has."""

DEFAULTS = {
    "tokens_per_step": "524288", "block_size": "1024", "dtype": "bfloat16", "compile": "on", "loss": "full",
    "checkpointing": "none", "optimizer": "adamw-fused", "workload": "vramplan", "norm": "layernorm",
    "positions": "learned", "mlp": "gelu", "size": str(SIZES.index(DEFAULT_SIZE)), "batch": "16",
}  # fmt: skip
LARGEST_GIB = 2**20
Query = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Offer:
    """A card that can be chosen, and the bytes that are taken as free on it until the slider says otherwise."""

    gpu: Gpu
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the controls ask for."""

    offer: Offer
    budget_bytes: int
    size: int
    shape: Shape
    step: StepConfig


class Page:
    """Answers queries. ``cards`` are what can be chosen, the first by default; ``best`` searches as ``plan`` does,
    from the words of its command line."""

    def __init__(
        self, cards: Sequence[Offer], max_risk: float, torch: str, best: Callable[[list[str]], PlanSet]
    ) -> None:
        self.cards = {offer.gpu.name: offer for offer in cards}
        self.max_risk, self.torch, self._best = max_risk, torch, best

    # ---------------------------------------------------------------- from the controls

    def wanted(self, query: Query) -> Wanted:
        """Read the controls; what the query leaves out has its default. Raises ConfigError with what is wrong."""
        problems = [
            Problem(name, query[name], "is not one of the choices", f"known: {', '.join(known)}")
            for name, known in SELECTS.items() if query.get(name, known[0]) not in known
        ]  # fmt: skip
        name = query.get("gpu", next(iter(self.cards)))
        if name not in self.cards:
            problems.append(Problem("gpu", name, "is not one of the cards"))
        if problems:
            raise ConfigError(problems)
        offer = self.cards[name]
        values = {**defaults(offer), **query}
        size = SIZES[min(len(SIZES) - 1, _whole(values, "size"))]
        tokens, block = int(values["tokens_per_step"]), int(values["block_size"])
        shape = _shape(size, block, values["norm"], values["positions"], values["mlp"])
        return Wanted(offer, self._budget(values, offer), size, shape, self._step(values, tokens, block))

    def _budget(self, values: Query, offer: Offer) -> int:
        text = values.get("free") or f"{math.floor(offer.budget_bytes / GIB * 100) / 100}"
        try:
            free = float(text)
        except ValueError:
            free = 0.0
        if not 0 < free < LARGEST_GIB:
            raise ConfigError(Problem("free", text, "is not a size in GiB"))
        return parse_bytes(_gib_words(free))  # what the command that is offered will read

    def _step(self, values: Query, tokens: int, block: int) -> StepConfig:
        check_tokens_per_step(tokens, block)
        sequences = tokens // block
        legal = divisors(sequences)
        batch = min(legal, key=lambda b: abs(b - _whole(values, "batch")))
        loss, _, chunk = values["loss"].partition(" ")
        chunked: dict[str, Any] = {"loss_chunk_tokens": int(chunk)} if chunk else {}
        made: dict[str, Any] = {name: values[name] for name in ("dtype", "checkpointing", "optimizer", "workload")}
        return StepConfig(
            batch_size=batch, grad_accum=sequences // batch, compile=values["compile"] == "on",
            loss="chunked" if loss == "chunked" else "full", torch=self.torch, **made, **chunked,
        )  # fmt: skip

    # ---------------------------------------------------------------- to the page

    def front(self) -> str:
        """The whole page, with its controls and nothing computed yet."""
        return environment().get_template("planner.html").render(
            style=Markup(style()), selects=SELECTS, defaults=defaults(next(iter(self.cards.values()))),
            cards=list(self.cards), sizes=len(SIZES), version=__version__,
        )  # fmt: skip

    def view(self, query: Query) -> dict[str, Any]:
        """Verdict, figures, timeline, rough levers, the card, and where the controls stand; for every movement."""
        wanted = self.wanted(query)
        state = self.controls(wanted)
        problems = check(wanted.shape, wanted.step)
        if problems:
            return state | {"problem": str(ConfigError(problems))}
        report = self._quick_report(wanted)
        context = sections_context(report)
        part = _sections()
        return state | {
            "verdict": part.verdict(report),
            "timeline": part.timeline(report, context["timeline_chart"], context["groups"]),
            "levers": part.levers(report),
            "card": part.card(report, context["shares"]),
            "values": _values(report),
            "command": self.command(wanted),
        }

    def more(self, query: Query) -> dict[str, Any]:
        """What takes longer: the smallest repair, risk, exact levers with largest batches, and the Pareto front."""
        wanted = self.wanted(query)
        if check(wanted.shape, wanted.step):
            return {}
        report = build_report(
            "", wanted.shape, wanted.step, wanted.offer.gpu, wanted.budget_bytes, self.max_risk,
            total_bytes=wanted.offer.gpu.usable_bytes,
        )  # fmt: skip
        context, part = sections_context(report), _sections()
        return {
            "repair": part.repair(report),
            "levers": part.levers(report),
            "risk": part.risk(report, context["measured_bytes"]),
            "ways": part.ways(report, context["ways_chart"], context["way_words"], context["beyond"]),
        }

    def _quick_report(self, wanted: Wanted) -> RiskReport:
        gpu, total = wanted.offer.gpu, max(wanted.offer.gpu.usable_bytes, wanted.budget_bytes)
        return build_report(
            "", wanted.shape, wanted.step, gpu, wanted.budget_bytes, self.max_risk, total_bytes=total, quick=True
        )

    def controls(self, wanted: Wanted) -> dict[str, Any]:
        """Where sliders stand, how far they go, and the words beside them."""
        shape, step = wanted.shape, wanted.step
        legal = divisors(int(step.batch_size * step.grad_accum))
        return {
            "size_words": f"{count(wanted.size)}: {shape.label}, {shape.parameters:,} parameters",
            "batches": list(legal),
            "batch": int(step.batch_size),
            "batch_words": f"{step.batch_size} x {step.grad_accum} x {shape.block_size} tokens",
            "free": round(wanted.budget_bytes / GIB, 2),
            "free_most": round(wanted.offer.gpu.usable_bytes / GIB, 2),
        }  # fmt: skip

    def command(self, wanted: Wanted) -> str:
        """What to type for the same figures."""
        step = wanted.step
        how: list[object] = ["--batch-size", step.batch_size, "--grad-accum", step.grad_accum, "--dtype", step.dtype]
        how += ["--compile" if step.compile else "--no-compile", "--loss", step.loss]
        how += ["--loss-chunk-tokens", step.loss_chunk_tokens] if step.loss == "chunked" else []
        how += ["--checkpointing", step.checkpointing, "--optimizer", step.optimizer]
        return command("vramplan", "estimate", *self._model_words(wanted), *how)

    def plan_words(self, wanted: Wanted) -> list[str]:
        """Options of ``plan`` for this card, memory, model and tokens per step."""
        tokens = tokens_per_step(wanted.shape, wanted.step)
        return [*self._model_words(wanted), "--tokens-per-step", str(tokens), "--max-risk", str(self.max_risk)]

    def _model_words(self, wanted: Wanted) -> list[str]:
        shape = wanted.shape
        names = ("n_layer", "n_head", "n_embd", "block_size", "norm", "positions", "mlp")
        model = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(shape, name)))]
        torch = ["--torch", self.torch] if self.torch else []
        memory = ["--vram", _gib_words(wanted.budget_bytes / GIB)]
        return ["--gpu", wanted.offer.gpu.name, *memory, *model, "--workload", wanted.step.workload, *torch]

    def configuration(self, query: Query) -> str:
        """The run configuration (TOML) of what is shown. Raises ConfigError where it is impossible."""
        wanted = self.wanted(query)
        report = self._quick_report(wanted)
        plan = {
            "gpu": wanted.offer.gpu.name, "total_bytes": wanted.budget_bytes, "budget_bytes": wanted.budget_bytes,
            "process_bytes": report.estimate.process_bytes, "tokens_per_second": report.tokens_per_second,
            "peak_allocated_bytes": report.estimate.peak_allocated_bytes, "oom_risk": report.risk.probability,
            "max_risk": self.max_risk, "target_parameters": wanted.size, "version": __version__,
        }  # fmt: skip
        return new_run(wanted.shape, wanted.step, plan).to_toml()

    def best(self, query: Query) -> dict[str, Any]:
        """Where the controls have to stand for the best plan of this size on this card. Raises VramplanError."""
        wanted = self.wanted(query)
        plans = self._best(self.plan_words(wanted))
        step = plans.plans[0].step
        return {
            "batch": int(step.batch_size), "dtype": step.dtype, "compile": "on" if step.compile else "off",
            "loss": f"chunked {step.loss_chunk_tokens}" if step.loss == "chunked" else "full",
            "checkpointing": step.checkpointing, "optimizer": step.optimizer,
        }  # fmt: skip


def defaults(offer: Offer) -> dict[str, str]:
    """Where the controls stand at first, for this card."""
    return DEFAULTS if offer.gpu.supports_bf16 else DEFAULTS | {"dtype": "float16"}


@cache
def _sections() -> Any:
    """The macros that the report is made of."""
    return environment().get_template("sections.html").module


def _values(report: RiskReport) -> dict[str, Any]:
    """The figures under the names that ``estimate --json`` gives them."""
    return {
        "process_bytes": report.estimate.process_bytes, "peak_allocated_bytes": report.estimate.peak_allocated_bytes,
        "budget_bytes": report.budget_bytes, "oom_risk": report.risk.probability, "needs_bytes": report.needs_bytes,
        "tokens_per_second": report.tokens_per_second, "mfu": report.mfu,
    }  # fmt: skip


def _gib_words(free: float) -> str:
    return f"{free:.2f}GiB"


def _whole(values: Query, name: str) -> int:
    text = values.get(name, "")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ConfigError(Problem(name, text, "is not a whole number"))
    return int(text)


@lru_cache(maxsize=256)
def _shape(size: int, block_size: int, norm: Any, positions: Any, mlp: Any) -> Shape:
    like = replace(
        Shape(n_layer=1, n_head=1, n_embd=64), block_size=block_size, norm=norm, positions=positions, mlp=mlp
    )
    shapes, _ = settle_shapes(size, TOLERANCE, {}, like)
    return shapes[0]
