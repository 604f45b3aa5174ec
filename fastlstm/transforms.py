"""Derivatives of the operators under torch.func, and second ones: grad, vjp, vmap, jvp and what is made of them.

Two autograd.Functions, the forward and the backward pass, run the compiled kernels:

* ``vmap`` over sequences makes one call of a larger batch. The gradients of the weights then stay apart for each
  sample (``groups`` of the operator), which is what per-sample gradients are: one backward pass, and for each sample
  one product of its rows.
* ``vmap`` over weights (an ensemble), or over gradients of one forward pass, calls the kernels in a loop.
* Forward mode, and the derivatives of the backward pass, differentiate the reference.

Everything is in the operator's layout; see ``csrc/ops.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from fastlstm import _operators
from fastlstm._operators import Extras, Options, reference_of_options

Tensors = tuple[Tensor | None, ...]

_OUTPUTS = 3  # y, h_n, c_n


class _Structure(NamedTuple):
    """The arguments of the operator that are no tensors."""

    num_layers: int
    bidirectional: bool
    has_bias: bool
    reduced_products: bool
    zoneout_rate_h: float
    zoneout_rate_c: float
    cell_layers: int
    layer_norm: bool
    single_step: bool

    @property
    def saved(self) -> int:
        """How many tensors the operator saves."""
        return 5 if self.layer_norm else 3


class _Inputs(NamedTuple):
    """Its tensors but for the weights: those that it is differentiated by first."""

    x: Any
    h_0: Any
    c_0: Any
    reset_h: Any
    reset_c: Any
    batch_sizes: Any
    lengths: Any
    reset_mask: Any
    dropout_mask: Any
    recurrent_mask: Any
    zoneout_h: Any
    zoneout_c: Any


_VARIABLES, _INPUTS = 5, len(_Inputs._fields)


class _BatchDims(NamedTuple):
    """Which dimension the batch is."""

    inputs: _Inputs
    outputs: tuple[int, ...]  # y, h_n, c_n, cell_states
    saved: int  # with rows as _Lstm returns them


# Packed rows have no such dimension; they are only differentiated twice.
_OF_SEQUENCES = _BatchDims(_Inputs(1, 1, 1, 1, 1, None, 0, 1, 2, 1, 2, 2), (1, 1, 1, 2), 2)
_OF_STEP = _BatchDims(_Inputs(0, 0, 0, 0, 0, None, None, 0, None, 0, 1, 1), (0, 0, 0, 1), 2)


def _batch_dims(structure: _Structure) -> _BatchDims:
    return _OF_STEP if structure.single_step else _OF_SEQUENCES


def applicable() -> bool:
    """Whether the functions here serve the transforms that are active.

    Not where forward mode is nested in itself: a tangent of theirs has no tangent. Nor in forward mode outside of
    torch.func, in which torch.func's cannot be nested.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    forward_modes = sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)
    return bool(stack) and (forward_modes == 1 or forward_ad._current_level < 0)


def lstm(x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options) -> tuple[Tensor, ...]:
    """``fastlstm::lstm`` of rows that are not packed: y, h_n, c_n and the cell states that are asked for."""
    structure, inputs = _split(x, h_0, c_0, options)
    outputs = _Lstm.apply(structure, *inputs, *weights)  # type: ignore[no-untyped-call]
    return tuple(outputs[: -structure.saved])


