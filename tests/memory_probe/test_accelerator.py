"""The tensor table against steps on a fake accelerator that runs CUDA's attention operators."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dispatcher import seen_by_the_dispatcher
from torch.utils import backend_registration

from vramplan.planner.memory import estimate
from vramplan.planner.shape import Shape
from vramplan.planner.step import StepConfig

GPT2: dict[str, Any] = {"n_layer": 12, "n_head": 12, "n_embd": 768}
MODERN: dict[str, Any] = {
    "norm": "rmsnorm", "positions": "rotary", "mlp": "swiglu", "n_kv_head": 4, "qk_norm": True, "tied": False,
}  # fmt: skip
CONFIGURATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GPT2, {"batch_size": 4, "loss": "full"}),
    (GPT2, {"batch_size": 4, "grad_accum": 2}),
    (GPT2, {"batch_size": 2, "loss": "full", "dtype": "float32"}),
    ({**GPT2, **MODERN}, {"batch_size": 4}),
    ({**GPT2, "n_head": 4, "n_embd": 832}, {"batch_size": 2, "loss": "full"}),
]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch makes no backends in Python",
)
def test_steps_on_a_fake_accelerator() -> None:
    program = Path(__file__).with_name("accelerator.py")
    done = subprocess.run(
        [sys.executable, program, json.dumps(CONFIGURATIONS)], capture_output=True, text=True, timeout=300, check=True
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(CONFIGURATIONS)
    kernels = set()
    for (shape, step), real in zip(CONFIGURATIONS, lines, strict=True):
        full = estimate(Shape(**shape), StepConfig(**step))
        kernels.add(full.kernel)
        peak, where, phases = seen_by_the_dispatcher(full.table)
        assert (peak, where) == (pytest.approx(real["peak"], rel=0.0005), real["phase"])
        assert peak - real["persistent"] == pytest.approx(real["peak"] - real["persistent"], rel=0.0005)
        for phase, n_bytes in real["phases"].items():
            assert phases[phase] == pytest.approx(n_bytes, rel=0.0005), phase
    assert kernels == {"flash", "efficient"}
