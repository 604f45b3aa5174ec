"""ONNX: models with FastLSTM or FastLSTMCell as files of standard operators, one ``LSTM`` node for each layer.

:func:`export` is torch.onnx.export for models that hold this package's operator; :func:`translation_table` is for those
who call torch.onnx.export themselves. Both need the packages onnx and onnxscript: ``pip install "fastlstm[onnx]"``.

Source of the layouts: the operator ``LSTM`` of ONNX, https://onnx.ai/onnx/operators/onnx__LSTM.html. It has the gates
in the order i, o, f, c (our i, o, f, g), a dimension for the direction in front of its weights and in its output, and
one vector for both biases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlstm import _operators

if TYPE_CHECKING:
    from onnx_ir import Model, Node, Value

_Table = dict[Callable[..., Any], Callable[..., Any]]

# The operator's arguments that a translation reads, and those that it may ignore: whether products may be rounded, and
# what is kept for a backward pass.
_TRANSLATED = frozenset({"x", "weights", "h_0", "c_0", "lengths", "num_layers", "bidirectional", "has_bias"})
_WITHOUT_EFFECT = frozenset({"recompute", "reduced_products", "save"})
# What to do instead of giving one of the others.
_REMEDIES = {
    "batch_sizes": "pass padded input and lengths instead of a PackedSequence",
    "reset_mask": "export a model of one step that multiplies the states by the mask, and loop over it",
    **dict.fromkeys(
        ("dropout_mask", "recurrent_mask", "zoneout_h", "zoneout_c"), "call model.eval() before the export"
    ),
    **dict.fromkeys(("zoneout_rate_h", "zoneout_rate_c"), "set zoneout = (0.0, 0.0), or export a loop over one step"),
    "cell_layers": "export the model without return_cell_states",
}
_GATES = (0, 3, 1, 2)  # i, o, f, c of ONNX as indices into our i, f, g, o


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    custom_translation_table: _Table | None = None,
    optimize: bool = True,
    export_params: bool = True,
    keep_initializers_as_inputs: bool = False,
    external_data: bool = True,
    **options: Any,
) -> torch.onnx.ONNXProgram:
    """Export a model with FastLSTM to ONNX; takes the arguments of :func:`torch.onnx.export`.

    A stack becomes one ``LSTM`` node for each layer, which runs both directions. Weights that are parameters are
    stored in ONNX's layout; the graph computes those that the model computes. ``lengths`` becomes ``sequence_lens``.

    Args:
        model: a module, best in eval mode, or the result of torch.export.export.
        args: example inputs. Whatever ``dynamic_shapes`` does not name keeps their sizes.
        f: the file to write, if any.
        custom_translation_table: translations of further operators.
        optimize: whether to simplify the graph. Without it the graph computes the layout of all weights.
        export_params: whether to write the weights into the file.
        keep_initializers_as_inputs: whether the weights are inputs of the graph too.
        external_data: whether to write the weights into a second file beside the first.
        **options: others of torch.onnx.export with ``dynamo=True``: ``dynamic_shapes`` for batches and sequences of
            any size, ``input_names``, ``verbose`` and so on.

    Returns:
        The program, which can be run, inspected and saved.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: ``dynamo`` is False.
        NotImplementedError: the model uses what the LSTM of ONNX does not have: a projection, ``reset_mask``, a
            PackedSequence, dropout in training mode, bfloat16.
        torch.onnx.OnnxExporterError: torch.onnx.export failed for another reason.
    """
    table = translation_table() | (custom_translation_table or {})
    if not options.setdefault("dynamo", True):
        raise ValueError("dynamo must be True, the exporter without torch.export does not know FastLSTM; got False")
    try:
        program = torch.onnx.export(model, args, custom_translation_table=table, optimize=False, **options)
    except torch.onnx.OnnxExporterError as error:
        reason = _reason_of(error)
        if reason is None:
            raise
        raise NotImplementedError(str(reason)) from error
    assert program is not None  # which torch.onnx.export returns without dynamo
    if optimize:
        _store_weights_in_layout(program.model)
        program.optimize()
        _leave_out_zero_states(program.model)
    if f is not None:
        program.save(
            f,
            include_initializers=export_params,
            keep_initializers_as_inputs=keep_initializers_as_inputs,
            external_data=external_data,
        )
    return program


def translation_table() -> _Table:
    """The ``custom_translation_table`` with which :func:`torch.onnx.export` knows FastLSTM and FastLSTMCell.

    Raises:
        ImportError: onnx or onnxscript is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX export needs the packages of fastlstm[onnx], and {error.name} is missing") from error
    return {_operators.lstm: _translate}


class _NotInOnnx(NotImplementedError):
    """The operator was called with what the LSTM of ONNX does not have."""


