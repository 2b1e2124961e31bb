"""What the planner answers: the user's cases, explanations, and the smallest thing that would fit."""

import json
from dataclasses import replace

import pytest

from vramplan.errors import ConfigError, DoesNotFitError
from vramplan.planner.candidates import candidates_near
from vramplan.planner.gpu import Budget, budget, find_gpu, load_gpus
from vramplan.planner.levers import largest_batch, levers
from vramplan.planner.memory import estimate
from vramplan.planner.plan import compare, make_plan, price_illegal, price_plan
from vramplan.planner.plan_file import SHAPE_FIELDS, STEP_FIELDS, read_plans, restore
from vramplan.planner.risk import needed_bytes, oom_risk
from vramplan.planner.search import Grid
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.units import GIB

CARD = find_gpu("4070")
BUDGET = budget(CARD)
SMALL = Shape(n_layer=12, n_head=12, n_embd=768)


def grid(*shapes, **settings):
    defaults = {"tokens_per_step": 524288, "dtypes": ("bfloat16",), "compiles": (True, False)}
    return Grid(shapes=shapes or (SMALL,), **(defaults | settings))


@pytest.fixture(scope="module")
def plans():
    shapes = tuple(candidates_near(125_000_000, 0.05, SMALL)[:6])
    return make_plan(grid(*shapes), CARD, BUDGET, target_parameters=125_000_000)


def test_125m_is_gpt2_small_first(plans):
    assert (plans.plans[0].shape.n_layer, plans.plans[0].shape.n_head, plans.plans[0].shape.n_embd) == (12, 12, 768)


def test_plans_are_ordered_by_tokens_per_second_and_all_fit(plans):
    rates = [p.tokens_per_second for p in plans.plans]
    assert rates == sorted(rates, reverse=True)
    for plan in plans.plans:
        assert plan.needs_bytes <= BUDGET.budget_bytes
        assert plan.oom_risk.probability <= 0.01
        assert plan.step.optimizer == "adamw-fused"


def test_the_failing_configuration_of_note_004_is_never_proposed():
    shape = Shape(n_layer=12, n_head=12, n_embd=576)
    desktop = Budget(total_bytes=int(8.29 * GIB), reserve_bytes=0)
    found = make_plan(grid(shape), CARD, desktop, top=20)
    for plan in found.plans:
        assert plan.step.batch_size * plan.step.grad_accum == 512
        assert plan.estimate.process_bytes < desktop.budget_bytes
        assert not (plan.step.batch_size == 16 and plan.step.loss == "full" and not plan.step.compile)


def test_eight_bit_states_only_when_nothing_else_fits():
    big = Shape(n_layer=48, n_head=25, n_embd=1600)
    roomy = make_plan(grid(big), CARD, Budget(total_bytes=40 * GIB, reserve_bytes=0), top=1).plans[0]
    assert roomy.step.optimizer == "adamw-fused"
    need = estimate(big, replace(roomy.step, batch_size=1, grad_accum=512, checkpointing="block", compile=False), CARD)
    tight = make_plan(
        grid(big), CARD, Budget(total_bytes=int(need.process_bytes * 0.75), reserve_bytes=0), top=1
    ).plans[0]
    assert tight.step.optimizer == "adamw8bit"


def test_nothing_fits_names_the_smallest_that_would_and_a_smaller_model():
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(grid(Shape(n_layer=32, n_head=32, n_embd=4096)), CARD, BUDGET)
    assert caught.value.exit_code == 3
    assert "needs at least" in str(caught.value)
    assert "GiB" in str(caught.value)
    assert "largest published shape that fits" in str(caught.value)


def test_states_in_host_memory_are_named_where_they_make_it_fit():
    shape = Shape(n_layer=24, n_head=16, n_embd=1024)
    budget = Budget(total_bytes=4 * GIB, reserve_bytes=0)
    usual = replace(grid(shape), optimizers=("adamw-fused", "adamw8bit"))
    with pytest.raises(DoesNotFitError, match="--optimizer adamw-offload it fits"):
        make_plan(usual, None, budget)
    assert make_plan(replace(usual, optimizers=("adamw-offload",)), None, budget).plans
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(usual, None, Budget(total_bytes=2 * GIB, reserve_bytes=0))
    assert "adamw-offload" not in str(caught.value)


def test_the_smallest_need_that_is_named_really_fits():
    shape = Shape(n_layer=24, n_head=16, n_embd=1024)
    with pytest.raises(DoesNotFitError) as caught:
        make_plan(grid(shape), CARD, Budget(total_bytes=2 * GIB, reserve_bytes=0))
    need = float(str(caught.value).split("at least ")[1].split(" GiB")[0])
    assert make_plan(grid(shape), CARD, Budget(total_bytes=int((need + 0.01) * GIB), reserve_bytes=0), top=1).plans


def test_fastest_shape_lets_speed_decide():
    shapes = tuple(candidates_near(125_000_000, 0.05, SMALL)[:8])
    found = make_plan(grid(*shapes), CARD, BUDGET, fastest_shape=True, top=1)
    settled = make_plan(grid(*shapes), CARD, BUDGET, top=1)
    assert found.plans[0].tokens_per_second >= settled.plans[0].tokens_per_second


def test_reasons_say_what_differs_and_what_it_costs(plans):
    second = plans.plans[1]
    assert "slower" in second.reason
    assert "GiB" in second.reason
    assert compare(plans.plans[0], plans.plans[0], CARD).endswith("the same settings")


