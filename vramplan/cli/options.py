"""Options that several commands share, and what they resolve to."""

from __future__ import annotations

import abc
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click

from ..device import compile_support, cpu_has_bf16, host_memory, installed_version, live_gpu
from ..errors import Collector, ConfigError, Problem, VramplanError
from ..planner.evidence import NO_EVIDENCE
from ..planner.gpu import Budget, Gpu, budget, find_gpu
from ..planner.memory import context_bytes
from ..planner.overheads import load_overheads
from ..planner.risk import CERTAINTY, LARGEST_RISK
from ..planner.shape import PADDED_GPT2_VOCAB, SHAPE_CHOICES
from ..planner.step import CHOICES, DeviceKind, DType
from ..units import gib, parse_bytes, parse_count

F = TypeVar("F", bound=Callable[..., Any])

LONGEST_NAME = 255
"""Bytes of one part of a path, on every common file system."""


_REFUSED = "vramplan.refused"


class Collected(click.ParamType[Any], abc.ABC):
    """A type whose bad values are gathered, so that the command can report them with everything else it finds.

    A bad value is replaced by ``stand_in`` until :func:`refused` has been asked.
    """

    stand_in: Any = None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse; a problem names the option."""
        try:
            return self.parse(value, _option(param))
        except ConfigError as error:
            if ctx is None:
                raise
            ctx.meta.setdefault(_REFUSED, []).extend(error.problems)
            return self.stand_in

    @abc.abstractmethod
    def parse(self, value: Any, option: str) -> Any:
        """The value, or a ConfigError that names ``option``."""


def refused() -> Collector:
    """What was wrong with the values of this command's options; each command asks once, at its beginning."""
    context = click.get_current_context(silent=True)
    return Collector(context.meta.get(_REFUSED, ()) if context else ())


class Size(Collected):
    """A number of bytes with its unit: 8.9GiB, 12GB."""

    name = "SIZE"

    def __init__(self, stand_in: int) -> None:
        self.stand_in = stand_in

    def parse(self, value: Any, option: str) -> int:
        """Bytes of ``8.9GiB``."""
        return value if isinstance(value, int) else parse_bytes(str(value), option)


class Count(Collected):
    """A count: 125M, 1.5B, 524288."""

    name = "COUNT"
    stand_in = 2**27

    def parse(self, value: Any, option: str) -> int:
        """The number that ``125M`` stands for."""
        return value if isinstance(value, int) else parse_count(str(value), option)


class Share(Collected):
    """A probability or fraction between two bounds: 1%, 0.01."""

    name = "SHARE"
    stand_in = 0.01

    def __init__(self, least: float = 1e-9, largest: float = 1.0) -> None:
        self.least, self.largest = least, largest

    def parse(self, value: Any, option: str) -> float:
        """The share, which must lie within the bounds, and below 1."""
        text = str(value).strip()
        try:
            share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            share = -1.0
        if not self.least <= share <= self.largest or share == 1:
            most = f"below {self.largest:.0%}" if self.largest == 1 else f"at most {self.largest:.0%}"
            rule = f"must be at least {self.least * 100:g}% and {most}"
            raise ConfigError(Problem(option, text, rule, "write 1% or 0.01"))
        return share


class FilePath(Collected):
    """A path: not empty, and of names that a file system can hold."""

    name = "PATH"
    stand_in = Path("unnamed")

    def parse(self, value: Any, option: str) -> Path:
        """The path."""
        if not str(value).strip():
            raise ConfigError(Problem(option, str(value), "is empty", "name a file or directory"))
        path = Path(value)
        for part in path.parts:
            if len(os.fsencode(part)) > LONGEST_NAME:
                rule = f"is longer than the {LONGEST_NAME} bytes that a name can have"
                raise ConfigError(Problem(option, f"{part[:40]}...", rule, "shorten it"))
        return path


