"""``plan``, ``apply``, ``estimate`` and ``gpus``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import rich_click as click
from click.core import ParameterSource

from ..errors import Collector, ConfigError, Problem, command
from ..files import write_text
from ..planner.allocator_settings import AllocatorSettings
from ..planner.gpu import find_gpu, load_gpus
from ..planner.memory import estimate as estimate_memory
from ..planner.plan import Plan, PlanSet, make_plan, price_illegal, price_plan, read_plans
from ..planner.repair import smallest_repair
from ..planner.search import LOSS_CHUNKS, Grid, check_tokens_per_step
from ..planner.shape import Shape, check_shape, settle_shapes
from ..planner.step import (
    CHOICES,
    DEFAULT_LOSS_CHUNK,
    Checkpointing,
    Optimizer,
    StepConfig,
    Workload,
    check,
    check_step,
)
from .options import (
    Count,
    FilePath,
    Share,
    Target,
    card_options,
    is_cpu,
    options,
    refused,
    resolve_target,
    shape_options,
    torch_option,
    torch_release,
    with_measured,
)


def _choice(name: str, extra: tuple[str, ...] = ()) -> click.Choice[str]:
    return click.Choice([*extra, *CHOICES[name]])


search_options = options(
    click.option("--params", type=Count(), help="Target size, such as 125M; the nearest usual shape is taken."),
    click.option("--tolerance", type=Share(), default="5%", show_default=True, help="How far from --params."),
    click.option(
        "--shape", "shape_rule", type=click.Choice(["nearest", "fastest"]), default="nearest", show_default=True,
        help="Settle the shape by closeness to --params, or let speed decide.",
    ),
    click.option("--tokens-per-step", type=Count(), default="524288", show_default=True, help="Kept exactly."),
    click.option("--batch-size", type=int, help="Pin the micro-batch (sequences)."),
    click.option(
        "--dtype", type=_choice("dtype", ("auto",)), default="auto", show_default=True,
        help="Of products and activations.",
    ),
    click.option(
        "--compile", "compile_", type=click.Choice(["auto", "on", "off"]), is_flag=False, flag_value="on",
        default="auto", show_default=True, help="torch.compile.",
    ),
    click.option("--no-compile", is_flag=True, help="The same as --compile off."),
    click.option(
        "--loss", type=_choice("loss", ("auto",)), default="auto", show_default=True,
        help="Over all logits at once, or in slices.",
    ),
    click.option(
        "--checkpointing", type=_choice("checkpointing", ("auto",)), default="auto", show_default=True,
        help="Recompute activations in the backward: of whole blocks, or what is cheap.",
    ),
    click.option(
        "--optimizer", type=_choice("optimizer", ("auto",)), default="auto", show_default=True,
        help="8-bit states are taken only when nothing else fits.",
    ),
    click.option(
        "--workload", type=_choice("workload"), default="vramplan", show_default=True,
        help="Whose memory: our trainer, nanoGPT's train.py, the usual autocast loop, or one all in one dtype.",
    ),
    torch_option,
    click.option("--token-budget", type=Count(), help="Tokens to train on. [default: 20 per parameter]"),
    click.option("--top", type=click.IntRange(1, 50), default=5, show_default=True, help="Plans to show."),
)  # fmt: skip


@click.command()
@card_options(default="auto")
@search_options
@shape_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("-o", "--output", type=FilePath(), help="Write the plans to FILE (JSON).")
@click.option("--train", "start", is_flag=True, help="Start the trainer on the best plan.")
@click.option("--data", metavar="FILE|DIR|GLOB", help="With --train: the Parquet files.")
@click.option("--out", type=FilePath(), help="With --train: the run directory.")
@click.option("--max-steps", type=click.IntRange(1), help="With --train: stop after so many optimizer steps.")
def plan(
    as_json: bool,
    output: Path | None,
    start: bool,
    data: str | None,
    out: Path | None,
    max_steps: int | None,
    **search: Any,
) -> None:
    """Search what fits a card, and rank it by expected tokens/s.

    \b
    vramplan plan --gpu 4070 --params 125M
    vramplan plan --gpu auto --params 350M --tokens-per-step 262144 -o plan.json
    vramplan plan --gpu auto --params 125M --train --data fineweb.parquet --out runs/first
    """
    collect = refused()
    for name, value in (("--data", data), ("--out", out), ("--max-steps", max_steps)):
        if value is not None and not start:
            collect.problems.append(Problem(name, str(value), "means nothing without --train"))
        if value is None and start and name != "--max-steps":
            collect.problems.append(Problem(name, "missing", "is required with --train"))
    if start and search["workload"] != "vramplan":
        rule = "is another script's memory: --train starts this trainer"
        collect.problems.append(Problem("--workload", search["workload"], rule, "leave out one of them"))
    if any(problem.field == "--tokens-per-step" for problem in collect.problems):
        search["tokens_per_step"] = 512 * search["block_size"]  # any that is legal: one problem is enough
    target, assumed, plans = search_plans(search, collect)
    if output is not None:
        write_text(output, json.dumps(plans.as_dict(), indent=1) + "\n", "--output")
    if as_json:
        click.echo(json.dumps(plans.as_dict()))
    else:
        from ..report.plans import print_plans

        asked = search["no_compile"] or search["compile_"] != "auto"
        notes = (*target.notes, *assumed, *(() if asked else (target.compile_note,)))
        print_plans(plans, notes, saved_as=output, goes_on=start)
    if start and data is not None and out is not None:
        from .training import start_training

        config = config_of(plans.plans[0], plans, max_steps)
        start_training(config, data, out, resume=False, replan=None, to_stderr=as_json)


def search_plans(search: dict[str, Any], collect: Collector) -> tuple[Target, list[str], PlanSet]:
    """Where to plan for, what was assumed, and what was found; every problem of the request in one error."""
    target = None
    with collect:
        target = resolve_target(search["gpu"], search["vram"], search["reserve"], search["headless"])
    if search["no_compile"] and search["compile_"] == "on":
        collect.problems.append(Problem("--no-compile", "given", "contradicts --compile on", "leave one of them out"))
    if search["batch_size"] is not None and search["batch_size"] < 1:
        collect.problems.append(Problem("--batch-size", search["batch_size"], "must be at least 1"))
    rest = {n: search[n] for n in Shape.__dataclass_fields__ if n not in ("n_layer", "n_head", "n_embd")}
    like = Shape(n_layer=1, n_head=max(1, search["n_kv_head"]), n_embd=64 * max(1, search["n_kv_head"]), **rest)
    outer = check_shape(like)
    collect.problems += outer
    if search["block_size"] > 0:
        with collect:
            check_tokens_per_step(search["tokens_per_step"], search["block_size"])
    stated = {n: search[n] for n in ("n_layer", "n_head", "n_embd") if search[n] is not None}
    asked = replace(like, **{"n_layer": 12, **stated})
    indivisible = len(stated.keys() - {"n_layer"}) == 2 and {p.field for p in check_shape(asked)} == {"n_embd"}
    if indivisible and target is not None and not collect.problems and asked.n_embd > 0:
        found: Target = target
        raise ConfigError(
            price_illegal(asked, lambda s: _grid(found, search, (s,)), target.gpu, target.budget, search["max_risk"])
        )
    shapes: tuple[Shape, ...] = ()
    assumed: list[str] = []
    with collect:
        if not outer:
            shapes, assumed = settle_shapes(search["params"], search["tolerance"], stated, like)
        else:
            collect.problems += [p for p in check_shape(replace(asked, vocab_size=1, block_size=1)) if stated]
    if target is not None and shapes:
        with collect:
            grid = _grid(target, search, shapes)
    if collect.problems or target is None:
        raise collect.error()
    plans = make_plan(
        grid, target.gpu, target.budget, max_risk=search["max_risk"], top=search["top"],
        fastest_shape=search["shape_rule"] == "fastest", target_parameters=search["params"],
        token_budget=search["token_budget"],
    )  # fmt: skip
    return target, assumed, plans


def _grid(target: Target, search: dict[str, Any], shapes: tuple[Shape, ...]) -> Grid:
    ours = search["workload"] == "vramplan"
    compiled = "off" if search["no_compile"] else search["compile_"]
    optimizers: tuple[Optimizer, ...] = ("adamw-fused", "adamw8bit") if ours else ("adamw-fused",)
    if search["dtype"] == "pure-bfloat16":
        optimizers = ("adamw-stochastic",)
    grid = Grid(
        shapes=shapes,
        tokens_per_step=search["tokens_per_step"],
        dtypes=target.dtypes if search["dtype"] == "auto" else (search["dtype"],),
        compiles={"on": (True,), "off": (False,), "auto": (True, False) if target.can_compile else (False,)}[compiled],
        losses=_pinned(search["loss"], ("full", "chunked") if ours else ("full",)),
        checkpointings=_pinned(search["checkpointing"], get_args(Checkpointing) if ours else ("none",)),
        optimizers=_pinned(search["optimizer"], optimizers),
        batch_sizes=None if search["batch_size"] is None else (search["batch_size"],),
        loss_chunks=LOSS_CHUNKS,
        device=target.device,
        workload=search["workload"],
        torch=torch_release(search["torch"]),
    )
    problems = check(shapes[0], next(grid.modes(), None) or grid.first_mode())
    with (collect := Collector(problems)):
        _ = grid.batches
    problems = collect.problems
    if target.device == "cpu" and True in grid.compiles:
        problems.append(Problem("--compile", "on", "is not modelled on a CPU", "leave it out"))
    if problems:
        raise ConfigError(problems)
    return grid


def _pinned(choice: str, every: tuple[Any, ...]) -> tuple[Any, ...]:
    return every if choice == "auto" else (choice,)


# -------------------------------------------------------------------- apply


@click.command()
@click.argument("plan_file", metavar="PLAN", type=FilePath())
@click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="Which plan.")
@click.option("--format", "form", type=click.Choice(["toml", "nanogpt"]), default="toml", show_default=True)
@click.option("-o", "--output", type=FilePath(), help="File to write. [default: print]")
@click.option("--max-steps", type=click.IntRange(1), help="Optimizer steps instead of the token budget.")
def apply(plan_file: Path, rank: int, form: str, output: Path | None, max_steps: int | None) -> None:
    """Write the chosen plan as a run configuration, or as a config file for nanoGPT.

    nanoGPT has neither our loss nor our checkpointing: for it the same shape is planned again with nanoGPT's own
    memory, under the same budget.
    """
    from ..report.exports import nanogpt_config, run_config

    refused().finish()
    data, configs = read_plans(plan_file)
    if rank > len(configs):
        raise ConfigError(Problem("--rank", rank, f"is beyond the {len(configs)} plans of {plan_file}"))
    if output is not None and output.exists() and output.samefile(plan_file):
        raise ConfigError(Problem("--output", str(output), "is the plan file itself", "name another file"))
    shape, step = configs[rank - 1]
    if form == "nanogpt":
        text = nanogpt_config(data, shape, step, max_steps)
    else:
        text = run_config(data, rank, max_steps).to_toml()
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text, "--output")
        follow: tuple[object, ...] = ("vramplan", "train", output, "--data", "FILE.parquet", "--out", "RUN")
        if form == "nanogpt":
            follow = ("python", "train.py", output)
        elif step.workload != "vramplan":
            follow = ("vramplan", "estimate", output)  # another script's memory; our trainer would refuse it
        click.echo(f"Wrote {output}. Next: {command(*follow)}")


def config_of(best: Plan, plans: PlanSet, max_steps: int | None) -> Any:
    """The run configuration of one plan."""
    from ..report.exports import run_config

    return run_config(plans.as_dict(), best.rank, max_steps)


# -------------------------------------------------------------------- estimate


@click.command()
@click.argument("config", required=False, type=FilePath())
@card_options(default=None)
@shape_options
@click.option("--batch-size", type=int, help="Sequences per micro-batch.")
@click.option("--grad-accum", type=int, help="Micro-batches per optimizer step. [default: 1]")
@click.option("--dtype", type=_choice("dtype"), help="Of products and activations. [default: bfloat16]")
@click.option("--compile/--no-compile", "compile_", default=None, help="torch.compile. [default: no]")
@click.option("--loss", type=_choice("loss"), help="[default: chunked; full for the other workloads]")
@click.option("--loss-chunk-tokens", type=int, help=f"Tokens per slice. [default: {DEFAULT_LOSS_CHUNK}]")
@click.option("--checkpointing", type=_choice("checkpointing"), help="Of activations. [default: none]")
@click.option("--optimizer", type=_choice("optimizer"), help="[default: adamw-fused; adamw-foreach for autocast]")
@click.option("--workload", type=_choice("workload"), help="Whose script. [default: vramplan]")
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
    if target is not None and priced is not None and priced.oom_risk.probability > max_risk:
        repair = smallest_repair(shape, step, gpu, target.budget.budget_bytes, max_risk, settings)
    if as_json:
        result: dict[str, Any] = full.as_dict()
        if target is not None and priced is not None:
            result |= {
                "budget_bytes": target.budget.budget_bytes,
                "fits": priced.oom_risk.probability <= max_risk,
                "oom_risk": priced.oom_risk.probability,
                "oom_risk_reason": priced.oom_risk.reason,
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
            "batch_size", "grad_accum", "dtype", "loss", "loss_chunk_tokens", "checkpointing", "optimizer", "workload",
            "dropout",
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


# -------------------------------------------------------------------- gpus


@click.command()
@click.argument("name", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list.")
def gpus(name: tuple[str, ...], as_json: bool) -> None:
    """List the catalogue, or show one card with its source."""
    cards = (find_gpu(" ".join(name)),) if name else load_gpus()
    if as_json:
        from ..report.cards import card_dict

        click.echo(json.dumps([card_dict(card) for card in cards]))
        return
    from ..report.cards import print_card, print_cards

    print_card(cards[0]) if name else print_cards(cards)
