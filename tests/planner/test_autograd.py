"""The symbolic autograd allocates and releases what PyTorch's would."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vramplan.planner.autograd import Graph, Leaf, Memory, Tensor
from vramplan.planner.tape import Tape, peak, unroll


def story(graph: Graph) -> list[str]:
    """``+a`` where a is allocated, ``-a`` where it is released."""
    return [("+" if c.alloc else "-") + c.row.name for c in unroll(graph.tape)]


def new(graph: Graph, name: str) -> Memory:
    return graph.new(name, "temporaries", 1)


def operation(graph: Graph, name: str, *inputs: Tensor, keeps: bool = True) -> Tensor:
    """One output; keeps its inputs; a gradient of its own for each."""
    count = len(inputs)

    def backward(_: Memory) -> Sequence[Memory]:
        return [new(graph, f"{name}'{i}") for i in range(count)]

    return graph.result(new(graph, name), inputs, backward, [x.memory for x in inputs] if keeps else [])


def test_a_tensor_goes_with_its_last_name() -> None:
    graph = Graph(Tape())
    a = new(graph, "a")
    b = a
    del a
    new(graph, "c")
    del b
    assert story(graph) == ["+a", "+c", "-c", "-a"]


def test_what_a_backward_needs_stays_until_it_has_run() -> None:
    graph = Graph(Tape())
    x = Tensor(new(graph, "x"))
    y = operation(graph, "y", x)
    del x
    z = operation(graph, "z", y, keeps=False)
    del y
    assert story(graph) == ["+x", "+y", "+z", "-y"]
    graph.begin_backward(z, new(graph, "dz"))
    graph.run(graph.taken())
    assert story(graph)[4:] == ["+dz", "-z", "+z'0", "-dz", "+y'0", "-z'0", "-x", "-y'0"]


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    graph = Graph(Tape())
    with graph.unrecorded():
        y = operation(graph, "y", Tensor(new(graph, "x")))
    assert (story(graph), graph.taken(), y.source) == (["+x", "+y", "-x"], [], None)


@pytest.mark.parametrize(("latest", "survivor"), [(False, "b'0"), (True, "a'0")])
def test_a_parameters_gradient_waits_for_every_use(latest: bool, survivor: str) -> None:
    graph, finished = Graph(Tape()), list[Memory]()
    weight = Tensor((), Leaf(finished.append, latest))
    a = operation(graph, "a", weight)
    b = operation(graph, "b", a, weight, keeps=False)
    graph.begin_backward(b, ())
    graph.run(graph.taken())
    (grad,) = finished
    assert [storage.row.name for storage in grad] == [survivor if latest else "b'1"]


def test_a_second_gradient_is_added_to_the_first_in_place() -> None:
    graph = Graph(Tape())
    x = operation(graph, "x", Tensor())
    y = operation(graph, "y", x, x)
    graph.begin_backward(y, ())
    nodes = graph.taken()
    graph.run(nodes[1:])
    del nodes[1:]
    (node,) = nodes
    assert [storage.row.name for storage in node.grads[0]] == ["y'0"]


def test_a_backward_runs_once() -> None:
    graph = Graph(Tape())
    operation(graph, "y", Tensor())
    nodes = graph.taken()
    graph.run(list(nodes))
    with pytest.raises(RuntimeError, match="once"):
        graph.run(nodes)


def test_a_body_that_is_repeated_keeps_one_of_everything_for_each_repetition() -> None:
    graph = Graph(Tape())
    x = Tensor(new(graph, "x"))
    (row,) = (storage.row for storage in x.memory)
    with graph.tape.repeat(3):
        y = operation(graph, "y", x)
        x = graph.result(graph.again(row), [y], lambda grad: [grad], [y.memory])
        del y
    body = graph.taken()
    del x
    with graph.tape.repeat(3):
        graph.run(body)
    assert story(graph).count("+x") == story(graph).count("-x") == 4
    assert story(graph).count("+y") == story(graph).count("-y") == 3
    assert peak(graph.tape) == 7


def test_what_is_alive_at_the_end_stays() -> None:
    graph = Graph(Tape())
    kept = new(graph, "kept")
    graph.tape.close()
    del kept
    assert story(graph) == ["+kept"]
