"""The sampler's cache changes what sampling costs, not what it says; and it needs what the planner's table lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vramplan.memory_probe.meter import TensorMeter
from vramplan.planner.memory import sampling_table
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig
from vramplan.planner.tape import unroll
from vramplan.trainer.cache import KVCache
from vramplan.trainer.model import GPT
from vramplan.trainer.sample import generate

SHAPE = Shape(n_layer=3, n_head=4, n_embd=64, vocab_size=500, block_size=48)
VARIANTS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "biases, untied": {"bias": True, "tied": False},
    "modern": {
        "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 2, "qk_norm": True,
        "logit_softcap": 15.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_gives_the_logits_of_the_whole(name: str) -> None:
    shape = replace(SHAPE, **VARIANTS[name])
    model = GPT(shape, StepConfig(dtype="float32", device="cpu"))
    tokens = torch.randint(0, 500, (2, 20))
    cache = KVCache(shape, 2, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens[:, :11], cache), model.logits(tokens[:, :11]))
        for end in range(12, 21):
            torch.testing.assert_close(model.logits(tokens[:, end - 1 : end], cache), model.logits(tokens[:, :end]))
    assert cache.length == 20


def test_generation_goes_on_beyond_the_block() -> None:
    """Once the window slides, each token is computed as without a cache."""
    model = GPT(SHAPE, StepConfig(dtype="float32", device="cpu"))
    context = list(range(40))
    out = list(generate(model, context, 20, 0.0, None, 0, n_vocab=500))
    whole = list(context)
    for token in out:
        with torch.no_grad():
            assert token == int(model.logits(torch.tensor([whole[-48:]]))[0, :500].argmax())
        whole.append(token)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("batch_size", "prompt"), [(1, 40), (3, 7)])
def test_sampling_needs_what_its_table_says(name: str, dtype: Any, batch_size: int, prompt: int) -> None:
    shape = replace(SHAPE, **VARIANTS[name])
    step = StepConfig(batch_size=batch_size, dtype=dtype, device="cpu")
    phase = ["prompt"]
    with TensorMeter(lambda: phase[0]) as meter, torch.no_grad():
        model = GPT(shape, step)
        cache = KVCache(shape, batch_size, model.dtype, torch.device("cpu"))
        meter.restart()
        for phase[0], tokens in (("prompt", prompt), ("next token", 1)):
            given = torch.randint(0, 500, (batch_size, tokens))
            logits = model.logits(given, cache)
            del given, logits
    live, peaks = 0, dict[str, int]()
    for change in unroll(sampling_table(shape, step, prompt)):
        live += int(change.row.size) if change.alloc else -int(change.row.size)
        peaks[change.phase] = max(peaks.get(change.phase, 0), live)
    for name, peak in meter.timeline.phase_peaks.items():
        assert peaks[name] == pytest.approx(peak, rel=1e-4), name
