"""torch's own module tests, run on FastLSTM and FastLSTMCell with the inputs torch lists for its own.

The inputs, reference functions and error inputs come from ``torch.testing._internal.common_modules``, which
ships with torch; the checks are those of torch's test/test_modules.py. Its tests for several devices, for
in-place variants and for 4-D memory formats do not apply to an LSTM on one device.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state
from torch.utils import _pytree as pytree

from fastlstm import FastLSTM, FastLSTMCell

OURS = {nn.LSTM: FastLSTM, nn.LSTMCell: FastLSTMCell}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in OURS}

for_both = pytest.mark.parametrize("torchs", OURS, ids=lambda cls: cls.__name__)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def inputs_of(torchs, dtype=torch.float64, training=True, requires_grad=False):
    """List torch's constructor arguments, forward arguments and reference function."""
    return INFOS[torchs].module_inputs_func(
        INFOS[torchs], device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    )


def cases(torchs, dtype=torch.float64, training=True, requires_grad=False):
    """Yield ``(module, args, kwargs, reference function)`` for each of torch's inputs."""
    listed = inputs_of(torchs, dtype, training, requires_grad)
    assert listed
    for listed_input in listed:
        constructor, forward = listed_input.constructor_input, listed_input.forward_input
        module = OURS[torchs](*constructor.args, **constructor.kwargs).to(dtype).train(training)
        yield module, forward.args, forward.kwargs, listed_input.reference_fn


@for_both
@in_both_modes
@in_both_dtypes
def test_forward_matches_torchs_reference_function(torchs, training, dtype):
    for module, args, kwargs, reference in cases(torchs, dtype, training):
        with freeze_rng_state():
            outputs = module(*args, **kwargs)
        if torchs is nn.LSTM:
            kwargs = {**kwargs, "batch_first": module.batch_first}
        torch.testing.assert_close(outputs, reference(module, *args, **kwargs))


@for_both
@in_both_modes
def test_forward_matches_the_torch_module(torchs, training):
    for (module, args, kwargs, _), listed in zip(
        cases(torchs, training=training), inputs_of(torchs, training=training), strict=True
    ):
        other = torchs(*listed.constructor_input.args, **listed.constructor_input.kwargs).double()
        other.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(*args, **kwargs), other(*args, **kwargs))


@for_both
@in_both_dtypes
def test_factory_arguments(torchs, dtype):
    for listed in inputs_of(torchs, dtype):
        args, kwargs = listed.constructor_input.args, listed.constructor_input.kwargs
        default = OURS[torchs](*args, **kwargs)
        assert {(p.dtype, p.device.type) for p in default.parameters()} == {(torch.get_default_dtype(), "cpu")}
        module = OURS[torchs](*args, **kwargs, device="cpu", dtype=dtype)
        assert {(p.dtype, p.device.type) for p in module.parameters()} == {(dtype, "cpu")}
        meta = OURS[torchs](*args, **kwargs, device="meta", dtype=dtype)
        assert {(p.dtype, p.device.type) for p in meta.parameters()} == {(dtype, "meta")}


@for_both
def test_device_context_decides_where_parameters_are_made(torchs):
    for listed in inputs_of(torchs):
        with torch.device("meta"):
            module = OURS[torchs](*listed.constructor_input.args, **listed.constructor_input.kwargs)
        assert all(p.is_meta for p in module.parameters())


@for_both
def test_repr(torchs):
    for module, *_ in cases(torchs):
        assert str(module) == repr(module)
        assert repr(module).startswith(f"Fast{torchs.__name__}(")


@for_both
@in_both_modes
def test_pickle_and_deepcopy(torchs, training):
    for module, args, kwargs, _ in cases(torchs, training=training):
        expected = module(*args, **kwargs)
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        for duplicate in (
            pickle.loads(pickle.dumps(module)),
            torch.load(stream, weights_only=False),
            copy.deepcopy(module),
        ):
            torch.testing.assert_close(duplicate(*args, **kwargs), expected, rtol=0, atol=0)
            assert duplicate.state_dict().keys() == module.state_dict().keys()


