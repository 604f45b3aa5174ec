"""enable: nn.LSTM and nn.LSTMCell on our kernels with nothing changed but speed, and torch's own way where they differ.

What a module gives while enabled is compared with what the same module gives while not.
"""

import contextlib
import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from test_errors import CELLS, FORWARDS, error_of
from test_upstream import INFOS, differentiable_function, inputs_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_modules import ModuleErrorEnum
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastlstm
from fastlstm import FastLSTM, _ops, enabling

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN", "ignore:TF32 acceleration on top of oneDNN"
)


@pytest.fixture
def runs(monkeypatch):
    """The arguments of every run of our kernels."""
    recorded = []
    run = _ops.lstm

    def recording(*arguments):
        recorded.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(_ops, "lstm", recording)
    return recorded


@pytest.fixture(autouse=True)
def _restored():
    yield
    assert not fastlstm.is_enabled()
    assert not {"lstm", "lstm_cell"} & set(vars(torch._VF))
    assert "_call_impl" not in vars(nn.LSTM)


def assert_same(actual, expected, **tolerances):
    """Outputs alike in everything but rounding."""
    leaves, spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(leaves, expected_leaves, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, **tolerances)
        else:
            assert a == b


def assert_runs(runs, module, *args, calls=1, **kwargs):
    """``module`` runs on our kernels while enabled, with the results and gradients that it has otherwise."""
    results = []
    for context in (fastlstm.enable(), contextlib.nullcontext()):
        runs.clear()
        torch.manual_seed(1)
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        leaves += [p for p in module.parameters() if p.requires_grad]
        with context:
            outputs = module(*args, **kwargs)
        assert len(runs) == (0 if isinstance(context, contextlib.nullcontext) else calls)
        losses = [t.square().sum() for t in pytree.tree_leaves(outputs) if t.is_floating_point()]
        gradients = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if leaves else ()
        results.append((outputs, gradients, torch.get_rng_state()))
    assert_same(*results)


def assert_untouched(runs, function):
    """``function`` does not run on our kernels while enabled, and gives bit by bit what it gives otherwise."""
    runs.clear()
    expected = outcome_of(function)
    with fastlstm.enable():
        assert_same(outcome_of(function), expected, rtol=0, atol=0, equal_nan=True)
    assert not runs


def outcome_of(function):
    torch.manual_seed(1)
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


# What runs on our kernels.

CONFIGURATIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    {"num_layers": 3, "dropout": 0.4},
    {"num_layers": 2, "dropout": 1.0, "bidirectional": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kwargs", CONFIGURATIONS, ids=str)
def test_lstm(runs, kwargs, dtype):
    module = nn.LSTM(3, 4, **kwargs, dtype=dtype)
    count = module.num_layers * (1 + module.bidirectional)
    x = torch.randn(2, 5, 3, dtype=dtype, requires_grad=True)
    batch = 2 if module.batch_first else 5
    h_0 = torch.randn(count, batch, module.proj_size or 4, dtype=dtype, requires_grad=True)
    c_0 = torch.randn(count, batch, 4, dtype=dtype, requires_grad=True)
    assert_runs(runs, module, x)
    assert_runs(runs, module, x, (h_0, c_0))
    assert_runs(runs, module, x, [h_0, c_0])
    assert_runs(runs, module, input=x, hx=(h_0, c_0))
    assert_runs(runs, module, x[0])
    assert_runs(runs, module, x[0], (h_0[:, 0], c_0[:, 0]))
    assert_runs(runs, module, x[:, :0] if batch == 5 else x[:0])
    packed = pack_sequence([x[0, :2], x[1]], enforce_sorted=False)
    assert_runs(runs, module, packed)
    assert_runs(runs, module, packed, (h_0[:, :2], c_0[:, :2]))
    assert_runs(runs, module.eval(), x, (h_0, c_0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(runs, dtype):
    module = nn.LSTM(3, 4, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    with fastlstm.enable():
        outputs = module(x)
    assert_same(outputs, FastLSTM.from_torch(module)(x), rtol=0, atol=0)
    assert len(runs) == 2


@pytest.mark.parametrize("bias", [True, False])
def test_cell(runs, bias):
    module = nn.LSTMCell(3, 4, bias=bias)
    x, h, c = (torch.randn(2, n, requires_grad=True) for n in (3, 4, 4))
    assert_runs(runs, module, x)
    assert_runs(runs, module, x, (h, c))
    assert_runs(runs, module, x[0])
    assert_runs(runs, module, x[0], (h[0], c[0]))
    assert_runs(runs, module, x[:0])


def test_views_of_all_kinds(runs):
    module = nn.LSTM(3, 4)
    assert_runs(runs, module, torch.randn(3, 2, 5).transpose(0, 2))
    negated = torch.imag(torch.randn(5, 2, 3, dtype=torch.complex64).conj())
    assert negated.is_neg()
    assert_runs(runs, module, negated)


def test_frozen_parameters_and_inference_mode(runs):
    module = nn.LSTM(3, 4)
    module.weight_hh_l0.requires_grad_(False)
    x = torch.randn(5, 2, 3)
    assert_runs(runs, module, x)
    with torch.inference_mode(), fastlstm.enable():
        assert module(x)[0].is_inference()
    with torch.no_grad(), fastlstm.enable():
        assert not module(x)[0].requires_grad


def test_hooks_run_once_with_what_torch_gives_them(runs):
    for make, x in ((nn.LSTM, torch.randn(5, 2, 3)), (nn.LSTMCell, torch.randn(2, 3))):
        for name in ("forward_pre", "forward", "full_backward_pre", "full_backward"):
            module, seen = make(3, 4), []
            getattr(module, f"register_{name}_hook")(lambda *arguments, to=seen: to.append(len(arguments)))
            x = x.detach().requires_grad_()
            assert_runs(runs, module, x)
            assert len(seen) == 2, name


def test_global_hooks(runs):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        assert_runs(runs, nn.LSTM(3, 4), torch.randn(5, 2, 3))
    finally:
        handle.remove()
    assert len(seen) == 2


def test_subclasses_and_wrapped_forwards(runs):
    class Residual(nn.LSTM):
        def forward(self, input, hx=None):
            y, states = super().forward(input, hx)
            return input + y, states

    x = torch.randn(5, 2, 4)
    assert_runs(runs, Residual(4, 4), x)

    class Strict(nn.LSTM):
        def check_forward_args(self, input, hidden, batch_sizes):
            super().check_forward_args(input, hidden, batch_sizes)
            raise RuntimeError("strict")

    with fastlstm.enable(), pytest.raises(RuntimeError, match="strict"):
        Strict(4, 4)(x)

    class Counting(nn.Module):
        def _call_impl(self, *arguments, **keywords):
            self.calls = getattr(self, "calls", 0) + 1
            return super()._call_impl(*arguments, **keywords)

    class Mixed(nn.LSTM, Counting):
        pass

    mixed = Mixed(4, 4)
    assert_runs(runs, mixed, x)
    assert mixed.calls == 2

    module = nn.LSTM(4, 4)
    forward = module.forward
    module.forward = lambda *arguments: (2 * forward(*arguments)[0],)
    assert_runs(runs, module, x)


def test_a_forward_that_another_library_has_put_in_place(runs, monkeypatch):
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, *arguments: "theirs")
    with fastlstm.enable():
        assert nn.LSTM(3, 4)(torch.randn(5, 2, 3)) == "theirs"
    assert not runs


def test_weights_that_are_computed_or_replaced(runs):
    x = torch.randn(5, 2, 3)
    normed = nn.LSTM(3, 4)
    parametrizations.weight_norm(normed, "weight_hh_l0")
    assert_runs(runs, normed, x)

    hooked = nn.LSTM(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(hooked, "weight_hh_l0")
    prune.l1_unstructured(hooked, "weight_ih_l0", amount=0.5)
    assert_runs(runs, hooked, x)

    replaced = nn.LSTM(3, 4)
    replaced.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    assert_runs(runs, replaced, x)
    replaced.weight_hh_l0.data = torch.randn(16, 4)
    assert_runs(runs, replaced, x)
    replaced._flat_weights[1] = torch.randn(16, 4)  # weight dropout is done so
    assert_runs(runs, replaced, x)
    assert_runs(runs, replaced.double(), x.double())

    functional = nn.LSTM(3, 4)
    weights = {name: torch.randn_like(p) for name, p in functional.named_parameters()}
    with fastlstm.enable():
        enabled = torch.func.functional_call(functional, weights, (x,))
    assert len(runs) > 0
    assert_same(enabled, torch.func.functional_call(functional, weights, (x,)))


def test_replica_of_data_parallel(runs):
    module = nn.LSTM(3, 4)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 2)
    assert not list(replica.parameters())
    assert_runs(runs, replica, torch.randn(5, 2, 3))


def test_training(runs):
    losses = []
    for context in (fastlstm.enable(), contextlib.nullcontext()):
        torch.manual_seed(2)
        model = nn.ModuleList([nn.LSTM(3, 4, 2, dropout=0.3), nn.LSTMCell(4, 4)]).double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        x = torch.randn(5, 2, 3, dtype=torch.float64)
        with context:
            for _ in range(5):
                loss = model[1](model[0](x)[0][-1])[0].square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-9)
    assert len(set(losses[:5])) == 5
    assert len(runs) == 10


def test_checkpoint(runs):
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True)
    with fastlstm.enable():
        again = torch.autograd.grad(checkpoint(lambda x: module(x)[0].sum(), x, use_reentrant=False), x)
        once = torch.autograd.grad(module(x)[0].sum(), x)
    assert_same(again, once, rtol=0, atol=0)
    assert len(runs) == 3


def test_copies_and_pickles(runs):
    module, x = nn.LSTM(3, 4, 2), torch.randn(5, 2, 3)
    stream = io.BytesIO()
    with fastlstm.enable():
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        torch.save(module, stream)
    stream.seek(0)
    for duplicate in (*copies, torch.load(stream, weights_only=False)):
        assert type(duplicate) is nn.LSTM
        assert vars(duplicate).keys() == vars(module).keys()
        assert_runs(runs, duplicate, x)
        assert_same(duplicate(x), module(x), rtol=0, atol=0)


def test_under_a_default_device(runs):
    with torch.device("cpu"):
        assert_runs(runs, nn.LSTM(3, 4), torch.randn(5, 2, 3))
        assert_runs(runs, nn.LSTMCell(3, 4), torch.randn(2, 3))


def test_torchs_switches_choose_between_torchs_kernels(runs):
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
        assert_runs(runs, nn.LSTM(3, 4), torch.randn(5, 2, 3))


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("oneDNN", [True, False])
@pytest.mark.parametrize("states", [None, (BF16, BF16), (FP32, FP32), (BF16, FP32)], ids=str)
@pytest.mark.parametrize("x_dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("weight_dtype", [BF16, FP32, FP64], ids=str)
def test_dtypes_under_autocast(runs, weight_dtype, x_dtype, states, oneDNN):
    """What torch gives, in its dtype; or where it fails because oneDNN lacks instructions for bfloat16, a result."""
    for module, x in ((nn.LSTM(3, 4), torch.randn(5, 2, 3)), (nn.LSTMCell(3, 4), torch.randn(2, 3))):
        shape = (1, 2, 4) if isinstance(module, nn.LSTM) else (2, 4)
        hx = None if states is None else tuple(torch.randn(shape, dtype=dtype) for dtype in states)
        module, x = module.to(weight_dtype), x.to(x_dtype)
        runs.clear()
        with torch.backends.mkldnn.flags(enabled=oneDNN), torch.autocast("cpu", dtype=BF16):
            expected = outcome_of(lambda module=module, x=x, hx=hx: module(x, hx))
            with fastlstm.enable():
                outputs = outcome_of(lambda module=module, x=x, hx=hx: module(x, hx))
        if "primitive" in str(expected):
            assert len(runs) == 1
            expected = FastLSTM.from_torch(module.float())(x.float(), None if hx is None else [t.float() for t in hx])
            expected = pytree.tree_map(lambda t: t.to(BF16), expected)
        assert_same(outputs, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("weight_dtype", "x_dtype", "states"),
    [(FP32, BF16, None), (FP32, BF16, BF16), (FP32, FP32, BF16), (BF16, BF16, None), (FP64, FP64, None)],
    ids=str,
)
def test_runs_under_autocast(runs, weight_dtype, x_dtype, states):
    lstm, cell = nn.LSTM(3, 4, dtype=weight_dtype), nn.LSTMCell(3, 4, dtype=weight_dtype)
    x, h = torch.randn(5, 2, 3, dtype=x_dtype), torch.randn(1, 2, 4, dtype=states)
    with torch.autocast("cpu", dtype=BF16), fastlstm.enable():
        lstm(x, states and (h, h))
        cell(x[0], states and (h[0], h[0]))
    assert len(runs) == 2


def test_autocast_of_another_device_changes_nothing(runs):
    with torch.autocast("xpu", dtype=BF16):
        assert torch._C._is_any_autocast_enabled()
        assert_runs(runs, nn.LSTM(3, 4), torch.randn(5, 2, 3))
        assert_runs(runs, nn.LSTMCell(3, 4), torch.randn(2, 3))


# What goes its own way.


@pytest.mark.parametrize("case", FORWARDS)
def test_errors_of_the_lstm(runs, case):
    kwargs, arguments = FORWARDS[case]
    module = nn.LSTM(3, 4, **kwargs)
    expected = error_of(module, *arguments())
    with fastlstm.enable():
        assert error_of(module, *arguments()) == expected
    assert not runs


@pytest.mark.parametrize("case", CELLS)
def test_errors_of_the_cell(runs, case):
    module = nn.LSTMCell(3, 4)
    expected = error_of(module, *CELLS[case]())
    with fastlstm.enable():
        assert error_of(module, *CELLS[case]()) == expected
    assert not runs


def test_errors_of_packed_sequences(runs):
    module = nn.LSTM(3, 4)
    for batch_sizes in ([1, 2], [2, 2], [1, 1], [3, 0]):
        packed = PackedSequence(torch.randn(3, 3), torch.tensor(batch_sizes))
        assert_untouched(runs, lambda packed=packed: module(packed)[0].data)


class Seen(Tensor):
    pass


def with_weight(index, weight, module=None):
    module = module or nn.LSTM(3, 4)
    name = list(dict(module.named_parameters()))[index]
    setattr(module, name, nn.Parameter(weight, requires_grad=weight.is_floating_point()))
    return module


def attributes(module, **values):
    for name, value in values.items():
        setattr(module, name, value)
    return module


X, X_CELL = torch.ones(5, 2, 3), torch.ones(2, 3)
ARGUMENTS = ([torch.ones(16, n) for n in (3, 4)], False, 1, 0.0, False, False, False)
UNTOUCHED = {
    "meta": lambda: nn.LSTM(3, 4, device="meta")(X.to("meta"))[0].shape,
    "meta cell": lambda: nn.LSTMCell(3, 4, device="meta")(X_CELL.to("meta"))[0].shape,
    "complex": lambda: nn.LSTM(3, 4, dtype=torch.complex64)(X.to(torch.complex64)),
    "complex cell": lambda: nn.LSTMCell(3, 4, dtype=torch.complex64)(X_CELL.to(torch.complex64)),
    "states of another dtype": lambda: nn.LSTM(3, 4)(X, (torch.ones(1, 2, 4).double(),) * 2),
    "states of another dtype, cell": lambda: nn.LSTMCell(3, 4)(X_CELL, (torch.ones(2, 4).double(),) * 2),
    "input of a subclass": lambda: nn.LSTM(3, 4)(X.as_subclass(Seen)),
    "states of a subclass": lambda: nn.LSTM(3, 4)(X, (torch.ones(1, 2, 4).as_subclass(Seen),) * 2),
    "input of a subclass, cell": lambda: nn.LSTMCell(3, 4)(X_CELL.as_subclass(Seen)),
    "states of a cell in one tensor": lambda: nn.LSTMCell(3, 4)(X_CELL, torch.ones(2, 2, 4)),
    "sparse weight": lambda: with_weight(1, torch.eye(16, 4).to_sparse_csr())(X),
    "oneDNN layout": lambda: nn.LSTM(3, 4)(X.to_mkldnn()),
    "nested input": lambda: nn.LSTM(3, 4)(torch.nested.nested_tensor([X[0], X[1]])),
    "weight of another dtype": lambda: with_weight(2, torch.ones(16).double())(X),
    "weight of another size": lambda: with_weight(1, torch.ones(16, 5))(X),
    "broadcast bias": lambda: with_weight(2, torch.ones(1, 16))(X),
    "weight with too many dimensions": lambda: with_weight(0, torch.ones(1, 16, 3))(X),
    "other sizes than configured": lambda: attributes(nn.LSTM(3, 4), input_size=5)(X),
    "projection that is none": lambda: attributes(nn.LSTM(3, 4), proj_size=2)(X),
    "fewer weights than configured": lambda: attributes(nn.LSTM(3, 4), num_layers=2)(X),
    "more weights than configured": lambda: attributes(nn.LSTM(3, 4, 2), num_layers=1)(X),
    "no such dropout": lambda: attributes(nn.LSTM(3, 4, 2), dropout=1.5)(X),
    "dropout in words": lambda: attributes(nn.LSTM(3, 4, 2), dropout="half")(X),
    "flag that is a number": lambda: attributes(nn.LSTM(3, 4), bidirectional=0)(X),
    "missing weight": lambda: attributes(nn.LSTM(3, 4), _flat_weights=[None] * 4)(X),
    "no weights": lambda: attributes(nn.LSTM(3, 4), _flat_weights=[])(X),
    "no input": lambda: nn.LSTM(3, 4)(),
    "too many arguments": lambda: nn.LSTM(3, 4)(X, None, None),
    "input that is no tensor": lambda: nn.LSTM(3, 4)([[1.0]]),
    "cell of a bias": lambda: attributes(nn.LSTMCell(3, 4), bias_hh=None)(X_CELL),
    "function called with keywords": lambda: torch._VF.lstm_cell(
        input=X_CELL, hx=(torch.ones(2, 4),) * 2, w_ih=torch.ones(16, 3), w_hh=torch.ones(16, 4)
    ),
    "function called with three states": lambda: torch._VF.lstm(X, (torch.ones(1, 2, 4),) * 3, *ARGUMENTS),
    "function called without states": lambda: torch._VF.lstm(X, None, *ARGUMENTS),
    "function called with no weights": lambda: torch._VF.lstm(
        X, (torch.ones(1, 2, 4),) * 2, [None] * 4, *ARGUMENTS[1:]
    ),
    "function of a cell called with 3-D input": lambda: torch._VF.lstm_cell(
        X, (torch.ones(5, 4),) * 2, torch.ones(16, 2), torch.ones(16, 4)
    ),
    "vmap": lambda: torch.vmap(nn.LSTM(3, 4))(X.unsqueeze(0)),
    "grad": lambda: torch.func.grad(lambda x: nn.LSTM(3, 4)(x)[0].sum())(X),
    "grad of a cell": lambda: torch.func.grad(lambda x: nn.LSTMCell(3, 4)(x)[0].sum())(X_CELL),
    "jvp": lambda: torch.func.jvp(lambda x: nn.LSTM(3, 4).double()(x)[0], (X.double(),), (X.double(),)),
    "make_fx": lambda: make_fx(lambda x: nn.LSTM(3, 4)(x)[0])(X).code,
    "export": lambda: exported(nn.LSTM(3, 4), X),
    "strict export": lambda: exported(nn.LSTM(3, 4), X, strict=True),
    "export of a cell": lambda: exported(nn.LSTMCell(3, 4), X_CELL),
    "quantized": lambda: quantized(nn.LSTM(3, 4))(X),
}


def exported(module, *arguments, strict=False):
    return str(torch.export.export(module, arguments, strict=strict).graph)


def quantized(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {nn.LSTM}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNTOUCHED)
def test_untouched(runs, case):
    assert_untouched(runs, UNTOUCHED[case])


def test_forward_mode(runs):
    module, x = nn.LSTM(3, 4).double(), X.double()

    def tangent():
        with torch.autograd.forward_ad.dual_level():
            y, _ = module(torch.autograd.forward_ad.make_dual(x, x))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    assert_untouched(runs, tangent)


def test_modes_see_torchs_operators(runs):
    class Function(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    class Dispatch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for module, x in ((nn.LSTM(3, 4), X), (nn.LSTMCell(3, 4), X_CELL)):
        for mode in (Function, Dispatch):
            seen = []

            def watched(module=module, x=x, mode=mode, seen=seen):
                seen.clear()
                with mode():
                    module(x)
                return [str(func) for func in seen]

            assert_untouched(runs, watched)
            assert seen


def test_fake_tensors(runs):
    def shape():
        with FakeTensorMode():
            return nn.LSTM(3, 4)(torch.empty(5, 2, 3))[0].shape

    assert_untouched(runs, shape)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("module", "x"), [(nn.LSTM(3, 4, 2), X), (nn.LSTMCell(3, 4), X_CELL)], ids=["lstm", "cell"])
def test_scripting_and_tracing(runs, module, x):
    expected = module(x)
    with fastlstm.enable():
        scripted = torch.jit.script(nn.Sequential(module))
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert not runs
        outputs = [scripted(x), traced(x)]
    for output in outputs:
        assert_same(output, expected, rtol=0, atol=0)
    assert f"aten::lstm{'_cell' * (x is X_CELL)}(" in str(scripted.inlined_graph)
    assert "fastlstm::" not in str(scripted.inlined_graph) + str(traced.inlined_graph)
    assert not runs


# torch.compile refuses an nn.LSTM and runs it as it is.


def graphs_of(function, *arguments, **options):
    """The targets in all graphs that torch.compile makes of ``function``, and its results."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    outputs = torch.compile(function, backend=counter, **options)(*arguments)
    torch.compiler.reset()
    return [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs], outputs


def test_compiled_code_breaks_at_the_lstm_and_runs_it(runs):
    lstm, cell = nn.LSTM(3, 4), nn.LSTMCell(3, 4)

    def function(x):
        y = x.sin()
        torch._dynamo.graph_break()
        y = lstm(y)[0].cos()
        torch._dynamo.graph_break()
        return hooked(x)[0] + y

    hooked = nn.LSTM(3, 4)  # comes to the kernels by way of nn.LSTM's own forward
    hooked.register_forward_hook(lambda *_: None)
    graphs, expected = graphs_of(function, X)
    assert not runs
    with fastlstm.enable():
        enabled_graphs, outputs = graphs_of(function, X)
        assert len(runs) == 2
        # A cell is compiled: torch's operators are fused with what is around them.
        assert graphs_of(cell, X_CELL, fullgraph=True)[0] == graphs_of(cell, X_CELL, fullgraph=True)[0]
        assert len(runs) == 2
    assert enabled_graphs == graphs
    assert "lstm" not in str(graphs)
    assert_same(outputs, expected)


def test_compiled_as_torch_compiles_it_where_it_is_allowed_to(runs):
    lstm = nn.LSTM(3, 4)
    with torch._dynamo.config.patch(allow_rnn=True):
        graphs, expected = graphs_of(lstm, X, fullgraph=True)
        with fastlstm.enable():
            enabled_graphs, outputs = graphs_of(lstm, X, fullgraph=True)
    assert enabled_graphs == graphs
    assert "lstm" in str(graphs)
    assert_same(outputs, expected, rtol=0, atol=0)
    assert not runs


def test_compiled_by_its_own_method(runs):
    module = nn.LSTM(3, 4)
    module.register_forward_hook(lambda *_: None)  # which makes torch compile all of a call
    results = []
    for context in (fastlstm.enable(), contextlib.nullcontext()):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        with context, torch._dynamo.config.patch(allow_rnn=True):
            module.compile(backend=counter, fullgraph=True)
            results.append((module(X), counter.frame_count, counter.op_count))
    torch.compiler.reset()
    assert_same(*results, rtol=0, atol=0)
    assert results[0][1] == 1
    assert not runs


# A GPU.


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_there_are_no_kernels_for_a_gpu_that_is_not_there():
    assert not enabling._has_kernels.__wrapped__(0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.skipif(not fastlstm.build_info()["cuda"], reason="fastlstm was built without CUDA")
def test_cuda(runs):
    module = nn.LSTM(3, 4, 2, bidirectional=True, dtype=torch.float64, device="cuda")
    x = torch.randn(5, 2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
    assert_runs(runs, module, x)
    assert_runs(runs, module, pack_sequence([x[:, 0], x[:3, 1]]))
    assert_runs(runs, nn.LSTMCell(3, 4, dtype=torch.float64, device="cuda"), x[0])
    assert_untouched(runs, lambda: module(x.detach(), (torch.zeros(4, 2, 4, dtype=torch.float64),) * 2))
    assert_untouched(runs, lambda: module.cpu()(x.detach()))


# enable and disable themselves.


def accelerated(runs, module=None):
    runs.clear()
    (module or nn.LSTM(3, 4))(X)
    nn.LSTMCell(3, 4)(X_CELL)
    assert len(runs) in (0, 2)
    assert fastlstm.is_enabled() == bool(runs)
    return bool(runs)


def test_calls_and_blocks_are_counted(runs):
    forward = nn.LSTM.forward
    assert not accelerated(runs)
    fastlstm.enable()
    assert accelerated(runs)
    with fastlstm.enable():
        fastlstm.enable()
        fastlstm.disable()
        assert accelerated(runs)
    assert accelerated(runs)
    fastlstm.enable()
    fastlstm.disable()
    assert accelerated(runs)
    assert nn.LSTM.forward is forward
    fastlstm.disable()
    assert not accelerated(runs)


def test_disable_undoes_a_call_not_a_block(runs):
    with pytest.raises(RuntimeError, match="must follow a call of enable"):
        fastlstm.disable()
    with fastlstm.enable():
        with pytest.raises(RuntimeError, match="must follow a call of enable"):
            fastlstm.disable()
        assert accelerated(runs)
    assert not accelerated(runs)


def test_exceptions_end_a_block_and_are_not_swallowed(runs):
    with pytest.raises(ZeroDivisionError), fastlstm.enable(), fastlstm.enable():
        assert accelerated(runs)
        raise ZeroDivisionError
    assert not accelerated(runs)


def test_one_object_for_several_blocks(runs):
    enabling = fastlstm.enable()
    with enabling, enabling:
        assert accelerated(runs)
    assert not accelerated(runs)
    with enabling:
        assert accelerated(runs)
    assert not accelerated(runs)


def test_decorator(runs):
    @fastlstm.enable()
    def recursive(depth):
        """Its words."""
        assert accelerated(runs)
        return depth and 1 + recursive(depth - 1)

    assert recursive.__doc__ == "Its words."
    assert not accelerated(runs)
    assert recursive(2) == 2
    assert not accelerated(runs)

    @fastlstm.enable()
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not accelerated(runs)

    def generator():
        yield

    async def coroutine():
        pass

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match=f"got the generator or coroutine function .*{function.__name__}"):
            fastlstm.enable()(function)
    assert not accelerated(runs)


def test_threads(runs):
    module = nn.LSTM(3, 4)
    expected = module(X)
    failures = []
    start = threading.Barrier(4)

    def toggle():
        start.wait()
        for _ in range(200):
            with fastlstm.enable():
                if not fastlstm.is_enabled():
                    failures.append("not enabled in a block")
                if not torch.allclose(module(X)[0], expected[0], atol=1e-6):
                    failures.append("wrong result")

    threads = [threading.Thread(target=toggle) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(runs) == 800


def test_a_function_that_another_library_has_replaced_stays():
    theirs = object()
    torch._VF.lstm_cell = theirs
    try:
        with pytest.raises(RuntimeError, match="must be the only one to replace lstm_cell"):
            fastlstm.enable()
        assert not fastlstm.is_enabled()
        assert torch._VF.lstm_cell is theirs
    finally:
        del torch._VF.lstm_cell
    with fastlstm.enable():
        assert fastlstm.is_enabled()


# torch's own module tests; test_upstream.py has them for FastLSTM.

for_both = pytest.mark.parametrize("cls", [nn.LSTM, nn.LSTMCell], ids=lambda cls: cls.__name__)


@for_both
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_upstream_inputs(runs, cls, training):
    listed = inputs_of(cls, training=training, requires_grad=True)
    assert listed
    for listed_input in listed:
        constructor, forward = listed_input.constructor_input, listed_input.forward_input
        module = cls(*constructor.args, **constructor.kwargs).double().train(training)
        args, kwargs = forward.args, forward.kwargs
        assert_runs(runs, module, *args, **kwargs)
        function, tensors = differentiable_function(module, args, kwargs)
        with fastlstm.enable():
            outputs = module(*args, **kwargs)
            assert torch.autograd.gradcheck(function, tensors, nondet_tol=0.0, fast_mode=True)
        reference = {**kwargs, "batch_first": module.batch_first} if cls is nn.LSTM else kwargs
        assert_same(outputs, listed_input.reference_fn(module, *args, **reference))


@for_both
def test_upstream_error_inputs(cls):
    for error in INFOS[cls].module_error_inputs_func(
        INFOS[cls], device="cpu", dtype=torch.float32, requires_grad=False, training=False
    ):
        constructor, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        with fastlstm.enable(), pytest.raises(error.error_type, match=error.error_regex):
            module = cls(*constructor.args, **constructor.kwargs)
            assert error.error_on != ModuleErrorEnum.CONSTRUCTION_ERROR
            module(*forward.args, **forward.kwargs)