def _option(param: click.Parameter | None) -> str:
    if isinstance(param, click.Argument):
        return param.human_readable_name.strip("[]")
    return max(param.opts, key=len) if param and param.opts else "option"


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several option decorators, first one shown first."""

    def wrap(command: F) -> F:
        for decorate in reversed(decorators):
            command = decorate(command)
        return command

    return wrap


DEFAULT_MAX_RISK = 0.01


def card_options(default: str | None, max_risk: float | None = DEFAULT_MAX_RISK) -> Callable[[F], F]:
    """--gpu, --vram, --reserve, --headless, --max-risk."""
    limit = f"[default: {DEFAULT_MAX_RISK:.0%}]" if max_risk else "[default: the plan's own]"
    return options(
        click.option("--gpu", default=default, show_default=True, metavar="NAME|auto|cpu", help="Card to plan for."),
        click.option("--vram", type=Size(2**36), help="Memory to plan for instead of the card's (8.9GiB, 12GB)."),
        click.option("--reserve", type=Size(0), help="Kept back for the desktop. [default: 0.75GiB for a named card]"),
        click.option("--headless", is_flag=True, help="The card drives no screen: nothing is kept back."),
        click.option(
            "--max-risk",
            type=Share(CERTAINTY, LARGEST_RISK),
            default=max_risk,
            help=f"Largest accepted OOM risk. {limit}",
        ),
    )


def choice(name: str, extra: tuple[str, ...] = ()) -> click.Choice[str]:
    """One of the values of a setting of a step, or of ``extra``."""
    return click.Choice([*extra, *CHOICES[name]])


torch_option = click.option(
    "--torch", metavar="VERSION", help="PyTorch that will run it, such as 2.13. [default: the installed one]"
)


def torch_release(given: str | None) -> str:
    """Major and minor version of what was given, or of the PyTorch that is installed; empty when there is none."""
    text = given if given is not None else installed_version("torch") or ""
    found = re.match(r"\d+\.\d+", text)
    if found is None and text:
        raise ConfigError(Problem("--torch", text, "is not a version", "such as 2.13"))
    return found[0] if found else ""


shape_options = options(
    click.option("--n-layer", type=int, help="Number of blocks."),
    click.option("--n-head", type=int, help="Number of attention heads."),
    click.option("--n-embd", type=int, help="Width of the residual stream."),
    click.option("--vocab-size", type=int, default=PADDED_GPT2_VOCAB, show_default=True),
    click.option("--block-size", type=int, default=1024, show_default=True, help="Tokens per sequence."),
    click.option("--bias/--no-bias", default=False, show_default=True, help="Biases in linear layers and LayerNorms."),
    click.option("--tied/--untied", default=True, show_default=True, help="Share token embedding and output head."),
    click.option("--norm", type=click.Choice(SHAPE_CHOICES["norm"]), default="layernorm", show_default=True),
    click.option("--positions", type=click.Choice(SHAPE_CHOICES["positions"]), default="learned", show_default=True),
    click.option("--mlp", type=click.Choice(SHAPE_CHOICES["mlp"]), default="gelu", show_default=True),
    click.option("--n-kv-head", type=int, default=0, help="Heads of keys and values. [default: as many as --n-head]"),
    click.option("--qk-norm/--no-qk-norm", default=False, show_default=True, help="Normalise queries and keys."),
    click.option(
        "--logit-softcap", type=float, default=0.0, help="Soft limit of the logits, such as 15. [default: off]"
    ),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the run is to happen."""

    gpu: Gpu | None
    device: DeviceKind
    budget: Budget
    notes: tuple[str, ...]
    can_compile: bool
    dtypes: tuple[DType, ...]
    compile_note: str


def is_cpu(gpu: str | None) -> bool:
    """Whether --gpu asks for this machine's CPU."""
    return gpu is not None and gpu.lower() == "cpu"