def test_json_keeps_its_published_keys_and_reads_back(plans, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plans.as_dict()))
    data, configs = read_plans(path)
    assert {"plans", "budget_bytes", "considered", "seconds"} <= set(data)
    entry = data["plans"][0]
    assert {"rank", "config", "estimate", "tokens_per_second", "mfu", "oom_risk", "reason"} <= set(entry)
    assert set(entry["config"]) == set(SHAPE_FIELDS) | set(STEP_FIELDS)
    assert configs[0] == (plans.plans[0].shape, plans.plans[0].step) == restore(entry)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"plans": []}', '{"plans": [{"config": {}}]}', "not json"])
def test_a_damaged_plan_file_is_one_clear_error(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="plan"):
        read_plans(path)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("token_budget", None, "token_budget"),
        ("budget_bytes", "abc", "budget_bytes"),
        ("max_risk", 2.0, "max_risk"),
        ("schema", 99, "schema"),
        ("gpu", 4070, "gpu"),
        ("plans.0.estimate", None, "estimate"),
        ("plans.0.estimate.process_bytes", "x", "process_bytes"),
        ("plans.0.config.batch_size", "x", "batch_size"),
        ("plans.0.config.batch_size", -4, "at least 1"),
        ("plans.0.config.n_head", 0, "at least 1"),
        ("plans.0.config.n_head", 7, "is not divisible by n_head=7"),
        ("plans.0.config.n_layer", 1e99, "n_layer"),
        ("plans.0.config.compile", 1, "compile"),
        ("plans.0.config.dtype", "bf16", "bfloat16"),
    ],
)
def test_every_damage_to_a_plan_file_is_named(plans, tmp_path, where, value, words):
    data = json.loads(json.dumps(plans.as_dict()))
    *path, last = where.split(".")
    inner = data
    for key in path:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=words):
        read_plans(file)


def test_notes_warn_of_a_size_far_from_the_target_and_of_odd_proportions():
    note_003 = Shape(n_layer=12, n_head=12, n_embd=384)
    found = make_plan(grid(note_003), CARD, BUDGET, top=1, target_parameters=125_000_000)
    assert "41.0M parameters, far from the 125.0M asked for" in found.notes[0]
    assert "head_dim 32" in found.notes[1]
    assert make_plan(grid(SMALL), CARD, BUDGET, top=1, target_parameters=125_000_000).notes == ()


def test_mfu_never_exceeds_what_the_card_can_do():
    for card in load_gpus():
        dtypes = ("bfloat16", "float16", "float32") if card.supports_bf16 else ("float16", "float32")
        for dtype in dtypes:
            for workload in ("vramplan", "nanogpt"):
                step = StepConfig(
                    batch_size=16, grad_accum=32, dtype=dtype, loss="full", compile=True, workload=workload
                )
                plan = price_plan(1, estimate(SMALL, step, card), card, BUDGET.budget_bytes, 0.01)
                assert 0 < plan.mfu < 1, (card.name, dtype, workload)


def test_an_illegal_width_lists_neighbours_with_memory_and_speed():
    asked = Shape(n_layer=12, n_head=12, n_embd=512)
    text = str(price_illegal(asked, lambda s: grid(s), CARD, BUDGET, 0.01))
    assert text.startswith("n_embd=512 is not divisible by n_head=12")
    order = [text.index(f"n_embd={w} n_head={n}:") for w, n in ((512, 8), (512, 16), (768, 12), (480, 12), (576, 12))]
    assert order == sorted(order)
    for words in ("head_dim 42, not a multiple of 8", "64.0M parameters", "124.4M", "tokens/s", "GiB at batch_size="):
        assert words in text


def test_risk_falls_with_headroom_and_needed_bytes_is_where_it_meets_the_limit():
    step = StepConfig(batch_size=8)
    risks = [oom_risk(10 * GIB, int(b * GIB), step).probability for b in (9, 10, 10.1, 10.5)]
    assert risks == sorted(risks, reverse=True)
    assert risks[1] == pytest.approx(0.5)
    for limit in (0.001, 0.01, 0.1):
        need = needed_bytes(10 * GIB, step, limit)
        assert oom_risk(10 * GIB, int(need), step).probability == pytest.approx(limit, rel=1e-3)
    assert needed_bytes(10 * GIB, replace(step, compile=True), 0.01) > needed_bytes(10 * GIB, step, 0.01)


def test_levers_save_what_their_own_estimate_says():
    step = StepConfig(batch_size=16, grad_accum=32, loss="full")
    full = estimate(SMALL, step, CARD)
    found, base = levers(full, CARD, BUDGET.budget_bytes, 0.01), full.process_bytes
    for lever in found:
        assert estimate(lever.shape, lever.step, CARD).process_bytes == lever.process_bytes == base - lever.saved_bytes
        total = lever.shape.block_size * lever.step.batch_size * lever.step.grad_accum
        assert total == 524288
    by_name = {lever.name: lever for lever in found}
    assert by_name["chunked loss"].saved_bytes > 5 * GIB
    assert abs(by_name["float16 (the same two bytes)"].saved_bytes) < 4096
    assert by_name["activation checkpointing"].speed_ratio < 1


def test_largest_batch_fits_and_the_next_does_not():
    step = StepConfig(batch_size=1, grad_accum=512)
    best = largest_batch(SMALL, step, CARD, BUDGET.budget_bytes, 0.01)

    def need(b):
        full = estimate(SMALL, replace(step, batch_size=b, grad_accum=512 // b), CARD)
        return needed_bytes(full.process_bytes, step, 0.01)

    assert need(best) <= BUDGET.budget_bytes < need(best * 2)
    assert largest_batch(SMALL, step, CARD, GIB, 0.01) == 0
