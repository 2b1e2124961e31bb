"""What a compiled step's forward keeps for its backward, read off inductor's own cut of the joint graph.

Nothing is computed and no GPU is needed: the model goes through torch.compile on fake tensors, with the operators that
CUDA would run, up to the point where inductor has parted forward and backward. What inductor does after that (kernels,
buffers that it reuses, padded products) is not seen.
"""

from __future__ import annotations

import contextlib
import operator
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode

from ..planner.memory import attention_kernel
from ..planner.partitions import Partition, Row, dimensions, positions
from ..planner.shape import Shape
from ..planner.step import StepConfig
from ..trainer import model as trainer_model
from ..trainer.model import DTYPES, GPT
from .fake import always, attention_of, never
from .scripts import ScriptGPT, default_dtype

with warnings.catch_warnings():  # of torch's own modules
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch._inductor import compile_fx
    from torch._inductor.decomposition import select_decomp_table

aten = torch.ops.aten

DISTINCT: dict[str, Any] = {"n_head": 15, "n_embd": 840, "vocab_size": 50_264, "block_size": 1016}
DISTINCT_KV_HEADS = 5
DISTINCT_BATCH = 7
"""Sizes near those of GPT-2 whose products are all different, so that an element count has one factorisation."""


@dataclass(frozen=True, slots=True, order=True)
class Saved:
    """One tensor that is kept: elements as a product of named dimensions, bytes per element, where it is made."""

    elements: str
    width: int
    name: str


def partition(shape: Shape, step: StepConfig, *, check: bool = True) -> Partition:
    """What a compiled model with the options of ``shape`` and ``step`` keeps; their sizes do not matter.

    A second layer tells what each takes; with ``check`` a third one confirms it, or ValueError is raised.
    """
    sized = distinct(shape)
    step = replace(step, batch_size=DISTINCT_BATCH)
    one, two = (saved_tensors(replace(sized, n_layer=n), step) for n in (1, 2))
    layer = _difference(two, one)
    if check and _difference(saved_tensors(replace(sized, n_layer=3), step), two) != layer:
        raise ValueError("a third layer keeps other tensors than the second")
    return Partition(as_rows(layer), as_rows(_difference(one, layer)))


def distinct(shape: Shape) -> Shape:
    """A shape of the same options whose dimensions can be told from their products."""
    return replace(shape, **DISTINCT, n_kv_head=DISTINCT_KV_HEADS if shape.grouped else 0)


def _difference(more: Counter[Saved], less: Counter[Saved]) -> Counter[Saved]:
    """Signed counts, without zeros."""
    return Counter({saved: n for saved in (*more, *(less.keys() - more.keys())) if (n := more[saved] - less[saved])})


def as_rows(counts: Counter[Saved]) -> tuple[Row, ...]:
    """In the order of where they are made."""
    by_place = sorted(counts.items(), key=lambda item: (item[0].name, item[0]))
    return tuple((n, saved.elements, saved.width, saved.name) for saved, n in by_place)


def saved_tensors(shape: Shape, step: StepConfig, *, budget: float = 1.0) -> Counter[Saved]:
    """The storages that the forward hands to the backward, without parameters, buffers and the batch."""
    cut = trace(shape, step, budget=budget)
    kept = [(node, node.meta["val"]) for node in cut.kept]
    return Counter(Saved(symbolic(v.numel(), shape, step), v.element_size(), _name(node)) for node, v in kept)


class Cut(BaseException):
    """Ends a compilation where forward and backward are parted: what the former returns, and keeps for the latter."""

    def __init__(self, forward: fx.GraphModule, backward: fx.GraphModule, outputs: int) -> None:
        super().__init__()
        self.forward, self.backward = forward, backward
        (results,) = next(iter(reversed(forward.graph.nodes))).args
        bases = [_base(node) for node in results if isinstance(node, fx.Node)]
        self.returned = set(bases[:outputs])
        self.kept = [node for node in dict.fromkeys(bases[outputs:]) if node.op != "placeholder" and not _state(node)]


def _base(node: fx.Node) -> fx.Node:
    """The node that made the storage which ``node`` is a view of."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return node
    if node.target is operator.getitem:
        return _base(source) if _is_view(source) else node
    return _base(source) if _is_view(node) else node


def _state(node: fx.Node) -> bool:
    """Whether it is the generator's state before a recomputed attention: a CPU's is large, CUDA's 16 bytes."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and "rng_state" in str(source.target)


def _is_view(node: fx.Node) -> bool:
    """Inductor makes no buffer for an unsafe view either."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is aten._unsafe_view.default)


# ---------------------------------------------------------------- tracing


def trace(shape: Shape, step: StepConfig, *, budget: float = 1.0) -> Cut:
    """Compile the step's forward on fake tensors until its joint graph is cut."""
    cuts: list[Cut] = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        try:
            compile_fx.compile_fx(graph, inputs, decompositions=_decompositions())
        except Cut as cut:
            cuts.append(cut)
        (results,) = next(iter(reversed(graph.graph.nodes))).args
        return lambda *_: [torch.zeros(()) for _ in results]

    torch._dynamo.reset()
    with (
        warnings.catch_warnings(action="ignore", category=DeprecationWarning),
        FakeTensorMode(),
        functorch_config.patch(activation_memory_budget=budget, enable_autograd_cache=False),
        mock.patch.object(compile_fx, "min_cut_rematerialization_partition", _cutting),
        _cuda_calls(shape, step),
    ):
        batch = torch.zeros(step.batch_size, shape.block_size, dtype=torch.int64)
        forward, arguments = _forward(shape, step, batch)
        torch.compile(forward, backend=backend, dynamic=False, fullgraph=True)(*arguments)
    torch._dynamo.reset()
    (cut,) = cuts
    return cut


