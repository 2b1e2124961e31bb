"""An explained failure, for a person or a program."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..planner.culprit import Culprit
from ..planner.explain import UNEXPLAINED, Explanation, Prediction, Remedy
from ..planner.nanogpt_config import NanoGPTConfig
from ..planner.oom_fields import ABSURD_BYTES
from ..planner.oom_text import OomText
from ..planner.step import StepConfig, tokens_per_step
from ..units import gib
from .console import console, printable

LABEL = 12
"""Columns of the labels at the left."""


def as_dict(result: Explanation) -> dict[str, Any]:
    """What ``explain --json`` prints: the text's fields, then tensor, repair, prediction and budget (null: unknown)."""
    culprit = result.lookup.culprit if result.lookup else None
    return result.found.as_dict() | {
        "tensor": culprit.as_dict() if culprit else None,
        "tensor_reason": result.lookup.reason or None if result.lookup else None,
        "repair": result.repair.as_dict() if result.repair else None,
        "predicted": result.predicted.as_dict() if result.predicted else None,
        "budget_bytes": result.available.n_bytes if result.available else None,
        "budget_source": result.available.source if result.available else None,
        "advice": list(result.advice),
        "caveats": list(result.caveats),
    }


def print_explanation(result: Explanation, nanogpt: NanoGPTConfig | None = None, out: Console | None = None) -> None:
    """What it was, why, which tensor, what the model says, and what to change."""
    out = out or console()
    found = result.found
    out.print(found.sentence, style="bold" if found.is_memory else "", markup=False)
    if found.line:
        _line(out, "text", printable(found.line))
    if found.is_memory:
        _print_figures(out, found)
        _line(out, "cause", f"{found.cause.replace('_', ' ')}: {found.reason}.")
    for note in found.notes:
        _line(out, "note", printable(note))
    if result.lookup is not None:
        if result.lookup.culprit is not None:
            _print_culprit(out, result.lookup.culprit, found.figures.allocated_bytes)
        else:
            _line(out, "tensor", f"not named: {result.lookup.reason}.")
    if result.predicted is not None:
        _print_prediction(out, result.predicted)
    for caveat in result.caveats:
        _line(out, "warning", caveat)
    if result.repair is not None and result.step is not None:
        _print_repair(out, result.repair, result.step, nanogpt)
    elif result.predicted is not None:
        _line(out, "repair", "none: no smaller way to run the same step is known that fits.")
    for words in result.advice:
        _line(out, "what helps", words)
    _print_wishes(out, result)


def _line(out: Console, label: str, text: str) -> None:
    out.print(f"  {label:<{LABEL}}{text}", markup=False)


def _print_figures(out: Console, found: OomText) -> None:
    f = found.figures
    if f.requested_bytes is not None:
        shape = f" ({' x '.join(map(str, found.shape))} {found.dtype or ''}".rstrip() + ")" if found.shape else ""
        _line(out, "asked for", _size(f.requested_bytes) + shape)
    elif found.shape is not None:
        _line(out, "asked for", f"{' x '.join(map(str, found.shape))} {found.dtype or ''}".rstrip())
    card = [
        f"{_size(size)} {word}"
        for size, word in ((f.total_bytes, "in all"), (f.free_bytes, "free"), (f.limit_bytes, "allowed"))
        if size is not None
    ]
    if card:
        _line(out, "card" if f.gpu_index is None else f"GPU {f.gpu_index}", ", ".join(card))
    held = [
        f"{_size(size)} {word}"
        for size, word in (
            (f.process_bytes, "for the process"),
            (f.allocated_bytes, "allocated by torch"),
            (found.reserved_bytes, "reserved by torch" if f.cached_bytes is None else "cached by torch"),
            (f.reserved_unallocated_bytes, "reserved and not in use"),
            (f.private_pool_bytes, "in private pools"),
        )
        if size is not None
    ]
    if held:
        _line(out, "held", ", ".join(held))
    for process in found.processes:
        name = f" ({printable(process.name)})" if process.name else ""
        _line(out, "other", f"process {process.pid}{name} holds {_size(process.n_bytes)}")
    if found.moment is not None:
        _line(out, "moment", f"{found.moment}, by the traceback" + (f"; buffer {found.buffer}" if found.buffer else ""))


