"""Parameters equal a direct count, illegal shapes get good advice, and 125M means 12/12/768."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.planner.candidates import PUBLISHED, candidates_near, conventional, published_name
from vramplan.planner.shape import Shape, awkward, check_shape, describe_alternatives, legal_neighbours

LIKE = Shape(n_layer=1, n_head=1, n_embd=64)
INDIVISIBLE = Shape(n_layer=12, n_head=12, n_embd=512)

shapes = st.builds(
    lambda heads, head_dim, **rest: Shape(n_head=heads, n_embd=heads * head_dim, **rest),
    heads=st.integers(1, 32),
    head_dim=st.integers(1, 128),
    n_layer=st.integers(1, 60),
    vocab_size=st.integers(1, 100_000),
    block_size=st.integers(1, 8192),
    bias=st.booleans(),
    tied=st.booleans(),
)


def tensors(shape: Shape) -> list[tuple[int, ...]]:
    """Every weight and bias of a GPT-2, written down one by one."""
    h, found = shape.n_embd, []

    def linear(n_in: int, n_out: int) -> None:
        found.append((n_out, n_in))
        found.extend([(n_out,)] if shape.bias else [])

    def norm() -> None:
        found.extend([(h,), (h,)] if shape.bias else [(h,)])

    found += [(shape.vocab_size, h), (shape.block_size, h)]
    for _ in range(shape.n_layer):
        norm()
        linear(h, 3 * h)
        linear(h, h)
        norm()
        linear(h, 4 * h)
        linear(4 * h, h)
    norm()
    if not shape.tied:
        found.append((shape.vocab_size, h))
    return found


@settings(deadline=None)
@given(shapes)
def test_parameters_equal_a_count_tensor_by_tensor(shape: Shape) -> None:
    assert shape.parameters == sum(int(np.prod(t, dtype=object)) for t in tensors(shape))


@settings(deadline=None)
@given(shapes)
def test_matmul_parameters_are_the_matrices_without_the_lookups(shape: Shape) -> None:
    tied_head = shape.vocab_size * shape.n_embd if shape.tied else 0
    matrices = sum(t[0] * t[1] for t in tensors(shape) if len(t) == 2) - shape.embedding_parameters + tied_head
    assert shape.matmul_parameters == matrices


@pytest.mark.parametrize(
    ("layers", "heads", "width", "millions"),
    [(12, 12, 576, 77.4), (12, 12, 720, 111.6), (12, 12, 480, 57.8), (12, 8, 512, 64.0), (12, 12, 768, 124.4),
     (12, 12, 384, 41.0)],
)  # fmt: skip
def test_true_sizes(layers: int, heads: int, width: int, millions: float) -> None:
    shape = Shape(n_layer=layers, n_head=heads, n_embd=width)
    assert round(shape.parameters / 1e6, 1) == millions
    assert shape.label == f"{layers}L/{heads}H/{width}E"


def test_published_gpt2_counts_with_its_own_vocabulary_and_biases() -> None:
    sizes = {(12, 12, 768): 124_439_808, (24, 16, 1024): 354_823_168, (36, 20, 1280): 774_030_080,
             (48, 25, 1600): 1_557_611_200}  # fmt: skip
    for (layers, heads, width), parameters in sizes.items():
        shape = Shape(n_layer=layers, n_head=heads, n_embd=width, vocab_size=50257, bias=True)
        assert shape.parameters == parameters


def test_formulas_take_arrays() -> None:
    widths = np.array([384, 576, 768])
    together = Shape(n_layer=12, n_head=12, n_embd=widths)
    for i, width in enumerate(widths):
        one = Shape(n_layer=12, n_head=12, n_embd=int(width))
        assert together.parameters[i] == one.parameters
        assert together.flops_per_token[i] == one.flops_per_token


def test_flops_per_token_are_six_per_parameter_without_positions_plus_attention() -> None:
    shape = Shape(n_layer=12, n_head=12, n_embd=768)
    assert shape.flops_per_token == 6 * (124_373_760 - 1024 * 768) + 12 * 12 * 768 * 1024


# ---------------------------------------------------------------- legality


def test_legal_shapes_have_no_problems() -> None:
    assert check_shape(Shape(n_layer=12, n_head=12, n_embd=768)) == []


def test_twelve_heads_on_512_get_good_choices_first_and_awkward_ones_named() -> None:
    (problem,) = check_shape(INDIVISIBLE)
    assert str(problem).startswith("n_embd=512 is not divisible by n_head=12: use n_embd=512 with n_head=8")
    assert [(s.n_head, s.n_embd) for s in legal_neighbours(INDIVISIBLE)] == [
        (8, 512), (16, 512), (12, 768), (12, 480), (12, 576), (12, 504), (12, 516),
    ]  # fmt: skip
    words = describe_alternatives(INDIVISIBLE)
    assert words[0] == "n_embd=512 with n_head=8 (head_dim 64, 64.0M parameters)"
    assert [("pads" in text) for text in words] == [False] * 5 + [True] * 2


@settings(deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 3000),
    st.integers(1, 48),
)
def test_every_alternative_is_legal_and_keeps_everything_else(heads: int, width: int, layers: int) -> None:
    shape = Shape(n_layer=layers, n_head=heads, n_embd=width, vocab_size=4096, bias=True, tied=False)
    problems = check_shape(shape)
    if width % heads == 0:
        assert problems == []
        return
    offered = legal_neighbours(shape)
    assert offered
    assert len(set(offered)) == len(offered)
    for other in offered:
        assert check_shape(other) == []
        assert replace(other, n_head=heads, n_embd=width) == shape


def test_a_slip_of_the_finger_does_not_hang() -> None:
    started = time.monotonic()
    check_shape(Shape(n_layer=12, n_head=12, n_embd=10**10 + 19))
    assert time.monotonic() - started < 2


def test_sizes_below_one_are_all_named_and_nothing_is_divided_by_zero() -> None:
    problems = check_shape(Shape(n_layer=0, n_head=0, n_embd=-64, vocab_size=0, block_size=0))
    assert [p.field for p in problems] == ["n_layer", "n_head", "n_embd", "vocab_size", "block_size"]


@pytest.mark.parametrize(("head_dim", "padded"), [(64, False), (48, False), (40, False), (60, True), (42, True)])
def test_head_widths_that_attention_pads_are_said(head_dim: int, padded: bool) -> None:
    assert bool(awkward(head_dim)) is padded


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("target", [124_000_000, 125_000_000, 126_000_000])
def test_125m_means_gpt2_small(target: int) -> None:
    best = candidates_near(target, 0.05, LIKE)[0]
    assert best.label == "12L/12H/768E"


def test_350m_means_gpt2_medium() -> None:
    assert candidates_near(350_000_000, 0.05, LIKE)[0].label == "24L/16H/1024E"


def test_576_wide_is_never_offered_as_125m() -> None:
    assert not [s for s in candidates_near(125_000_000, 0.05, LIKE) if s.n_embd == 576 and s.n_layer == 12]


@settings(deadline=None, max_examples=30)
@given(st.integers(5_000_000, 3_000_000_000), st.floats(0.005, 0.2))
def test_candidates_are_legal_within_tolerance_and_unusual_ones_last(target: int, tolerance: float) -> None:
    found = candidates_near(target, tolerance, LIKE)
    assert len(set(found)) == len(found)
    for shape in found:
        assert check_shape(shape) == []
        assert abs(shape.parameters - target) <= tolerance * target * (1 + 1e-9)
        assert shape.head_dim in (64, 128) or published_name(shape)
    usual = [conventional(s) for s in found]
    assert usual == sorted(usual, reverse=True)


def test_a_wider_tolerance_only_adds() -> None:
    narrow, wide = (set(candidates_near(125_000_000, t, LIKE)) for t in (0.02, 0.1))
    assert narrow < wide


def test_candidates_keep_vocabulary_block_biases_and_tying() -> None:
    like = Shape(n_layer=1, n_head=1, n_embd=64, vocab_size=32_000, block_size=256, bias=True, tied=False)
    for shape in candidates_near(125_000_000, 0.05, like):
        assert (shape.vocab_size, shape.block_size, shape.bias, shape.tied) == (32_000, 256, True, False)


def test_nothing_is_found_where_nothing_is() -> None:
    assert candidates_near(1000, 0.05, LIKE) == []


def test_published_shapes_are_conventional_and_odd_ones_are_not() -> None:
    for p in PUBLISHED:
        shape = Shape(n_layer=p.n_layer, n_head=p.n_head, n_embd=p.n_embd)
        assert conventional(shape)
        assert published_name(shape) == p.name
    for odd in ((12, 12, 576), (12, 12, 720), (2, 12, 768), (60, 6, 384)):
        layers, heads, width = odd
        assert not conventional(Shape(n_layer=layers, n_head=heads, n_embd=width))
