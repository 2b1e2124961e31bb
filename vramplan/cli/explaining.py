"""``explain``."""

from __future__ import annotations

import codecs
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import rich_click as click

from ..errors import ConfigError, Problem
from ..files import check_not_over, write_text
from ..planner.explain import Available, Explanation, Remedy
from ..planner.explain import explain as explained
from ..planner.gpu import Gpu
from ..planner.nanogpt_config import NanoGPTConfig, overrides_in, read_nanogpt
from ..planner.oom_text import read_oom
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..runconfig import RunConfig
from ..units import gib
from .options import FilePath, card_options, refused, resolve_target

MOST_BYTES = 256 * 2**20
"""Of a log, its end; a failure is where it stops."""


@dataclass(frozen=True, slots=True)
class Source:
    """A configuration that failed, and the form it came in."""

    shape: Shape
    step: StepConfig
    run: RunConfig | None = None
    nanogpt: NanoGPTConfig | None = None


@click.command()
@click.argument("text", metavar="FILE|-", type=FilePath())
@click.option("--config", metavar="CONFIG|PLAN|RUN|WORDS", help="What failed: our TOML, a plan, a run directory; "
              "nanoGPT's config/x.py or command line.")  # fmt: skip
@card_options(default=None)
@click.option("-o", "--out", type=FilePath(), help="Write the repaired configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain(
    text: Path, config: str | None, gpu: str | None, vram: int | None, reserve: int | None, headless: bool,
    max_risk: float, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Explain a traceback or log: whether memory ran out, of what, why, which tensor it was, and what to change.

    \b
    vramplan explain crash.txt
    vramplan explain crash.txt --config run.toml --gpu 4070
    vramplan explain - --config "train.py --batch_size=16 --n_embd=576" --vram 8.9GB -o fixed.py

    Exit code: 0 when it could be read, whatever it is; 2 for bad input.
    """
    collect = refused()
    source, target, given = None, None, None
    for name, value in (("reserve", reserve), ("headless", headless or None)):
        if value is not None and gpu is None and vram is None:
            remedy = "add --gpu or --vram"
            collect.problems.append(Problem(f"--{name}", "missing", "means nothing without a card", remedy))
    if config is not None:
        with collect:
            source = read_source(config, text.parent)
    elif out is not None:
        rule = "has nothing to be written without a configuration"
        collect.problems.append(Problem("--out", str(out), rule, "add --config"))
    if out is not None:
        with collect:
            check_not_over(out, "--out", [text])
    if gpu is not None or vram is not None:
        with collect:
            target = resolve_target(gpu, vram, reserve, headless)
    if source is not None and target is not None and target.device != source.step.device:
        rule = f"is not where a configuration for {source.step.device} runs"
        collect.problems.append(Problem("--gpu", gpu or "missing", rule, "name that device, or leave it out"))
    collect.finish()
    if target is not None:
        given = Available(target.budget.budget_bytes, _words(target.gpu, gpu, vram, target.budget.reserve_bytes))
    read, notes = _read(text)
    found = read_oom(read)
    if source is not None and source.nanogpt is not None:
        notes.extend(source.nanogpt.notes)
    if source is None and found.is_memory:
        source = _from_log(read, notes)
    pair = (source.shape, source.step) if source else None
    result = explained(found, pair, target.gpu if target else None, given, max_risk, _planned(source))
    written = _write(out, result, source, notes) if out is not None else None
    _show(result, source, notes, as_json, written)


def _show(result: Explanation, source: Source | None, notes: list[str], as_json: bool, written: str | None) -> None:
    from ..report.explanation import as_dict, print_explanation

    if as_json:
        shown = as_dict(result)
        shown["notes"] = [*shown["notes"], *notes]
        click.echo(json.dumps(shown))
        return
    print_explanation(result, source.nanogpt if source else None)
    for note in notes:
        click.echo(note)
    if written is not None:
        click.echo(written)


def _words(card: Gpu | None, gpu: str | None, vram: int | None, reserve_bytes: int) -> str:
    kept = f" less {gib(reserve_bytes)} kept back" if reserve_bytes else ""
    if vram is not None:
        return f"given with --vram{kept}"
    return f"{card.name if card else gpu}{kept}"


def _planned(source: Source | None) -> Available | None:
    """What a configuration was planned for."""
    if source is None or source.run is None or not source.run.plan.budget_bytes:
        return None
    return Available(int(source.run.plan.budget_bytes), "what it was planned for")


# -------------------------------------------------------------------- reading


def read_source(given: str, near: Path) -> Source:
    """The configuration that ``--config`` names; files of a command line also ``near`` the log. Raises ConfigError."""
    path = Path(FilePath().parse(given, "--config")) if len(given) < 4096 and "\n" not in given else None
    is_path = path is not None and path.exists()
    script, _, rest = given.strip().partition(" ")
    is_command = not is_path and ("--" in given or (script.endswith(".py") and bool(rest)))
    if (path is not None and path.suffix == ".py" and not rest) or is_command:
        found = read_nanogpt(given, near=near)
        return Source(found.shape, found.step, nanogpt=found)
    if path is None:
        raise ConfigError(Problem("--config", f"{given[:40]}...", "is neither a file nor a command line"))
    from .subject import read_config

    run = read_config(path, 1)
    return Source(run.shape, run.step_config, run=run)


def _from_log(text: str, notes: list[str]) -> Source | None:
    """nanoGPT's log says what its configurator was told; not where a file was read as well."""
    if "Overriding: " not in text or "Overriding config with" in text:
        return None
    found = NanoGPTConfig(overrides_in(text))
    try:
        found.check("the log")
    except ConfigError:
        return None
    notes.append("The configuration is what nanoGPT's log says that it was told; its defaults stand for the rest.")
    return Source(found.shape, found.step, nanogpt=found)


def _read(path: Path) -> tuple[str, list[str]]:
    """The text, or of a very long one its end; with notes. Raises ConfigError when there is none."""
    try:
        if str(path) == "-":
            if sys.stdin is None:
                raise ConfigError(Problem("FILE", "-", "is closed", "name a file"))
            if sys.stdin.isatty():
                click.echo("Paste the text, then end it with Ctrl-D (Windows: Ctrl-Z and Enter).", err=True)
            data, cut = _end_of(sys.stdin.buffer)
        elif path.is_dir():
            raise ConfigError(Problem("FILE", str(path), "is a directory", "name the log or traceback in it"))
        else:
            with path.open("rb") as f:
                data, cut = _end_of(f)
    except FileNotFoundError:
        raise ConfigError(
            Problem("FILE", str(path), "does not exist", "name a file, or - for standard input")
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(Problem("FILE", str(path), f"cannot be read ({why})")) from None
    if not data.strip():
        raise ConfigError(Problem("FILE", str(path), "is empty", "give the traceback or the log of the failed run"))
    return _decoded(data), [f"Only the last {gib(MOST_BYTES)} were read."] if cut else []


def _end_of(f: BinaryIO) -> tuple[bytes, bool]:
    """At most the last MOST_BYTES, in bytes; and whether there was more."""
    parts: list[bytes] = []
    held, cut = 0, False
    while part := f.read(2**24):
        parts.append(part)
        held += len(part)
        while held - len(parts[0]) >= MOST_BYTES:
            held -= len(parts.pop(0))
            cut = True
    return b"".join(parts), cut


def _decoded(data: bytes) -> str:
    """UTF-8, or UTF-16 as PowerShell writes it; what is neither is replaced."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    if data[1:200:2].count(0) > 80 and 0 not in data[0:200:2]:
        return data.decode("utf-16-le", errors="replace")
    return data.decode("utf-8-sig", errors="replace")


# -------------------------------------------------------------------- writing


def _write(out: Path, result: Explanation, source: Source | None, notes: list[str]) -> str | None:
    """Write the repaired configuration, in the form that the failed one had; what was done, in words."""
    from ..report.explanation import nanogpt_file

    repair = result.repair
    if repair is None or source is None:
        notes.append(f"{out} was not written: there is no repair.")
        return None
    if repair.environment is not None:
        notes.append(f"{out} was not written: the repair is an environment variable, {repair.environment}.")
        return None
    if source.nanogpt is not None:
        write_text(out, nanogpt_file(repair, source.step, source.nanogpt), "--out")
        return f"Wrote {out}. Next: python train.py {out}"
    if source.run is None:
        return None
    write_text(out, _repaired(source.run, repair).to_toml(), "--out")
    return f"Wrote {out}."


def _repaired(run: RunConfig, repair: Remedy) -> RunConfig:
    from ..report.exports import with_step

    plan = run.plan.model_dump() | {"process_bytes": repair.after_bytes}
    for name in ("peak_allocated_bytes", "tokens_per_second", "oom_risk"):  # of the configuration that failed
        plan.pop(name, None)
    return with_step(run, repair.shape, repair.step, plan)
