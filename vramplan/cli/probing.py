"""``probe`` and ``ledger``."""

from __future__ import annotations

import codecs
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich_click as click

from ..device import live_gpu
from ..errors import ConfigError, Problem, VramplanError
from ..files import write_text
from ..planner.shape import Shape
from ..planner.step import DeviceKind, StepConfig
from .options import FilePath, Size, options, refused
from .subject import read_subject

EXIT_CODES = {"fits": 0, "out_of_memory": 3, "spilled": 3, "not_memory": 1, "timed_out": 1, "killed": 1}

ledger_option = click.option("--ledger", "ledger_path", type=FilePath(), help="Ledger file. [default: the user's own]")
place_options = options(
    click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="Which plan of a plan file."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where to run it; auto: where it was planned for.",
    ),
)  # fmt: skip
child_options = options(
    click.option("--steps", type=click.IntRange(3), default=5, show_default=True, help="Optimizer steps; two warm up."),
    click.option("--timeout", type=click.FloatRange(1), help="Seconds for a child. [default: 600; 1800 compiled]"),
    click.option("--host-memory", type=Size(2**34), help="What a child may hold. [default: what is free]"),
    ledger_option,
)


@click.command()
@click.argument("config", metavar="CONFIG|PLAN|RUN", type=FilePath())
@place_options
@click.option("--compile/--no-compile", "compile_", default=None, help="Instead of what the configuration says.")
@click.option("--cap", type=Size(2**34), help="Memory as on a smaller card (11.6GiB), context counted.")
@click.option(
    "--phases", type=click.Choice(["step", "all"]), default="step", show_default=True,
    help="all: evaluation, saving and resuming as well.",
)  # fmt: skip
@click.option("--alloc-conf", default="", metavar="TEXT", help="PYTORCH_ALLOC_CONF of the child.")
@click.option("--no-ledger", is_flag=True, help="Do not keep the measurement.")
@child_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def probe(
    config: Path, rank: int, device: str, compile_: bool | None, phases: str, no_ledger: bool,
    ledger_path: Path | None, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Run real optimizer steps in a child process, and show what they needed beside the estimate.

    \b
    vramplan probe run.toml
    vramplan probe plan.json --rank 2 --cap 11.6GiB
    vramplan probe run.toml --device cpu --phases all

    Exit code: 0 it fits, 3 out of memory or spilled, 1 it failed otherwise, 2 bad input, 130 Ctrl-C.
    """
    from ..memory_probe.probe import INTERRUPTED
    from ..memory_probe.probe import probe as run_probe

    _check(given)
    shape, step = configured(config, rank, device, compile_)
    if step.device == "cpu" and given["alloc_conf"]:
        raise ConfigError(Problem("--alloc-conf", given["alloc_conf"], "means nothing on a CPU", "leave it out"))
    found = run_probe(
        shape, step, steps=given["steps"], cap_bytes=given["cap"], everything=phases == "all",
        seconds=given["timeout"], host_bytes=given["host_memory"], alloc_conf=given["alloc_conf"], doing=progress(),
    )  # fmt: skip
    if not no_ledger:
        keep(ledger_path, [found])
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json") | {"allocated_error": found.allocated_error}))
    else:
        from ..report.probes import print_probe

        print_probe(found)
    code = 130 if found.reason == INTERRUPTED else EXIT_CODES[found.outcome]
    if code:
        raise SystemExit(code)


def _check(given: dict[str, Any]) -> None:
    """Every problem of the limits in one error; click's own range lets a number pass that is none."""
    collect = refused()
    for name, option in (("cap", "--cap"), ("host_memory", "--host-memory")):
        if given[name] == 0:
            collect.problems.append(Problem(option, "0", "must be above zero", "write a size such as 11.6GiB"))
    if given["timeout"] is not None and math.isnan(given["timeout"]):
        collect.problems.append(Problem("--timeout", "nan", "is no number", "write the seconds"))
    collect.finish()


def configured(config: Path, rank: int, device: str, compile_: bool | None) -> tuple[Shape, StepConfig]:
    """Shape and step of a file, for the device that is asked for. Raises ConfigError when there is none."""
    from dataclasses import replace

    shape, step, _, _ = read_subject(config, rank)
    kind: DeviceKind = step.device if device == "auto" else "cpu" if device == "cpu" else "cuda"
    if kind == "cuda" and live_gpu() is None:
        remedy = "use --device cpu, which confirms the tensors, or probe where the card is"
        raise ConfigError(Problem("--device", "cuda", "finds no NVIDIA card", remedy))
    return shape, replace(step, device=kind, compile=step.compile if compile_ is None else compile_)


def progress() -> Callable[[str], None]:
    """Says on standard error what a child is doing, if somebody is watching."""
    if not sys.stderr.isatty():
        return lambda what: None
    return lambda what: click.echo(f"  {what} ...", err=True)


def keep(path: Path | None, measurements: list[Any]) -> None:
    """Add to the ledger; what goes wrong there does not take the measurement away."""
    from ..memory_probe.ledger import Ledger

    try:
        with Ledger(path, on_note=_note) as ledger:
            ledger.add(measurements)
    except VramplanError as error:
        _note(f"Not kept: {error}")


def _note(text: str) -> None:
    from ..report.console import printable

    click.echo(printable(text), err=True)


# -------------------------------------------------------------------- ledger


@click.group()
def ledger() -> None:
    """What was measured on this machine, or imported from others: the evidence behind every stated risk."""


@ledger.command("list")
@click.option("--outcome", help="Only these: fits, out_of_memory, ...")
@ledger_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def list_(outcome: str | None, ledger_path: Path | None, as_json: bool) -> None:
    """Every measurement, oldest first."""
    with _opened(ledger_path) as found:
        measurements = list(found.measurements(outcome=_outcome(outcome)))
        if as_json:
            for m in measurements:
                click.echo(m.line())
        else:
            from ..report.probes import print_ledger

            print_ledger(measurements, len(found), str(found.path))


@ledger.command()
@click.argument("identifier", metavar="ID")
@ledger_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
def show(identifier: str, ledger_path: Path | None, as_json: bool) -> None:
    """One measurement in full, by the beginning of its id."""
    from ..report.probes import print_probe

    with _opened(ledger_path) as found:
        if not identifier.isalnum():
            raise ConfigError(Problem("ID", identifier, "is not the beginning of an id", "see: vramplan ledger list"))
        measurements = list(found.measurements(identifier=identifier))
        if not measurements:
            raise ConfigError(Problem("ID", identifier, "is not in the ledger", "see: vramplan ledger list"))
        for m in measurements:
            if as_json:
                click.echo(m.line())
            else:
                print_probe(m)


@ledger.command()
@click.option("-o", "--output", type=FilePath(), help="File to write (JSONL). [default: print]")
@ledger_option
def export(output: Path | None, ledger_path: Path | None) -> None:
    """Write every measurement as a JSON object a line, to be shared."""
    with _opened(ledger_path) as found:
        lines = [m.line() for m in found.measurements()]
    if output is None:
        click.echo("".join(f"{line}\n" for line in lines), nl=False)
        if not lines:
            _note(f"No measurements in {found.path}.")
        return
    if output.exists() and found.path.exists() and output.samefile(found.path):
        raise ConfigError(Problem("--output", str(output), "is the ledger itself", "name another file"))
    write_text(output, "".join(f"{line}\n" for line in lines), "--output")
    click.echo(f"Wrote {_count(len(lines))} to {output}.")


@ledger.command("import")
@click.argument("file", type=FilePath())
@ledger_option
def import_(file: Path, ledger_path: Path | None) -> None:
    """Add what ``ledger export`` wrote here or elsewhere; what is known already is passed over."""
    try:
        data = file.read_bytes()
        # what Windows' own shell writes with `>` is UTF-16
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(Problem("FILE", str(file), f"cannot be read ({reason})")) from None
    with _opened(ledger_path) as found:
        result = found.import_lines(text.split("\n"))  # other line ends than this may stand in a string
    click.echo(f"{result.added} new, {result.known} known already, {len(result.refused)} refused.")
    for reason in result.refused:
        _note(reason)
    if result.refused:
        raise SystemExit(ConfigError.exit_code)


@ledger.command()
@click.option("--before", metavar="DATE", help="Delete what is older than 2026-11-21.")
@click.option("--outcome", help="Delete only these: not_memory, timed_out, ...")
@ledger_option
def prune(before: str | None, outcome: str | None, ledger_path: Path | None) -> None:
    """Delete measurements by age, by outcome, or by both."""
    from ..memory_probe.ledger import utc_text

    if before is None and outcome is None:
        raise ConfigError(Problem("--before", "missing", "or --outcome is required", "say what to delete"))
    date, outcome = None if before is None else utc_text(before, "--before"), _outcome(outcome)
    with _opened(ledger_path) as found:
        deleted = found.prune(before=date, outcome=outcome)
        click.echo(f"Deleted {_count(deleted)}; {len(found)} left in {found.path}.")


def _count(n: int) -> str:
    return f"{n} measurement{'' if n == 1 else 's'}"


def _opened(path: Path | None) -> Any:
    from ..memory_probe.ledger import Ledger

    refused().finish()
    return Ledger(path, on_note=_note)


def _outcome(word: str | None) -> str | None:
    from ..errors import did_you_mean
    from ..memory_probe.measurement import OUTCOMES

    if word is not None and word not in OUTCOMES:
        raise ConfigError(Problem("--outcome", word, "is not one of the outcomes", did_you_mean(word, OUTCOMES)))
    return word
