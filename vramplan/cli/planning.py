"""``plan``, ``apply`` and ``gpus``."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import rich_click as click

from ..device import live_gpu
from ..errors import Collector, ConfigError, DoesNotFitError, Problem, command
from ..files import write_text
from ..planner.candidates import settle_shapes
from ..planner.gpu import find_gpu, load_gpus
from ..planner.plan import Plan, PlanSet, make_plan, price_illegal
from ..planner.plan_file import read_plans
from ..planner.search import LOSS_CHUNKS, Grid, check_tokens_per_step
from ..planner.shape import Shape, check_shape
from ..planner.step import (
    Checkpointing,
    Optimizer,
    StepConfig,
    check,
)
from .options import (
    Count,
    FilePath,
    Share,
    Target,
    card_options,
    choice,
    options,
    refused,
    resolve_target,
    shape_options,
    torch_option,
    torch_release,
)

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
        "--dtype", type=choice("dtype", ("auto",)), default="auto", show_default=True,
        help="Of products and activations.",
    ),
    click.option(
        "--compile", "compile_", type=click.Choice(["auto", "on", "off"]), is_flag=False, flag_value="on",
        default="auto", show_default=True, help="torch.compile.",
    ),
    click.option("--no-compile", is_flag=True, help="The same as --compile off."),
    click.option(
        "--loss", type=choice("loss", ("auto",)), default="auto", show_default=True,
        help="Over all logits at once, or in slices.",
    ),
    click.option(
        "--checkpointing", type=choice("checkpointing", ("auto",)), default="auto", show_default=True,
        help="Recompute activations in the backward: of whole blocks, or what is cheap.",
    ),
    click.option(
        "--optimizer", type=choice("optimizer", ("auto",)), default="auto", show_default=True,
        help="8-bit states are taken only when nothing else fits.",
    ),
    click.option(
        "--residual", type=choice("residual"), default="compute", show_default=True,
        help="Dtype of the residual stream: that of the activations, or float32.",
    ),
    click.option(
        "--workload", type=choice("workload"), default="vramplan", show_default=True,
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
@click.option(
    "--confirm/--no-confirm", default=None,
    help="Run the best plans for a few steps until one holds. [default: with --train, where the card is]",
)  # fmt: skip
@click.option("--train", "start", is_flag=True, help="Start the trainer on the best plan.")
@click.option("--data", metavar="FILE|DIR|GLOB", help="With --train: the Parquet files.")
@click.option("--out", type=FilePath(), help="With --train: the run directory.")
@click.option("--max-steps", type=click.IntRange(1), help="With --train: stop after so many optimizer steps.")
def plan(
    as_json: bool,
    output: Path | None,
    confirm: bool | None,
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
    if confirm is None:
        confirm = start and target.device == "cuda" and live_gpu() is not None
    confirmation = confirmed(plans) if confirm else None
    found = plans.as_dict() | ({"confirmation": confirmation.as_dict()} if confirmation else {})
    if output is not None:
        write_text(output, json.dumps(found, indent=1) + "\n", "--output")
    if as_json:
        click.echo(json.dumps(found))
    else:
        from ..report.plans import print_plans

        asked = search["no_compile"] or search["compile_"] != "auto"
        notes = (*target.notes, *assumed, *(() if asked else (target.compile_note,)))
        print_plans(plans, notes, saved_as=output, goes_on=start)
        if confirmation is not None:
            from ..report.probes import print_confirmation

            print_confirmation(confirmation, str(output or "plan.json"))
    if confirmation is not None and confirmation.rank is None:
        raise SystemExit(DoesNotFitError.exit_code)
    if start and data is not None and out is not None:
        from .training import start_training

        best = confirmation.rank if confirmation is not None and confirmation.rank else 1
        config = config_of(plans.plans[best - 1], plans, max_steps)
        start_training(config, data, out, resume=False, replan=None, to_stderr=as_json)


def confirmed(plans: PlanSet) -> Any:
    """Real passes: of the plans themselves where they can run, else of the best one's small stand-in on the CPU."""
    from ..memory_probe.confirm import confirm_here, confirm_in_small
    from ..memory_probe.probe import INTERRUPTED, probe
    from .probing import keep, progress

    best, budget, doing = plans.plans[0], plans.budget.budget_bytes, progress()
    here = best.step.device == "cpu" or live_gpu() is not None

    def run(shape: Shape, step: StepConfig) -> Any:
        cap = budget if here and step.device == "cuda" else None  # as on the card that was planned for
        found = probe(shape, step, steps=3, cap_bytes=cap, doing=doing)
        if found.reason == INTERRUPTED:
            raise KeyboardInterrupt
        keep(None, [found])
        return found

    if here:
        return confirm_here(plans.plans, budget, run, _another_card(plans))
    if best.step.workload != "vramplan":
        rule = "is another script's memory, which only the card can confirm"
        raise ConfigError(Problem("--confirm", best.step.workload, rule, "leave it out"))
    return confirm_in_small(best, run)


def _another_card(plans: PlanSet) -> tuple[str, ...]:
    """What the card here cannot show of the one that was planned for."""
    from ..memory_probe.probe import card_of

    live = live_gpu()
    if plans.plans[0].step.device == "cpu" or live is None or plans.gpu is None:
        return ()
    here = card_of(live)
    if here is not None and here.name == plans.gpu.name:
        return ()
    return (f"that an {plans.gpu.name} needs what this {live.name} did: its kernels and context are others",)


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
    gc.disable()  # hundreds of thousands of short-lived tuples, no cycles: looking for some takes a tenth of the time
    try:
        plans = make_plan(
            grid, target.gpu, target.budget, max_risk=search["max_risk"], top=search["top"],
            fastest_shape=search["shape_rule"] == "fastest", target_parameters=search["params"],
            token_budget=search["token_budget"],
        )  # fmt: skip
    finally:
        gc.enable()
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
        residual=search["residual"],
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
