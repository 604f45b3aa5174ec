"""torch.compile takes a model with FastLSTM in one graph with symbolic T and B: no unrolling, no breaks."""

import copy
import re
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

from fastlstm import FastLSTM, FastLSTMCell, swap_lstm


class Model(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.lstm = FastLSTM(5, 8, **kwargs)
        self.head = nn.LazyLinear(3)

    def forward(self, x, hx=None, **options):
        y, states = self.lstm(x, hx, **options)
        return self.head(y).tanh(), states


def make(**kwargs):
    model = Model(**kwargs)
    model(torch.zeros(2, 2, 5))
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results(call, model, x, *states, **options):
    """Outputs and the gradients of everything, of one forward and backward pass."""
    leaves = [t.clone().requires_grad_() for t in (x, *states)]
    model.zero_grad()
    out, (h_n, c_n) = call(leaves[0], tuple(leaves[1:]) if states else None, **options)
    (out.square().sum() + h_n.sum() + c_n.sum()).backward()
    return [out, h_n, c_n, *(t.grad for t in leaves), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "proj_size": 3},
        {"num_layers": 2, "batch_first": True, "bias": False},
    ],
)
def test_one_graph_serves_every_length_and_batch_size(kwargs, with_state):
    model = make(**kwargs)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    states = model.lstm.num_layers * (1 + model.lstm.bidirectional)
    for steps, batch in ((7, 4), (12, 6), (30, 3), (5, 9)):
        x = torch.randn(batch, steps, 5) if model.lstm.batch_first else torch.randn(steps, batch, 5)
        hx = (torch.randn(states, batch, model.lstm.proj_size or 8), torch.randn(states, batch, 8))
        hx = hx if with_state else ()
        torch.testing.assert_close(results(compiled, model, x, *hx), results(model, model, x, *hx))
    # Once for the first sizes and once more with symbolic ones.
    assert counter.frame_count <= 2
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "fastlstm" in str(node.target)]
    assert len(calls) == len(counter.graphs)


SIZES = [(7, 4), (12, 6), (30, 3), (5, 9), (2, 2), (64, 5), (9, 17), (3, 33), (21, 4), (7, 8)]


@pytest.mark.parametrize("with_options", [False, True], ids=["input alone", "lengths and reset_mask"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_ten_sizes_take_at_most_two_compilations(backend, training, with_options):
    model = make(num_layers=2, bidirectional=True).double()  # inductor takes sums in another order
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for steps, batch in SIZES:
        x, options = torch.randn(steps, batch, 5, dtype=torch.float64), {}
        if with_options:
            options["lengths"] = torch.randint(0, steps + 1, (batch,))
            options["reset_mask"] = torch.rand(steps, batch) < 0.2
        if training:
            torch.testing.assert_close(results(compiled, model, x, **options), results(model, model, x, **options))
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(x, **options), model(x, **options))
    assert counter.frame_count <= 2


def test_graphs_are_the_operator_and_what_is_around_it():
    """No value is read on the host, nothing moves between devices, nothing is computed twice: fit for CUDA graphs."""
    forward, backward = Counter(), Counter()

    def recorder(calls):
        def compile_(graph, inputs):
            calls.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            for name in ("<built-in function getitem>", "aten.detach.default"):  # which compute nothing
                calls.pop(name, None)
            return make_boxed_func(graph.forward)

        return compile_

    backend = aot_autograd(
        fw_compiler=recorder(forward),
        bw_compiler=recorder(backward),
        partition_fn=min_cut_rematerialization_partition,
    )
    lstm = FastLSTM(5, 8, num_layers=2, bidirectional=True)
    compiled = torch.compile(lstm, backend=backend, fullgraph=True, dynamic=True)
    x, lengths, mask = torch.randn(7, 4, 5, requires_grad=True), torch.tensor([7, 0, 3, 5]), torch.rand(7, 4) < 0.2
    y, (h_n, c_n) = compiled(x, lengths=lengths, reset_mask=mask)
    (y.sum() + h_n.sum() + c_n.sum()).backward()
    assert forward == {"aten.new_zeros.default": 1, "fastlstm.lstm.default": 1}
    assert backward == {"fastlstm.lstm_backward.default": 1}


def test_reduce_overhead():
    model = make(num_layers=2).eval()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    state = (torch.zeros(2, 4, 8), torch.zeros(2, 4, 8))
    expected_state = state
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 4, 5)
            y, state = compiled(x, state)
            expected, expected_state = model(x, expected_state)
            torch.testing.assert_close((y, state), (expected, expected_state))


def test_streaming_with_carried_state_compiles_once():
    model = make().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(6, 1, 5)
    state = (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    outputs = []
    with torch.no_grad():
        for t in range(6):
            y, state = compiled(x[t : t + 1], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs), model(x)[0])
    assert counter.frame_count == 1


def test_unbatched_input():
    model = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 5)
    torch.testing.assert_close(compiled(x), model(x))


def test_dropout():
    model = make(num_layers=2, dropout=0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 4, 5)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))


def test_autocast():
    model = make(num_layers=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(x), model(x)
    assert got[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)


def test_packed_sequence_may_break_the_graph_but_matches():
    lstm = FastLSTM(5, 8)
    compiled = torch.compile(lstm, backend="aot_eager")
    packed = pack_sequence([torch.randn(n, 5) for n in (2, 6, 3)], enforce_sorted=False)
    (got, got_states), (expected, expected_states) = compiled(packed), lstm(packed)
    torch.testing.assert_close((got.data, got_states), (expected.data, expected_states))


def test_parametrized_weights():
    lstm = parametrizations.weight_norm(FastLSTM(5, 8), "weight_hh_l0")
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 4, 5)
    torch.testing.assert_close(compiled(x), lstm(x))


def test_swapped_module():
    torchs = nn.LSTM(5, 8)
    compiled = torch.compile(swap_lstm(copy.deepcopy(torchs)), backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 4, 5)
    torch.testing.assert_close(compiled(x), torchs(x), rtol=0, atol=1e-6)


def test_cell():
    cell = FastLSTMCell(5, 8)

    def unroll(x, h, c):
        for step in x:
            h, c = cell(step, (h, c))
        return h, c

    x, h, c = torch.randn(3, 4, 5), torch.randn(4, 8), torch.randn(4, 8)
    compiled = torch.compile(unroll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, h, c), unroll(x, h, c))


def test_weights_exchanged_after_compilation_are_used():
    model = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(7, 4, 5)
    compiled(x)
    with torch.no_grad():
        model.lstm.weight_hh_l0.mul_(2)
    torch.testing.assert_close(compiled(x), model(x))
    model.lstm.weight_ih_l0 = nn.Parameter(torch.randn(32, 5))
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (torch.zeros(5, 2, 7),),
        lambda: (torch.zeros(5, 2, 5, dtype=torch.float64),),
        lambda: (torch.zeros(5, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8))),
    ],
)
def test_errors_are_those_of_eager_calls(arguments):
    module = FastLSTM(5, 8)
    with pytest.raises((RuntimeError, ValueError)) as eager:
        module(*arguments())
    with pytest.raises(eager.type, match=re.escape(str(eager.value))):
        torch.compile(module, backend="aot_eager")(*arguments())