def _reason_of(error: BaseException) -> _NotInOnnx | None:
    """The refusal of :func:`_translate` that the exporter has wrapped into errors of its own, if that is the cause."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _NotInOnnx):
        cause = cause.__cause__
    return cause


def _translate(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:  # Any, for the exporter evaluates annotations
    """The operator as nodes of ONNX: its arguments are values of the graph, and so are y, h_n and c_n."""
    op = _onnx_operators()
    names = [argument.name for argument in _operators.lstm._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    _check(given)
    x, weights, h_0, c_0, lengths = (given[name] for name in ("x", "weights", "h_0", "c_0", "lengths"))
    layers, directions = given["num_layers"], 2 if given["bidirectional"] else 1
    hidden_size = weights[0].shape[0] // 4
    single_step = len(h_0.shape) == 2
    if single_step:
        x, h_0, c_0 = (op.Unsqueeze(tensor, [0]) for tensor in (x, h_0, c_0))

    steps = None if lengths is None else op.Cast(lengths, to=6)  # int32
    rows = op.Constant(value_ints=[gate * hidden_size + unit for gate in _GATES for unit in range(hidden_size)])
    count = len(weights) // layers
    final_h, final_c = [], []
    for layer in range(layers):
        layer_weights = _in_layout(weights[layer * count : (layer + 1) * count], rows, directions, given["has_bias"])
        first, end = [layer * directions], [(layer + 1) * directions]
        states = (h_0, c_0) if layers == 1 else [op.Slice(state, first, end, [0]) for state in (h_0, c_0)]
        direction = "bidirectional" if directions == 2 else "forward"
        y, h_n, c_n = op.LSTM(x, *layer_weights, steps, *states, hidden_size=hidden_size, direction=direction)
        final_h.append(h_n)
        final_c.append(c_n)
        if directions == 1:  # [T, 1, B, H] -> [T, B, H]
            x = op.Squeeze(y, [1])
        else:  # [T, 2, B, H] -> [T, B, 2H]; a size of 0 leaves it as it is
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, directions * hidden_size])
    h_n, c_n = (tensors[0] if layers == 1 else op.Concat(*tensors, axis=0) for tensors in (final_h, final_c))
    if lengths is not None:
        # ONNX does not say what the final states of a sequence of no steps are; ONNX Runtime returns zeros.
        no_steps = op.Unsqueeze(op.Equal(lengths, op.Constant(value_int=0)), [1])
        h_n, c_n = op.Where(no_steps, h_0, h_n), op.Where(no_steps, c_0, c_n)
    if single_step:
        x, h_n, c_n = (op.Squeeze(tensor, [0]) for tensor in (x, h_n, c_n))
    return x, h_n, c_n


def _onnx_operators() -> Any:  # Any, for the types in onnxscript are those of tensors, not of values of a graph
    """The functions that add nodes to the graph which is being exported, in the opset of torch's own translations."""
    from onnxscript import opset18

    return opset18


def _check(given: dict[str, Any]) -> None:
    """Raise for arguments that the LSTM of ONNX has no form for, those that this module does not know included."""
    from onnx_ir import DataType, Value

    for name, value in given.items():
        absent = not isinstance(value, Value) and not value
        if not absent and name not in _TRANSLATED | _WITHOUT_EFFECT:
            raise _NotInOnnx(f"the LSTM of ONNX has no {name}; {_REMEDIES.get(name, 'export the model without it')}")
    hidden_size, out_size = given["weights"][0].shape[0] // 4, given["weights"][1].shape[1]
    if out_size != hidden_size:
        raise _NotInOnnx(
            f"the LSTM of ONNX has no projections, got proj_size = {out_size}; "
            "export a model of one step, of fastlstm.reference.lstm_cell, and loop over it"
        )
    if given["x"].dtype == DataType.BFLOAT16:
        raise _NotInOnnx("the LSTM of ONNX has no bfloat16 before opset 22; export model.float()")


def _in_layout(
    weights: Sequence[Value], rows: Value, directions: int, has_bias: bool
) -> tuple[Value, Value, Value | None]:
    """One layer's W ``[D, 4H, I]``, R ``[D, 4H, H]`` and B ``[D, 8H]``, if any, from our weights of each direction.

    ``rows``: the index in our weights of each row of ONNX's.
    """
    op = _onnx_operators()

    def per_direction(tensors: Sequence[Value]) -> Any:
        stacked = [op.Unsqueeze(tensor, [0]) for tensor in tensors]
        return stacked[0] if directions == 1 else op.Concat(*stacked, axis=0)

    gathered = [op.Gather(weight, rows, axis=0) for weight in weights]
    count = len(weights) // directions
    w, r = per_direction(gathered[0::count]), per_direction(gathered[1::count])
    if not has_bias:
        return w, r, None
    both = [op.Concat(b_ih, b_hh, axis=0) for b_ih, b_hh in zip(gathered[2::count], gathered[3::count], strict=True)]
    return w, r, per_direction(both)


def _store_weights_in_layout(model: Model) -> None:
    """Compute in advance, of constant weights, what :func:`_in_layout` has made the graph compute.

    The optimizer would do it for small weights only: it keeps constants of more than some thousand elements.
    """
    from onnxscript.optimizer import fold_constants

    nodes = set()
    pending = [value for node in _lstm_nodes(model) for value in node.inputs[1:4]]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += node.inputs
    fold_constants(model, should_fold=lambda node: node in nodes, output_size_limit=sys.maxsize)


def _leave_out_zero_states(model: Model) -> None:
    """Leave out initial states that the graph fills with zeros, as ONNX's LSTM does without any."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in _lstm_nodes(model):
        for index in range(5, len(node.inputs)):
            if _is_zero(node.inputs[index]):
                node.replace_input_with(index, None)
    RemoveUnusedNodesPass()(model)


def _is_zero(value: Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type in ("Slice", "Cast"):
        return _is_zero(node.inputs[0])
    filled_with = node.attributes.get("value")
    return node.op_type == "ConstantOfShape" and (filled_with is None or not filled_with.as_tensor().numpy().any())


def _lstm_nodes(model: Model) -> Iterator[Node]:
    return (node for node in model.graph if node.op_type == "LSTM")