def lstm_backward(
    d_outputs: Tensors,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    y: Tensor,
    saved: Sequence[Tensor],
    options: Options,
    needs: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    """``fastlstm::lstm_backward`` as a function that can be differentiated again. ``d_outputs``: d_cell_states last."""
    structure, inputs = _split(x, h_0, c_0, options)
    if d_outputs[-1] is not None:
        structure = structure._replace(cell_layers=d_outputs[-1].size(0) // (1 + options.bidirectional))
    of_resets = needs[-1] if options.extras.reset_h is not None else 0
    flags = [needs[0], needs[1], needs[1], of_resets, of_resets, *needs[2 : 2 + len(weights)]]
    gradients = _LstmBackward.apply(  # type: ignore[no-untyped-call]
        structure, flags, groups, *d_outputs, *inputs, *weights, y, *saved
    )
    d_x, d_h_0, d_c_0, d_reset_h, d_reset_c, *d_weights = gradients
    return d_x, d_h_0, d_c_0, d_weights, [d_reset_h, d_reset_c] if options.extras.reset_h is not None else []


def _split(x: Tensor, h_0: Tensor, c_0: Tensor, options: Options) -> tuple[_Structure, _Inputs]:
    extras = options.extras
    structure = _Structure(
        *options[4:8],
        extras.zoneout_rate_h,
        extras.zoneout_rate_c,
        extras.cell_layers,
        extras.layer_norm,
        single_step=options.batch_sizes is None and h_0.dim() == 2,
    )
    inputs = _Inputs(
        x,
        h_0,
        c_0,
        extras.reset_h,
        extras.reset_c,
        options.batch_sizes,
        options.lengths,
        options.reset_mask,
        options.dropout_mask,
        extras.recurrent_mask,
        extras.zoneout_h,
        extras.zoneout_c,
    )
    return structure, inputs


def _join(structure: _Structure, inputs: _Inputs) -> Options:
    extras = Extras(
        inputs.reset_h,
        inputs.reset_c,
        inputs.recurrent_mask,
        inputs.zoneout_h,
        inputs.zoneout_c,
        structure.zoneout_rate_h,
        structure.zoneout_rate_c,
        structure.cell_layers,
        layer_norm=structure.layer_norm,
    )
    return Options(inputs.batch_sizes, inputs.lengths, inputs.reset_mask, inputs.dropout_mask, *structure[:4], extras)


def _reference(structure: _Structure, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The outputs, of the inputs and the weights."""
    inputs = _Inputs(*tensors[:_INPUTS])
    return reference_of_options(inputs.x, tensors[_INPUTS:], inputs.h_0, inputs.c_0, _join(structure, inputs))


def _with(tensors: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    changed = list(tensors)
    for place, value in zip(places, values, strict=True):
        changed[place] = value
    return changed


# ------------------------------------------------------------------------------------------------ the forward pass


class _Lstm(torch.autograd.Function):
    """(structure, *_Inputs, *weights) -> (y, h_n, c_n, [cell_states], *saved).

    What is saved has its rows in two dimensions, T and B, so that a batch of batches is a view of it.
    """

    @staticmethod
    def forward(structure: _Structure, *tensors: Any) -> tuple[Tensor, ...]:
        inputs = _Inputs(*tensors[:_INPUTS])
        weights = list(tensors[_INPUTS:])
        options = _join(structure, inputs)
        y, h_n, c_n, saved, cell_states = _operators.lstm(
            inputs.x, weights, inputs.h_0, inputs.c_0, *options.of_forward(save=True)
        )
        rows = (1, *y.shape[:-1])[-2:]
        return y, h_n, c_n, *cell_states, *(s.view(s.size(0), *rows, s.size(-1)) for s in saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        structure, *tensors = inputs
        y, *_ = output
        saved = output[-structure.saved :]
        ctx.structure = structure
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, *saved)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        count = ctx.structure.saved
        tensors = ctx.saved_tensors[: -1 - count]
        needed = ctx.needs_input_grad[1:]
        flags = [needed[i] for i in (*range(_VARIABLES), *range(_INPUTS, len(tensors)))]
        d_y, d_h_n, d_c_n, *others = d_outputs[:-count]
        d_cells = others[0] if others else None
        gradients = _LstmBackward.apply(  # type: ignore[no-untyped-call]
            ctx.structure, flags, 1, d_y, d_h_n, d_c_n, d_cells, *ctx.saved_tensors
        )
        wanted = [g if f else None for g, f in zip(gradients, flags, strict=True)]
        return None, *wanted[:_VARIABLES], *(None,) * (_INPUTS - _VARIABLES), *wanted[_VARIABLES:]

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors[: len(tangents)]
        places = [i for i, tangent in enumerate(tangents) if tangent is not None]
        d_outputs = torch.func.jvp(
            lambda *values: _reference(ctx.structure, _with(tensors, places, values)),
            tuple(tensors[i] for i in places),
            tuple(tangents[i] for i in places),
        )[1]
        return *d_outputs, *(None,) * ctx.structure.saved

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], structure: _Structure, *tensors: Any) -> tuple[Any, Any]:
        dims = in_dims[1:]
        batch = _batch_dims(structure)
        out_dims = (*batch.outputs[: _OUTPUTS + bool(structure.cell_layers)], *(batch.saved,) * structure.saved)
        function = functools.partial(_Lstm.apply, structure)
        if any(dim is not None for dim in dims[_INPUTS:]):
            return _in_turn(function, info.batch_size, tensors, dims), (0,) * len(out_dims)
        together = _together(info.batch_size, tensors, dims, (*batch.inputs, *(None,) * len(tensors[_INPUTS:])))
        outputs = function(*together)
        return tuple(_apart(info.batch_size, t, dim) for t, dim in zip(outputs, out_dims, strict=True)), out_dims


# ------------------------------------------------------------------------------------------------ the backward pass


class _LstmBackward(torch.autograd.Function):
    """(structure, flags, groups, d_y, d_h_n, d_c_n, d_cell_states, *_Inputs, *weights, y, *saved) -> gradients.

    They are those of the variables among _Inputs, then those of the weights; empty where their flag is 0.
    """

    @staticmethod
    def forward(structure: _Structure, flags: Sequence[int], groups: int, *tensors: Any) -> tuple[Tensor, ...]:
        d_y, d_h_n, d_c_n, d_cells, *others = tensors[: -1 - structure.saved]
        y, *saved = tensors[-1 - structure.saved :]
        inputs, weights = _Inputs(*others[:_INPUTS]), others[_INPUTS:]
        options = _join(structure, inputs)
        needs = [int(flags[0]), int(flags[1] or flags[2]), *map(int, flags[_VARIABLES:])]
        has_resets = inputs.reset_h is not None
        if has_resets:
            needs.append(int(flags[3] or flags[4]))
        saved = [s.flatten(1, 2) if s.dim() == 4 else s for s in saved]
        d_x, d_h_0, d_c_0, d_weights, d_resets = _operators.lstm_backward(
            d_y, d_h_n, d_c_n, inputs.x, weights, inputs.h_0, inputs.c_0, y, saved,
            *options.of_backward(needs, d_cells, groups),
        )  # fmt: skip
        return d_x, d_h_0, d_c_0, *(d_resets if has_resets else (y.new_empty(0), y.new_empty(0))), *d_weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.structure, ctx.flags, ctx.groups, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor) -> tuple[Tensor | None, ...]:
        function, values, places = _LstmBackward._differentiable(ctx)
        vjp = torch.func.vjp(function, *values)[1]
        return None, None, None, *_with([None] * len(ctx.saved_tensors), places, vjp(d_gradients))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, ___: None, *tangents: Tensor | None) -> Any:
        function, values, places = _LstmBackward._differentiable(ctx)
        given = [tangents[place] for place in places]
        complete = [torch.zeros_like(v) if t is None else t for v, t in zip(values, given, strict=True)]
        return torch.func.jvp(function, tuple(values), tuple(complete))[1]

    @staticmethod
    def _differentiable(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], list[int]]:
        """The gradients as a function of those of the outputs, the variables and the weights; these; their places."""
        tensors = ctx.saved_tensors[: -1 - ctx.structure.saved]
        variables = (*range(4 + _VARIABLES), *range(4 + _INPUTS, len(tensors)))
        places = [i for i in variables if tensors[i] is not None]
        batch = _batch_dims(ctx.structure)
        dims = (*batch.outputs, *batch.inputs, *(None,) * len(tensors[4 + _INPUTS :]))

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            all_values = _with(tensors, places, values)
            of_groups = [_gradients(ctx.structure, _group(g, ctx.groups, all_values, dims)) for g in range(ctx.groups)]
            results = []
            for i, flag, *parts in zip(variables[4:], ctx.flags, *of_groups, strict=True):
                if not flag:
                    results.append(values[0].new_empty(0))  # as the operator returns it
                elif dims[i] is not None:
                    results.append(torch.cat(parts, dims[i]))
                else:
                    results.append(torch.stack(parts) if ctx.groups > 1 else parts[0])
            return tuple(results)

        return function, [tensors[i] for i in places], places

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], structure: _Structure, flags: Sequence[int], groups: int, *tensors: Any
    ) -> tuple[Any, Any]:
        size, dims = info.batch_size, in_dims[3:]
        batch = _batch_dims(structure)
        weights = slice(4 + _INPUTS, len(tensors) - 1 - structure.saved)
        if any(dim is not None for dim in dims[weights]) or all(dim is None for dim in dims[4 : weights.start]):
            function = functools.partial(_LstmBackward.apply, structure, flags, groups)
            return _in_turn(function, size, tensors, dims), (0,) * len(flags)
        no_dims = (None,) * len(tensors[weights])
        of_saved = (batch.saved,) * structure.saved
        together = _together(
            size, tensors, dims, (*batch.outputs, *batch.inputs, *no_dims, batch.outputs[0], *of_saved)
        )
        gradients = _LstmBackward.apply(structure, flags, size * groups, *together)  # type: ignore[no-untyped-call]
        results: list[Tensor] = []
        out_dims: list[int | None] = []
        for i, (gradient, flag) in enumerate(zip(gradients, flags, strict=True)):
            if not flag:
                results.append(gradient)
                out_dims.append(None)
            elif i < _VARIABLES:
                dim = batch.inputs[i]
                results.append(_apart(size, gradient, dim))
                out_dims.append(dim)
            else:
                results.append(gradient.unflatten(0, (size, groups)) if groups > 1 else gradient)
                out_dims.append(0)
        return tuple(results), tuple(out_dims)


def _gradients(structure: _Structure, tensors: Sequence[Any]) -> list[Tensor | None]:
    """Of the variables and the weights, by differentiating the reference. ``tensors``: d_outputs, inputs, weights."""
    d_outputs, others = tensors[:4], tensors[4:]
    given = [i for i, d in enumerate(d_outputs) if d is not None]
    variables = (*range(_VARIABLES), *range(_INPUTS, len(others)))
    places = [i for i in variables if others[i] is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        found = _reference(structure, _with(others, places, values))
        return tuple(found[i] for i in given)

    vjp = torch.func.vjp(outputs, *(others[i] for i in places))[1]
    gradients = _with([None] * len(others), places, vjp(tuple(d_outputs[i] for i in given)))
    return [gradients[i] for i in variables]


# ------------------------------------------------------------------------------------------------ the bare operators


def one_call_per_sample(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The vmap rule of an operator that is called as such: by the backward pass of a call that knew of no transform."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        leaves, structure = tree_flatten(arguments)
        dims, _ = tree_flatten(in_dims)
        outputs: list[TreeSpec] = []

        def function(*one: Any) -> tuple[Any, ...]:
            results, of_results = tree_flatten(operator(*tree_unflatten(one, structure)))
            outputs.append(of_results)
            return tuple(results)

        stacked = tree_unflatten(_in_turn(function, info.batch_size, leaves, dims), outputs[0])
        return stacked, tree_map(lambda _: 0, stacked)

    return rule


# ------------------------------------------------------------------------------------------------ batches of batches


def _group(g: int, groups: int, tensors: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
    """One of ``groups`` equal parts of the batch."""

    def part(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if groups == 1 or tensor is None or dim is None:
            return tensor
        size = tensor.size(dim) // groups
        return tensor.narrow(dim, g * size, size)

    return [part(tensor, dim) for tensor, dim in zip(tensors, dims, strict=True)]


def _together(size: int, tensors: Sequence[Any], dims: Sequence[Any], batch_dims: Sequence[Any]) -> list[Any]:
    """Each tensor with its batch dimension ``size`` times as large: samples one after the other."""

    def fold(tensor: Tensor | None, dim: int | None, batch_dim: int | None) -> Tensor | None:
        if tensor is None or batch_dim is None:
            return tensor
        apart = tensor.unsqueeze(batch_dim) if dim is None else tensor.movedim(dim, batch_dim)
        if dim is None:
            apart = apart.expand(*apart.shape[:batch_dim], size, *apart.shape[batch_dim + 1 :])
        return apart.flatten(batch_dim, batch_dim + 1)

    return [fold(*one) for one in zip(tensors, dims, batch_dims, strict=True)]


def _apart(size: int, tensor: Tensor, dim: int) -> Tensor:
    """The inverse: samples in a dimension of their own, which is ``dim``."""
    return tensor.reshape(*tensor.shape[:dim], size, tensor.size(dim) // size, *tensor.shape[dim + 1 :])


def _in_turn(
    function: Callable[..., tuple[Tensor, ...]], size: int, tensors: Sequence[Any], dims: Sequence[Any]
) -> tuple[Tensor, ...]:
    """The function of each sample, its results stacked."""
    results = [
        function(*(t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(of_samples) for of_samples in zip(*results, strict=True))
