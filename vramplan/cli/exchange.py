"""``export`` and ``import``: a run for other programs, and a run of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from ..errors import command
from ..planner.shape import GPT2_VOCAB
from ..units import count, gib
from .options import FilePath, refused

FORMATS = ("hf", "nanogpt", "safetensors")


@click.command()
@click.argument("run", type=FilePath())
@click.option("--format", "form", type=click.Choice(FORMATS), required=True)
@click.option("--out", type=FilePath(), required=True, help="A new file; for hf a new directory.")
@click.option("--best", is_flag=True, help="The checkpoint with the lowest validation loss, not the newest.")
def export(run: Path, form: str, out: Path, best: bool) -> None:
    """Write a checkpoint of a run, the newest, as other programs read it.

    \b
    hf           a directory for transformers' GPT2LMHeadModel; GPT-2's layout only
    nanogpt      a ckpt.pt for nanoGPT's sample.py and train.py; GPT-2's layout, tied, only
    safetensors  the weights under their own names, the configuration in the metadata; any layout
    """
    refused().finish()
    from ..report.console import printable
    from ..trainer.export import export as write

    done = write(run, form, out, best=best)
    what = f"step {done.step:,}, {count(done.parameters)} parameters, {gib(done.size_bytes)}"
    click.echo(f"Wrote {out}: {done.checkpoint.name}, {what}.")
    for note in done.notes:
        click.echo(f"  {printable(note)}")
    if form == "hf":
        click.echo(f"Load it with: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})")
    if form == "nanogpt":
        click.echo("Put it as ckpt.pt into nanoGPT's out_dir; then: python sample.py --init_from=resume")


@click.command("import")
@click.argument("file", metavar="CKPT.pt", type=FilePath())
@click.option("--out", type=FilePath(), required=True, help="The run directory.")
@click.option("--max-steps", type=click.IntRange(1), help="Last optimizer step of the run. [default: its max_iters]")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
    help="Where it will be trained on; auto: where it was.",
)  # fmt: skip
def import_(file: Path, out: Path, max_steps: int | None, device: str) -> None:
    """Make a run of a nanoGPT checkpoint. Nothing that the file contains is run."""
    refused().finish()
    from ..report.console import printable
    from ..trainer.nanogpt import import_run

    kind: Any = None if device == "auto" else device
    done = import_run(file, out, device=kind, max_steps=max_steps)
    shape = done.config.shape
    steps = f"{done.step:,} of {done.config.total_steps:,} steps"
    click.echo(f"Imported {file} as {out}: {shape.label}, {count(shape.parameters)} parameters, after {steps}.")
    for note in done.notes:
        click.echo(f"  {printable(note)}")
    if shape.vocab_size >= GPT2_VOCAB:
        again = command("vramplan", "train", "--resume", out, "--data", "FILE.parquet")
        further = f", or train on: {again}" if done.step < done.config.total_steps else ""
        click.echo(f"Next: {command('vramplan', 'sample', out)}{further}")
