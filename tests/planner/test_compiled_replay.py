"""The compiled replay does what planner/allocator.py does, byte for byte.

Skipped where it was not compiled; VRAMPLAN_REQUIRE_COMPILED makes that a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vramplan.errors import CapExceededError
from vramplan.planner import first_steps
from vramplan.planner.allocator_settings import UNLIMITED, AllocatorSettings
from vramplan.planner.first_steps import Run, play, play_slowly
from vramplan.planner.memory import estimate, first_step_bytes, tensor_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import unroll
from vramplan.units import MIB

BLOCKS = 12
SIZES = st.one_of(
    st.just(0),
    st.integers(1, 3000),
    st.integers(MIB - 1000, MIB + 1000),
    st.integers(1, 12 * MIB),
    st.integers(10 * MIB - 600, 10 * MIB + 600),
    st.integers(10 * MIB, 70 * MIB),
)
ENTRIES = st.lists(st.tuples(SIZES, st.integers(0, BLOCKS - 1)), min_size=1, max_size=80)
"""An allocation of a living block is read as its release, so that none is ever lost."""


@pytest.fixture(autouse=True)
def compiled() -> Any:
    if not first_steps.COMPILED:
        if os.environ.get("VRAMPLAN_REQUIRE_COMPILED"):
            pytest.fail("VRAMPLAN_REQUIRE_COMPILED is set, and there is no compiled replay of this edition")
        pytest.skip("installed without a C compiler: the replay runs in Python")
    return first_steps._replay


def array(entries: list[tuple[int, int]], living: set[int]) -> NDArray[np.int64]:
    """A program in which only what is free is allocated."""
    program = []
    for size, block in entries:
        program.append((0 if block in living else size, block))
        if block in living or not size:
            living.discard(block)
        else:
            living.add(block)
    return np.array(program, dtype=np.int64)


@settings(max_examples=400, deadline=None)
@given(st.lists(ENTRIES, min_size=1, max_size=4), st.sampled_from([10 * MIB, 20 * MIB, 64 * MIB]), st.integers(0, 4))
def test_any_programs(programs: list[list[tuple[int, int]]], large_segment: int, settled: int) -> None:
    living: set[int] = set()
    run = Run(tuple(array(program, living) for program in programs), settled, BLOCKS)
    chosen = AllocatorSettings(large_segment_bytes=large_segment)
    assert play(run, chosen) == play_slowly(run, chosen)


@pytest.mark.parametrize("workload", ["vramplan", "nanogpt", "autocast", "plain"])
@pytest.mark.parametrize("grad_accum", [1, 4])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("batch_size", [1, 6, 16])
def test_first_steps(compiled: Any, workload: Any, grad_accum: int, compile: bool, batch_size: int) -> None:
    step = StepConfig(
        batch_size=batch_size, grad_accum=grad_accum, compile=compile, loss="full", workload=workload
    )  # fmt: skip
    for shape in (
        Shape(n_layer=5, n_head=12, n_embd=768),
        Shape(n_layer=3, n_head=20, n_embd=1280, block_size=512, n_kv_head=5),
    ):
        changes = unroll(tensor_table(shape, step))
        run = first_steps.first_steps(changes, step, first_step_bytes(step, None))
        slowly = play_slowly(run, AllocatorSettings())
        assert play(run, AllocatorSettings()) == slowly
        assert compiled.play(*run, 20 * MIB, slowly.peak_reserved_bytes) == slowly  # a cap that is just enough
        assert compiled.play(*run, 20 * MIB, slowly.peak_reserved_bytes - 1) is None


def test_what_it_does_not_know_is_played_in_python(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = np.array([(8 * MIB, 0), (0, 0), (30 * MIB, 1)], dtype=np.int64)
    run = Run((program,), 1, 2)
    plain = AllocatorSettings(cap_bytes=30 * MIB)
    # at the cap the cached 20 MiB have to go back first: that takes the allocator in Python
    assert compiled.play(*run, plain.large_segment_bytes, plain.cap_bytes) is None
    assert play(run, plain).peak_reserved_bytes == 30 * MIB
    with pytest.raises(CapExceededError):
        play(run, replace(plain, cap_bytes=28 * MIB))
    monkeypatch.setattr(compiled, "play", pytest.fail)
    for conf in (
        {"expandable_segments": True},
        {"max_split_bytes": 64 * MIB},
        {"garbage_collection_threshold": 0.5},
        {"roundup_power2_divisions": 4},
    ):
        play(run, AllocatorSettings(**conf))


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (np.zeros((3, 2)), TypeError),
        (np.zeros((3, 3), dtype=np.int64), TypeError),
        (np.zeros(4, dtype=np.int64), TypeError),
        (np.zeros((2, 2), dtype=np.int32), TypeError),
        ([(1, 0)], TypeError),
        (np.zeros((4, 4), dtype=np.int64)[:, ::2], ValueError),
        (np.array([(MIB, 2)]), ValueError),
        (np.array([(MIB, -1)]), ValueError),
        (np.array([(-MIB, 0)]), ValueError),
        (np.array([(1 << 62, 0)]), ValueError),
    ],
)
def test_what_is_no_program_is_refused(compiled: Any, program: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        compiled.play((program,), 1, 2, 20 * MIB, 1 << 40)


@pytest.mark.parametrize("numbers", [(-1, 20 * MIB, MIB), (2, -MIB, MIB), (2, 1 << 63, MIB), (2, 20 * MIB, -1)])
def test_numbers_out_of_range_are_refused(compiled: Any, numbers: tuple[int, int, int]) -> None:
    with pytest.raises((ValueError, OverflowError)):
        compiled.play((np.array([(MIB, 0)]),), 1, *numbers)


def test_another_edition_is_not_used() -> None:
    program = (
        "import vramplan.planner.allocator as a; a.EDITION += 1\n"
        "from vramplan.planner import first_steps as f; print(f.COMPILED)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


@pytest.mark.parametrize("cap_bytes", [UNLIMITED, 1 << 63])
def test_what_64_bits_cannot_count_is_counted_in_python(cap_bytes: int) -> None:
    """Nobody has such a machine; the answer is still right."""
    shape = Shape(n_layer=12, n_head=12, n_embd=768, block_size=1 << 18)
    with pytest.raises(CapExceededError):
        estimate(shape, StepConfig(batch_size=1 << 28, loss="full"), None, AllocatorSettings(cap_bytes=cap_bytes))
    sizes = [
        estimate(shape, StepConfig(batch_size=1 << n, loss="full", device="cpu")).peak_table_bytes for n in (26, 27, 28)
    ]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]) > 1 << 63
