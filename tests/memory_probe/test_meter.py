"""The meter counts each storage once, from its creation or registration until it is freed."""

from __future__ import annotations

import torch

from vramplan.memory_probe.meter import TensorMeter


def test_a_tensor_counts_while_it_lives() -> None:
    with TensorMeter() as meter:
        a = torch.zeros(1000)
        assert meter.live_bytes == 4000
        b = torch.zeros(500, dtype=torch.bfloat16)
        assert meter.live_bytes == 5000
        del a
        assert meter.live_bytes == 1000
        del b
        assert meter.live_bytes == 0
    assert meter.timeline.peak.live_bytes == 5000


def test_views_are_free_and_keep_their_storage_alive() -> None:
    with TensorMeter() as meter:
        base = torch.zeros(64, 64)
        size = meter.live_bytes
        views = [base.t(), base[3:5], base.view(4096), base.detach(), *base.split(8)]
        assert meter.live_bytes == size
        del base
        assert meter.live_bytes == size, "one small view keeps the whole storage"
        views.clear()
        assert meter.live_bytes == 0


def test_operations_in_place_cost_nothing() -> None:
    with TensorMeter() as meter:
        a = torch.zeros(100)
        a.add_(1).mul_(2)
        torch.mul(a, 3, out=a)
        assert meter.live_bytes == 400


def test_every_tensor_of_a_tuple_counts() -> None:
    with TensorMeter() as meter:
        values, indices = torch.sort(torch.zeros(10))
        assert meter.live_bytes == 40 + 80
        del values, indices
        assert meter.live_bytes == 0


def test_what_existed_before_counts_only_once_watched() -> None:
    before = torch.zeros(250)
    with TensorMeter() as meter:
        made = before + 1
        assert meter.live_bytes == 1000
        meter.watch(before)
        meter.watch(before)
        meter.watch(before[:2])
        assert meter.live_bytes == 2000
        del before
        assert meter.live_bytes == 1000
    assert made.sum() == 250


def test_restart_forgets_the_timeline_and_keeps_counting() -> None:
    with TensorMeter() as meter:
        kept = torch.zeros(100)
        torch.zeros(1000)
        assert meter.timeline.peak.live_bytes == 4400
        meter.restart()
        assert meter.timeline.samples == []
        torch.zeros(10)
        assert meter.timeline.peak.live_bytes == 440
    assert kept.numel() == 100


def test_samples_carry_operation_and_phase() -> None:
    phase = "one"
    with TensorMeter(lambda: phase) as meter:
        a = torch.zeros(100)
        phase = "two"
        b = a + 1
        phase = "three"
        del a
        c = b.relu()
    peak = meter.timeline.peak
    assert (peak.live_bytes, peak.operation, peak.phase) == (800, "aten.add.Tensor", "two")
    assert meter.timeline.phase_peaks == {"one": 400, "two": 800, "three": 800}
    assert c.numel() == 100


def test_what_autograd_saves_counts_until_the_backward() -> None:
    weight = torch.ones(100, requires_grad=True)
    with TensorMeter() as meter:
        meter.watch(weight)
        out = weight.exp().sin().sum()
        assert meter.live_bytes == 400 + 400 + 4, "exp keeps its result, sin keeps its input: the same tensor"
        out.backward()
        del out
        assert meter.live_bytes == 800, "weight and gradient"


def sum_of_gradients(*, first_is_shared: bool) -> int:
    """Bytes alive when a tensor's two gradients of 4000 bytes, nothing else but two scalars alive, are added."""
    x = torch.ones(1000, requires_grad=True)
    with TensorMeter() as meter:
        t, u = x * 2, x * 3
        sine = t.sin()
        other = (t + u if first_is_shared else t).exp()  # the sum hands the same gradient to t and to u
        loss = other.sum() + sine.sum()
        del other, sine, t, u
        meter.restart()
        loss.backward()
    sums = [s.live_bytes for s in meter.timeline.samples if s.operation == "aten.add.Tensor"]
    return sums[0]


def test_gradients_that_autograd_adds_in_place_are_two_tensors() -> None:
    """Without a meter the second gradient is added to the first; under a dispatch mode autograd makes a third."""
    assert sum_of_gradients(first_is_shared=False) == 2 * 4000 + 8


def test_a_first_gradient_that_somebody_else_holds_makes_a_third_tensor() -> None:
    assert sum_of_gradients(first_is_shared=True) == 3 * 4000 + 8