def differentiable_function(module, args, kwargs):
    """The module as a function of tensors, as gradcheck wants it, and the tensors."""
    parameters = dict(module.named_parameters())
    leaves, spec = pytree.tree_flatten((args, kwargs))

    def function(*tensors):
        new_args, new_kwargs = pytree.tree_unflatten(list(tensors[: len(leaves)]), spec)
        new_parameters = dict(zip(parameters, tensors[len(leaves) :], strict=True))
        with freeze_rng_state():
            outputs = torch.func.functional_call(module, new_parameters, new_args, new_kwargs)
        return tuple(t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))

    return function, (*leaves, *parameters.values())


@for_both
@in_both_modes
def test_grad(torchs, training):
    for module, args, kwargs, _ in cases(torchs, training=training, requires_grad=True):
        function, tensors = differentiable_function(module, args, kwargs)
        # The whole Jacobian once, random projections of it for the other mode: without dropout they are the
        # same.
        assert torch.autograd.gradcheck(function, tensors, nondet_tol=0.0, fast_mode=not training)


@for_both
def test_gradgrad(torchs):
    for module, args, kwargs, _ in cases(torchs, requires_grad=True):
        function, tensors = differentiable_function(module, args, kwargs)
        assert torch.autograd.gradgradcheck(function, tensors, nondet_tol=0.0, fast_mode=True)


def spread_out(tensor):
    """The same values in a tensor with gaps between its elements."""
    wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor.detach())
    assert not wide.is_contiguous()
    return wide.requires_grad_(tensor.requires_grad)


@for_both
@in_both_modes
def test_non_contiguous_tensors(torchs, training):
    for module, args, kwargs, _ in cases(torchs, training=training, requires_grad=True):
        results = []
        for prepare in (lambda t: t.detach().requires_grad_(), spread_out):
            used_args, used_kwargs = pytree.tree_map(prepare, (args, kwargs))
            module.zero_grad()
            outputs = pytree.tree_leaves(module(*used_args, **used_kwargs))
            # The gradients that arrive are non-contiguous with non-contiguous arguments.
            torch.autograd.backward(outputs, [prepare(torch.ones_like(t)) for t in outputs])
            leaves = [*pytree.tree_leaves((used_args, used_kwargs)), *module.parameters()]
            results.append((outputs, [t.grad for t in leaves]))
        torch.testing.assert_close(*results)


@for_both
def test_conversion_of_dtype(torchs):
    for module, *_ in cases(torchs, torch.float32):
        parameters = list(module.parameters())
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            module.to(dtype)
            assert [p is q for p, q in zip(parameters, module.parameters(), strict=True)] == [True] * len(parameters)
            assert {p.dtype for p in module.parameters()} == {dtype}


@for_both
def test_to_empty(torchs):
    for listed in inputs_of(torchs):
        module = OURS[torchs](*listed.constructor_input.args, **listed.constructor_input.kwargs, device="meta")
        other = OURS[torchs](*listed.constructor_input.args, **listed.constructor_input.kwargs)
        module.to_empty(device="cpu")
        module.load_state_dict(other.state_dict())
        args, kwargs = listed.forward_input.args, listed.forward_input.kwargs
        torch.testing.assert_close(module.double()(*args, **kwargs), other.double()(*args, **kwargs), rtol=0, atol=0)


@for_both
def test_training_flag_is_read_if_torchs_is(torchs):
    for module, args, kwargs, _ in cases(torchs):
        del module.training
        if INFOS[torchs].train_and_eval_differ:
            with pytest.raises(AttributeError, match="training"):
                module(*args, **kwargs)
        else:
            module(*args, **kwargs)


@for_both
@in_both_dtypes
def test_error_inputs(torchs, dtype):
    listed = INFOS[torchs].module_error_inputs_func(
        INFOS[torchs], device="cpu", dtype=dtype, requires_grad=False, training=False
    )
    assert listed
    for error in listed:
        constructor, forward = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[torchs](*constructor.args, **constructor.kwargs)
        else:
            module = OURS[torchs](*constructor.args, **{"dtype": dtype, **constructor.kwargs})
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)
