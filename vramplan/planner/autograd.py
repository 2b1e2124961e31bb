"""A symbolic autograd: tensors that have a size and a lifetime, and no values.

A forward written with it records the operations' backwards; running them in reverse order gives what autograd would
allocate and release. Memory goes when the last reference to it goes, here as in PyTorch: a forward written with the
same names and calls as the model's holds the same tensors for the same time (this relies on CPython's reference
counting, as PyTorch's own behaviour does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from .shape import Ints
from .tape import Category, Row, Tape


class Storage:
    """One tensor's bytes: allocated when this is made, released when the last reference to it goes."""

    __slots__ = ("_tape", "joins", "row")

    def __init__(self, tape: Tape, row: Row) -> None:
        self._tape, self.row, self.joins = tape, row, False
        tape.begin(row, self)

    def __del__(self) -> None:
        self._tape.end(self.row, self, joins=self.joins)


Memory = tuple[Storage, ...]
"""What a tensor occupies; empty for one that takes no memory of its own."""


@dataclass(slots=True)
class Node:
    """One operation's backward: from the gradients of its outputs to those of its inputs.

    ``saved`` is what it keeps until it has run. ``consumes``: the rule gets the gradients as a list that it empties, so
    that they can go before it returns.
    """

    inputs: Sequence[Tensor]
    rule: Callable[..., Sequence[Memory]]
    saved: list[Memory]
    grads: list[Memory]
    consumes: bool = False

    def receive(self, output: int, grad: Memory) -> None:
        """A further gradient is added in place to the one that is there: nothing else refers to that."""
        if not self.grads[output]:
            self.grads[output] = grad


@dataclass(slots=True)
class Leaf:
    """A parameter. Its gradient is complete when every use has contributed.

    ``latest``: the sum is written into the contribution that came last, not into the first.
    """

    finish: Callable[[Memory], None]
    latest: bool = False
    uses: int = 0
    grad: Memory = ()

    def receive(self, _: int, grad: Memory) -> None:
        """A gradient waits for the others, and is added up with them in place."""
        self.uses -= 1
        if self.latest or not self.grad:
            self.grad = grad
        if not self.uses:
            whole, self.grad = self.grad, ()
            self.finish(whole)


@dataclass(slots=True)
class Tensor:
    """A tensor, or a view: what it occupies, and which operation's output it is (None: no gradient is wanted)."""

    memory: Memory = ()
    source: Node | Leaf | None = None
    output: int = 0


def _has_run(*_: Memory) -> Sequence[Memory]:
    raise RuntimeError("a backward runs once")


@dataclass
class Graph:
    """Records operations onto a tape, and runs their backwards."""

    tape: Tape
    recording: bool = True
    nodes: list[Node] = field(default_factory=list)

    def new(self, name: str, category: Category, n_bytes: Ints, times: int = 1) -> Memory:
        """Allocate ``n_bytes``, ``times`` over."""
        return (Storage(self.tape, self.tape.row(name, category, n_bytes, times)),)

    def again(self, row: Row) -> Memory:
        """Allocate another of the same kind: what one repetition hands to the next must be the same row."""
        return (Storage(self.tape, row),)

    def result(
        self,
        memory: Memory,
        inputs: Sequence[Tensor],
        rule: Callable[..., Sequence[Memory]],
        saves: Iterable[Memory] = (),
    ) -> Tensor:
        """The output of an operation. ``rule`` turns its gradient into those of ``inputs``, in their order."""
        return self.results([memory], inputs, rule, saves)[0]

    def results(
        self,
        outputs: Sequence[Memory],
        inputs: Sequence[Tensor],
        rule: Callable[..., Sequence[Memory]],
        saves: Iterable[Memory] = (),
    ) -> list[Tensor]:
        """The same for an operation with several outputs, whose gradients ``rule`` takes one by one."""
        if not self.recording:
            return [Tensor(memory) for memory in outputs]
        for tensor in inputs:
            if isinstance(tensor.source, Leaf):
                tensor.source.uses += 1
        sources = [Tensor((), tensor.source, tensor.output) for tensor in inputs]
        node = Node(sources, rule, list(saves), [()] * len(outputs))
        self.nodes.append(node)
        return [Tensor(memory, node, i) for i, memory in enumerate(outputs)]

    def begin_backward(self, tensor: Tensor, grad: Memory) -> None:
        """Give ``tensor`` its gradient; it is then no longer held by ``tensor`` itself."""
        if tensor.source is not None:
            tensor.source.receive(tensor.output, grad)
        tensor.memory = ()

    def taken(self) -> list[Node]:
        """The nodes recorded since this was last asked."""
        nodes, self.nodes = self.nodes, []
        return nodes

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Operations inside keep nothing for a backward."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def run(self, nodes: list[Node]) -> None:
        """Run the backwards of ``nodes``, last first; what each kept goes with it, as do the gradients it was given."""
        while nodes:
            node = nodes.pop()
            given, node.grads = node.grads, []
            grads = node.rule(given) if node.consumes else node.rule(*given)
            del given
            node.saved.clear()
            node.rule = _has_run
            for tensor, grad in zip(node.inputs, grads, strict=True):
                if tensor.source is not None:
                    tensor.source.receive(tensor.output, grad)
            grads = grad = ()
            del node