def _size(n_bytes: int) -> str:
    return f"{gib(n_bytes)} (no real size)" if n_bytes >= ABSURD_BYTES else gib(n_bytes)


def _print_culprit(out: Console, culprit: Culprit, allocated_bytes: int | None) -> None:
    _line(out, "tensor", f"{culprit.name}: {gib(culprit.n_bytes, 3)} = {culprit.product}, made in {culprit.phase}")
    beside = ", ".join(f"{gib(tensor.n_bytes)} {tensor.name}" for tensor in culprit.also_alive)
    if beside:
        said = "" if allocated_bytes is None else f" (the text says {gib(allocated_bytes)})"
        _line(out, "beside it", f"{beside}; {gib(culprit.alive_bytes)} in all, by the model{said}")


def _print_prediction(out: Console, predicted: Prediction) -> None:
    _line(
        out, "predicted",
        f"{gib(predicted.process_bytes)} for the process at its peak ({predicted.peak_phase}), "
        f"{gib(predicted.peak_allocated_bytes)} of it allocated",
    )  # fmt: skip
    if predicted.available is None:
        return
    _line(out, "available", f"{gib(predicted.available.n_bytes)}: {predicted.available.source}")
    if predicted.unexplained_bytes is None:
        return
    _line(
        out, "unexplained",
        f"at least {gib(predicted.unexplained_bytes)}: by the model it would have fitted. Usually it is "
        f"{'; '.join(UNEXPLAINED)}.",
    )  # fmt: skip


def _print_repair(out: Console, repair: Remedy, step: StepConfig, nanogpt: NanoGPTConfig | None) -> None:
    speed = "" if repair.speed_ratio is None else f", {abs(1 - repair.speed_ratio):.1%} " + (
        "slower" if repair.speed_ratio < 1 else "faster")  # fmt: skip
    _line(out, "repair", f"{', '.join(repair.changes)}: {gib(repair.before_bytes)} becomes "
          f"{gib(repair.after_bytes)} for the process{speed}")  # fmt: skip
    _line(out, "", f"{repair.why}; {int(tokens_per_step(repair.shape, repair.step)):,} tokens per step as before")
    if repair.environment is None and step.workload == "nanogpt":
        changed = nanogpt_changes(repair, step, nanogpt)
        _line(out, "nanoGPT", " ".join(f"--{name}={value}" for name, value in changed.items()))


def nanogpt_changes(repair: Remedy, step: StepConfig, nanogpt: NanoGPTConfig | None) -> dict[str, Any]:
    """The repair in nanoGPT's names. Its accumulation counts all processes together."""
    processes = nanogpt.world_size if nanogpt is not None else 1
    changed: dict[str, Any] = {}
    if repair.step.batch_size != step.batch_size:
        changed["batch_size"] = int(repair.step.batch_size)
        changed["gradient_accumulation_steps"] = int(repair.step.grad_accum) * processes
    if repair.step.compile != step.compile:
        changed["compile"] = repair.step.compile
    return changed


def nanogpt_file(repair: Remedy, step: StepConfig, nanogpt: NanoGPTConfig) -> str:
    """A file for nanoGPT's configurator: what the run was told, with the repair in it."""
    values = dict(nanogpt.stated) | nanogpt_changes(repair, step, nanogpt)
    head = f"# {', '.join(repair.changes)}: {gib(repair.after_bytes)} expected instead of {gib(repair.before_bytes)}.\n"
    return head + "".join(f"{name} = {value!r}\n" for name, value in values.items())


def _print_wishes(out: Console, result: Explanation) -> None:
    """What would let it say more."""
    if not result.found.is_memory or result.found.kind == "host_oom":
        return
    if result.shape is None:
        out.print(
            "\nWith the configuration (--config: a TOML file, a plan, a run directory, nanoGPT's config file or "
            "command line) it names the tensor and the smallest repair.",
            markup=False,
        )
    elif result.available is None:
        out.print("\nHow much memory was there? Name the card (--gpu) or the size (--vram).", markup=False)