def resolve_target(gpu: str | None, vram: int | None, reserve: int | None, headless: bool) -> Target:
    """Find the card and its budget. Raises ConfigError when there is neither a card nor a size."""
    if vram is not None and vram <= 0:
        raise ConfigError(Problem("--vram", vram, "must be positive"))
    if headless and reserve is not None:
        rule = "contradicts --headless, which keeps nothing back"
        raise ConfigError(Problem("--reserve", gib(reserve), rule, "leave one of them out"))
    if is_cpu(gpu):
        return _cpu_target(vram, reserve)
    if gpu is not None and gpu.lower() == "auto":
        return _live_target(vram, reserve, headless)
    card = with_evidence(find_gpu(gpu)) if gpu else None
    found = budget(card, vram_bytes=vram, reserve_bytes=reserve, headless=headless)
    can_compile, why = compile_support(card.capability if card else None)
    return Target(card, "cuda", found, found.assumptions, can_compile, _half_dtypes(card), why)


def with_evidence(card: Gpu | None) -> Gpu | None:
    """The card with what the ledger knows of its architecture, and what was traced here; what cannot be read is said
    and left out."""
    from ..memory_probe.ledger import Ledger
    from ..memory_probe.traced import read_traced

    def note(text: str) -> None:
        click.echo(text, err=True)

    if card is None:
        return card
    known = NO_EVIDENCE
    try:
        with Ledger(on_note=note) as ledger:
            known = ledger.evidence(".".join(map(str, card.capability)))
    except VramplanError as error:
        note(f"{error}; planned without it")
    return replace(card, evidence=replace(known, traced=read_traced(on_note=note)))


def with_measured(card: Gpu | None, path: Path | None) -> Gpu | None:
    """The card with the user's own overheads (``--overheads``). Raises ConfigError without a card to put them on."""
    if path is None:
        return card
    measured = load_overheads(path)
    if card is None:
        raise ConfigError(Problem("--overheads", str(path), "means nothing without a card", "add --gpu"))
    return measured.on(card)


def _half_dtypes(card: Gpu | None) -> tuple[DType, ...]:
    return ("bfloat16", "float16", "float32") if card is None or card.supports_bf16 else ("float16", "float32")


def _cpu_target(vram: int | None, reserve: int | None) -> Target:
    host = host_memory()
    available = vram if vram is not None else host.available_bytes
    found = Budget(total_bytes=available, reserve_bytes=reserve or 0)
    if found.budget_bytes <= context_bytes(None, "cpu"):
        kept = f" less the {gib(reserve)} of --reserve" if reserve else ""
        rule = f"{kept} leaves nothing beside Python with torch ({gib(context_bytes(None, 'cpu'))})".strip()
        raise ConfigError(Problem("--vram", gib(available), rule, "give more, or reserve less"))
    notes = [] if vram is not None else [f"{gib(available)} of host memory is available now."]
    dtypes: tuple[DType, ...] = ("float32",)
    if cpu_has_bf16():
        dtypes = ("bfloat16", "float32")
    else:
        notes.append("This CPU has no half-precision matrix units: float32.")
    return Target(None, "cpu", found, tuple(notes), False, dtypes, "Compile is left out on a CPU.")


def _live_target(vram: int | None, reserve: int | None, headless: bool) -> Target:
    live = live_gpu()
    if live is None and vram is not None:
        return resolve_target(None, vram, reserve, headless)
    if live is None:
        remedy = "name one with --gpu 4070, or plan for this machine's memory with --gpu cpu"
        raise ConfigError(Problem("--gpu", "auto", "finds no NVIDIA card", remedy))
    try:
        card = with_evidence(find_gpu(live.name, total_bytes=live.total_bytes))
    except ConfigError:
        card = None  # memory can be planned all the same
    found = budget(card, vram_bytes=vram, reserve_bytes=reserve, free_bytes=live.free_bytes, headless=headless)
    can_compile, why = compile_support(live.capability or (card.capability if card else None), here=True)
    held = [f"{p.name} (pid {p.pid}){f' holds {gib(p.used_bytes)}' if p.used_bytes else ''}" for p in live.processes]
    who = f"The rest of {gib(live.total_bytes)} is held by the driver{' and ' + ', '.join(held) if held else ''}."
    known = f"{live.name}." if card else f"{live.name} is not in the catalogue: speed and MFU are unknown."
    return Target(card, "cuda", found, (known, *found.assumptions, who), can_compile, _half_dtypes(card), why)
