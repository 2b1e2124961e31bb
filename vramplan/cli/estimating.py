"""``estimate``: one configuration, priced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click
from click.core import ParameterSource

from ..errors import ConfigError, Problem
from ..planner.allocator_settings import AllocatorSettings
from ..planner.memory import estimate as estimate_memory
from ..planner.plan import price_plan
from ..planner.repair import smallest_repair
from ..planner.shape import Shape
from ..planner.step import DEFAULT_LOSS_CHUNK, StepConfig, Workload, check, check_step
from .options import (
    FilePath,
    card_options,
    choice,
    is_cpu,
    refused,
    resolve_target,
    shape_options,
    torch_option,
    torch_release,
    with_measured,
)


@click.command()
@click.argument("config", required=False, type=FilePath())
@card_options(default=None)
@shape_options
@click.option("--batch-size", type=int, help="Sequences per micro-batch.")
@click.option("--grad-accum", type=int, help="Micro-batches per optimizer step. [default: 1]")
@click.option("--dtype", type=choice("dtype"), help="Of products and activations. [default: bfloat16]")
@click.option("--compile/--no-compile", "compile_", default=None, help="torch.compile. [default: no]")
@click.option("--loss", type=choice("loss"), help="[default: chunked; full for the other workloads]")
@click.option("--loss-chunk-tokens", type=int, help=f"Tokens per slice. [default: {DEFAULT_LOSS_CHUNK}]")
@click.option("--checkpointing", type=choice("checkpointing"), help="Of activations. [default: none]")
@click.option("--optimizer", type=choice("optimizer"), help="[default: adamw-fused; adamw-foreach for autocast]")
@click.option("--residual", type=choice("residual"), help="Dtype of the residual stream. [default: compute]")
@click.option("--workload", type=choice("workload"), help="Whose script. [default: vramplan]")
@torch_option
@click.option("--alloc-conf", metavar="TEXT", help="PYTORCH_ALLOC_CONF of the run (expandable_segments:True, ...).")
@click.option("--overheads", type=FilePath(), help="TOML file with this card's own context_bytes, measured.")
@click.option("--dropout", type=float, help="Of embeddings and branches, in the other workloads. [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def estimate(ctx: click.RichContext, /, config: Path | None, as_json: bool, max_risk: float, **given: Any) -> None:
    """Memory of one configuration, from a file or from flags; with --gpu or --vram also fit, risk and speed.

    \b
    vramplan estimate run.toml --gpu 4070
    vramplan estimate --n-layer 12 --n-head 12 --n-embd 768 --batch-size 16 --workload nanogpt --compile
    """
    collect, target = refused(), None
    for name in ("reserve", "headless"):
        if given[name] is not None and given[name] is not False and given["gpu"] is None and given["vram"] is None:
            rule = "means nothing without a card"
            collect.problems.append(Problem(f"--{name}", "missing", rule, "add --gpu or --vram"))
    if given["gpu"] is not None or given["vram"] is not None:
        with collect:
            target = resolve_target(given["gpu"], given["vram"], given["reserve"], given["headless"])
    settings, gpu = None, target.gpu if target else None
    with collect:
        gpu = with_measured(gpu, given.pop("overheads"))
    with collect:
        settings = _allocator_settings(given.pop("alloc_conf"), on_cpu=is_cpu(given["gpu"]))
    with collect:
        shape, step = _configuration(ctx, config, given, "cpu" if is_cpu(given["gpu"]) else "cuda")
    collect.finish()
    if step.device == "cpu" and step.compile:
        raise ConfigError(Problem("--compile", "on", "is not planned for a CPU", "leave it out"))
    if step.loss == "full" and given["loss_chunk_tokens"] is not None:
        rule = "means nothing with the full loss"
        raise ConfigError(Problem("--loss-chunk-tokens", given["loss_chunk_tokens"], rule, "leave it out"))
    full = estimate_memory(shape, step, gpu, settings)
    priced = price_plan(1, full, gpu, target.budget.budget_bytes, max_risk) if target else None
    repair = None
    if target is not None and priced is not None and priced.needs_bytes > target.budget.budget_bytes:
        repair = smallest_repair(shape, step, gpu, target.budget.budget_bytes, max_risk, settings)
    if as_json:
        result: dict[str, Any] = full.as_dict()
        if target is not None and priced is not None:
            result |= {
                "budget_bytes": target.budget.budget_bytes,
                "fits": priced.needs_bytes <= target.budget.budget_bytes,
                **priced.oom_risk.as_dict(),
                "needs_bytes": priced.needs_bytes,
                "tokens_per_second": priced.tokens_per_second,
                "mfu": priced.mfu,
                "repair": None if repair is None else repair.as_dict(),
            }
        click.echo(json.dumps(result))
        return
    from ..report.plans import print_estimate

    print_estimate(full, priced, target.budget if target else None, target.notes if target else (), max_risk, repair)


def _allocator_settings(text: str | None, *, on_cpu: bool) -> AllocatorSettings:
    settings = AllocatorSettings.parse(text or "")
    if text and on_cpu:
        raise ConfigError(Problem("--alloc-conf", text, "means nothing on a CPU", "leave it out"))
    if settings.garbage_collection_threshold:
        rule = "sets garbage_collection_threshold, which torch looks at only under a memory fraction"
        raise ConfigError(Problem("--alloc-conf", text, rule, "leave it out"))
    return settings


def _configuration(
    ctx: click.Context, config: Path | None, given: dict[str, Any], device: str
) -> tuple[Shape, StepConfig]:
    """Shape and step from the file, overridden by the flags that were really given; all problems in one error."""
    shape_values: dict[str, Any] = {n: given[n] for n in Shape.__dataclass_fields__}
    step_values: dict[str, Any] = {"device": device}
    if config is not None:
        from ..runconfig import RunConfig

        loaded = RunConfig.load(config)
        explicit = {n for n in shape_values if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE}
        shape_values = {n: given[n] if n in explicit else getattr(loaded.model, n) for n in shape_values}
        step_values = loaded.step.model_dump() | ({} if given["gpu"] is None else step_values)
    names = {"compile_": "compile"} | {
        n: n
        for n in (
            "batch_size", "grad_accum", "dtype", "loss", "loss_chunk_tokens", "checkpointing", "optimizer", "residual",
            "workload", "dropout",
        )
    }  # fmt: skip
    if given["torch"] is not None or "torch" not in step_values:
        step_values["torch"] = torch_release(given["torch"])
    step_values |= {field: given[name] for name, field in names.items() if given[name] is not None}
    workload: Workload = step_values.get("workload", "vramplan")
    if workload != "vramplan":
        step_values.setdefault("loss", "full")
    if workload == "autocast":  # torch's default where nobody asks for fused
        step_values.setdefault("optimizer", "adamw-foreach")
    missing = [f"--{n.replace('_', '-')}" for n in ("n_layer", "n_head", "n_embd") if shape_values[n] is None]
    if step_values.get("batch_size") is None:
        missing.append("--batch-size")
    problems = [Problem(n, "missing", "is required", "or give a configuration file") for n in missing]
    step, shape = StepConfig(**step_values), Shape(**shape_values)
    problems += check_step(step) if {"--n-layer", "--n-head", "--n-embd"} & set(missing) else check(shape, step)
    if problems:
        raise ConfigError(problems)
    return shape, step
