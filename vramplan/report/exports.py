"""A plan as a file that a trainer reads: our run configuration, or nanoGPT's config/*.py."""

from __future__ import annotations

from typing import Any

from .. import __version__
from ..errors import ConfigError, Problem
from ..planner.plan import PlanSet, nanogpt_plan
from ..planner.plan_file import restore
from ..planner.shape import PADDED_GPT2_VOCAB, TOKENS_PER_PARAMETER, Shape
from ..planner.step import StepConfig, tokens_per_step
from ..runconfig import RunConfig, TrainSection, suggested_training
from ..units import count, gib


def run_config(data: dict[str, Any], rank: int, max_steps: int | None = None) -> RunConfig:
    """The run configuration of one plan of a plan file (as :func:`planner.plan.read_plans` returns it)."""
    shape, step = restore(data["plans"][rank - 1])
    return new_run(shape, step, _plan_section(data, rank), data["token_budget"], max_steps)


def new_run(
    shape: Shape, step: StepConfig, plan: dict[str, Any], token_budget: int | None = None, max_steps: int | None = None
) -> RunConfig:
    """The configuration of a run with the usual training settings; ``plan`` is its ``[plan]``."""
    parameters = int(shape.parameters)
    tokens = token_budget or TOKENS_PER_PARAMETER * parameters
    train = suggested_training(parameters, int(tokens_per_step(shape, step)), tokens, max_steps)
    if step.optimizer == "adamw-in-backward":
        train["grad_clip"] = 0.0
    known = {name: value for name, value in plan.items() if value is not None}
    return RunConfig.build(shape, step, train=train, plan=known)


def refitted(config: RunConfig, plans: PlanSet) -> RunConfig:
    """``config`` with its steps run as the best of ``plans`` says."""
    best = plans.plans[0]
    section = _plan_section(plans.as_dict(), 1) | {"target_parameters": config.plan.target_parameters}
    return with_step(config, best.shape, best.step, section)


def with_step(config: RunConfig, shape: Shape, step: StepConfig, plan: dict[str, Any]) -> RunConfig:
    """``config`` with another shape or step; evaluation covers no less text than before."""
    train = config.train.model_dump(exclude_none=True)
    blocks = config.train.eval_batches * config.step.batch_size
    train["eval_batches"] = -(-blocks // int(step.batch_size))
    known = {k: v for k, v in plan.items() if v is not None}
    return RunConfig.build(shape, step, train=train, data=config.data.model_dump(), plan=known)


def _plan_section(data: dict[str, Any], rank: int) -> dict[str, Any]:
    """``[plan]``: what was expected of a plan, and of which card; without what is not known."""
    entry = data["plans"][rank - 1]
    return {
        "gpu": data["gpu"],
        "total_bytes": data["total_bytes"],
        "budget_bytes": data["budget_bytes"],
        "process_bytes": entry["estimate"]["process_bytes"],
        "peak_allocated_bytes": entry["estimate"]["peak_allocated_bytes"],
        "tokens_per_second": entry["tokens_per_second"],
        "oom_risk": entry["oom_risk"],
        "max_risk": data["max_risk"],
        "target_parameters": data["target_parameters"],
        "version": __version__,
    }


def nanogpt_config(data: dict[str, Any], shape: Shape, step: StepConfig, max_steps: int | None = None) -> str:
    """Text of a file that nanoGPT's configurator executes: plain assignments of its own names.

    nanoGPT takes the vocabulary from the data set's meta.pkl, else 50304; another one is said in a comment.
    """
    if shape.variant:
        rule = f"has no {', no '.join(shape.variant)}"
        raise ConfigError(Problem("--format", "nanogpt", rule, "plan GPT-2's layout, or use --format toml"))
    plan = nanogpt_plan(data, shape, step)
    tokens = int(tokens_per_step(shape, step))
    training = TrainSection(**suggested_training(int(shape.parameters), tokens, data["token_budget"], max_steps))
    steps = max_steps or -(-data["token_budget"] // tokens)
    where = data["gpu"] or "this machine"
    lines = [
        f"# {plan.shape.label}, {count(plan.shape.parameters)} parameters.",
        f"# Planned by vramplan {__version__} for {where}.",
        f"# nanoGPT is expected to need {gib(plan.estimate.process_bytes)} of {gib(data['budget_bytes'])}.",
    ]
    if shape.vocab_size != PADDED_GPT2_VOCAB:
        lines.append(f"# Priced with nanoGPT's {PADDED_GPT2_VOCAB} tokens; {shape.vocab_size} must come from meta.pkl.")
    if not shape.tied:
        lines.append("# nanoGPT always ties the head; the untied head of the plan is not used.")
    if plan.step.batch_size != step.batch_size:
        lines.append(f"# The plan's batch_size {step.batch_size} is for our trainer; nanoGPT's memory allows this one.")
    values: dict[str, Any] = {
        "batch_size": plan.step.batch_size,
        "gradient_accumulation_steps": plan.step.grad_accum,
        "block_size": shape.block_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "dropout": 0.0,
        "bias": shape.bias,
        "learning_rate": training.learning_rate,
        "min_lr": training.min_learning_rate,
        "warmup_iters": training.warmup_steps,
        "max_iters": steps,
        "lr_decay_iters": steps,
        "weight_decay": training.weight_decay,
        "beta1": training.beta1,
        "beta2": training.beta2,
        "grad_clip": training.grad_clip,
        "dtype": plan.step.dtype,
        "compile": plan.step.compile,
        "device": plan.step.device,
    }
    return "\n".join([*lines, *(f"{name} = {value!r}" for name, value in values.items())]) + "\n"