def _cutting(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> NoReturn:
    forward, backward = _partitioner(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)
    raise Cut(forward, backward, num_fwd_outputs)


_partitioner: Any = compile_fx.min_cut_rematerialization_partition  # type: ignore[attr-defined]


def _forward(shape: Shape, step: StepConfig, batch: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """What is compiled as one graph, and its arguments."""
    if step.workload == "vramplan":
        with mock.patch.object(GPT, "_initialise"):
            model = GPT(shape, step)
        return (model, (batch, batch)) if step.loss == "full" else (model.hidden, (batch,))
    with default_dtype(DTYPES[step.dtype] if step.workload == "plain" else torch.float32):
        script = ScriptGPT(shape, step.dropout)
    return script, (batch, batch) if step.workload == "nanogpt" else (batch,)


@contextlib.contextmanager
def _cuda_calls(shape: Shape, step: StepConfig) -> Iterator[None]:
    """Within the block the model calls what it would on CUDA, under autocast where the script has it."""
    kernel = attention_kernel(shape, step)
    calls: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": attention_of(kernel),
        "dropout": _dropout,
        "rms_norm": _rms_norm,
    }
    if step.half and step.workload in ("nanogpt", "autocast"):
        calls |= _autocast(DTYPES[step.dtype])
    with contextlib.ExitStack() as stack:
        for name, call in calls.items():
            stack.enter_context(mock.patch.object(F, name, call))
        stack.enter_context(mock.patch.object(trainer_model, "kernel_groups", always if "flash" in kernel else never))
        yield


def _autocast(dtype: torch.dtype) -> dict[str, Callable[..., Tensor]]:
    """The casts that CUDA's autocast makes around the functions that the scripts call."""
    linear = F.linear

    def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def wide_norm(x: Tensor, width: list[int], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        return torch.layer_norm(x.float(), width, weight, bias, eps)

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.nll_loss(F.log_softmax(scores, dim=1).float(), targets)

    return {"linear": half_linear, "layer_norm": wide_norm, "cross_entropy": loss}


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    out: Tensor = aten.native_dropout(x, p, training)[0]
    return out


# CUDA's aten._fused_rms_norm is one operator with a backward of its own; on a CPU autograd takes it apart. So it stands
# under another name while autograd sees it, and inductor writes it out as it does CUDA's.
torch.library.define("vramplan::fused_rms_norm", "(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)")


@torch.library.register_fake("vramplan::fused_rms_norm")  # type: ignore[untyped-decorator]
def _fused_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    out, scale = torch._decomp.decompositions._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return out, scale


def _keep_for_norm(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight, scale = ctx.saved_tensors
    mask = [True, weight is not None]
    dx, dw = aten._fused_rms_norm_backward(grad, x, [x.shape[-1]], scale, weight, mask)
    return dx, dw if weight is not None else None, None


torch.library.register_autograd("vramplan::fused_rms_norm", _norm_backward, setup_context=_keep_for_norm)


def _rms_norm(x: Tensor, width: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    out: Tensor = torch.ops.vramplan.fused_rms_norm(x, weight, eps)[0]
    return out


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's own, but a LayerNorm's statistics are float32, as on CUDA, whatever the input is."""
    table: dict[Any, Callable[..., Any]] = dict(select_decomp_table())
    table[aten.native_layer_norm.default] = _layer_norm
    table[torch.ops.vramplan.fused_rms_norm.default] = _fused_norm
    return table


def _layer_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = torch._refs.native_layer_norm(x.float(), *arguments)
    return out.to(x.dtype), mean, rstd


# ---------------------------------------------------------------- names and sizes


def _name(node: fx.Node) -> str:
    """The module that made it, without the layer's number, and the operator: ``attn.qkv mm``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = re.sub(r"L\['\w+'\]\.?", "", stack[-1][0]) if stack else ""
    return f"{re.sub(r'^blocks.[0-9]+', 'block', path) or 'model'} {_operator(node)}"


def _operator(node: fx.Node) -> str:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return f"{_operator(node.args[0])}[{node.args[1]}]"
    target = node.target
    return target._opname if isinstance(target, torch._ops.OpOverload) else str(target)


def symbolic(elements: int, shape: Shape, step: StepConfig) -> str:
    """``elements`` as a product of named dimensions, such as ``N h``: N tokens, T32 positions rounded up to 32.

    Raises ValueError where none or several fit.
    """
    if elements <= 2:  # scalars, and the generator's state
        return str(elements)
    widths, rows = {"": 1}, {"": 1, **positions(shape, step)}
    for name, size in dimensions(shape).items():
        if size and size not in widths.values():  # one that equals another by definition has that one's name
            widths[name] = size
    products = {f"{row} {name}".strip(): n * k for row, n in rows.items() for name, k in widths.items()}
    names = list(widths)
    products |= {f"{a} {b}": widths[a] * widths[b] for i, a in enumerate(names) for b in names[i:] if a}
    found = [name for name, size in products.items() if size == elements]
    if len(found) != 1:
        raise ValueError(f"{elements} elements are {' or '.join(found) or 'no product of known dimensions'}")
    return found[0]
