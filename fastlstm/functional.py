"""Stateless LSTM: :func:`lstm` for a stack over a sequence, :func:`lstm_cell` for a single step.

The modules call these two functions, and so may anyone who keeps the weights elsewhere. They bring the
caller's layout (``batch_first``, no batch dimension, no initial state) into the one layout of the operator and
draw the dropout masks. What does not fit is refused by the operator; only then do the checks of
:mod:`fastlstm.checks` look for the mistake, to name it as nn.LSTM does: a step of streaming inference has no
time for checking everything twice. (``torch.compile`` traces the checks: there they cost nothing at run time.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastlstm import _ops, checks
from fastlstm._operators import NO_EXTRAS, Extras

State = tuple[Tensor, Tensor]


@overload
def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: State | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_hx: State | None = None,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    return_cell_states: Literal[False] = False,
    recompute: bool = False,
    layer_norm: bool = False,
) -> tuple[Tensor, State]: ...


@overload
def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: State | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_hx: State | None = None,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    return_cell_states: Literal[True, "all"],
    recompute: bool = False,
    layer_norm: bool = False,
) -> tuple[Tensor, State, Tensor]: ...


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: State | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_hx: State | None = None,
    weight_dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    return_cell_states: bool | Literal["all"] = False,
    recompute: bool = False,
    layer_norm: bool = False,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """Run a stack of L = ``num_layers`` LSTM layers in D directions over a sequence.

    The equations are those of :func:`fastlstm.reference.lstm_cell`. H is the hidden size, P the size of the
    projection and ``Hout`` is P where there is one, else H; all of them, and I, are read off the weights.

    Args:
        input: ``[T, B, I]``; with ``batch_first`` ``[B, T, I]``; unbatched ``[T, I]``; with ``batch_sizes``
            the packed rows ``[N, I]``. T > 0; B may be 0. fp32, fp64, bf16 or fp16, the dtype of the weights
            (any of them under autocast, which computes in and returns the low precision).
        weights: per layer, then per direction: w_ih ``[4H, I or D * Hout]``, w_hh ``[4H, Hout]``, with
            ``bias`` b_ih and b_hh ``[4H]``, with a projection w_hr ``[P, H]``. Gates in the order i, f, g, o.
            This is the order of ``list(nn.LSTM(...).parameters())``.
        hx: initial states ``(h_0 [L * D, B, Hout], c_0 [L * D, B, H])`` whatever ``batch_first`` says;
            without B for unbatched input. Zeros in the dtype of the input if None.
        num_layers: L.
        bidirectional: True for D = 2.
        bias: whether ``weights`` holds biases.
        batch_first: whether the batch is the first dimension of ``input`` and of the output. Ignored for
            unbatched and for packed input.
        dropout: probability p of zeroing an element of the output of every layer but the last, as the next
            layer sees it; the rest is scaled by 1 / (1 - p). The masks come from torch's default generator.
        training: whether dropout applies.
        batch_sizes: ``batch_sizes`` of a :class:`torch.nn.utils.rnn.PackedSequence`: int64 ``[T]`` on the
            CPU, non-increasing. The states are then in the order of the sorted sequences.
        lengths: int64 ``[B]`` in any order, for unbatched input a scalar, each in [0, T]: the steps of each
            sequence of a padded input, in place of packing. The output is zero behind a sequence's end; the
            final states are those of its last step, for a sequence of no steps the initial ones; the reverse
            direction begins at its last step.
        reset_mask: bool, shaped like the input without its features (``[T, B]``, with ``batch_first``
            ``[B, T]``, ...): where true, both states are zero *before* that step, as at the first step of an
            episode. The mask cuts a sequence into pieces, so the reverse direction begins anew too: at the
            last step of each piece.
        reset_hx: the states that ``reset_mask`` sets in place of zeros, shaped like ``hx``; differentiable. A learned
            initial state is ``hx`` of the first call and ``reset_hx`` of all.
        weight_dropout: probability p of zeroing an element of each w_hh, for the whole call; the rest is scaled by
            1 / (1 - p) (DropConnect as in Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language
            Models", ICLR 2018). In training only, as are the next two.
        recurrent_dropout: probability p of zeroing an element of h as w_hh multiplies it, the same elements at each
            step of a sequence; the rest is scaled by 1 / (1 - p) (Gal and Ghahramani, "A Theoretically Grounded
            Application of Dropout in Recurrent Neural Networks", NIPS 2016).
        zoneout: probabilities (z_h, z_c) with which an element of h and of c keeps the value of the step before
            (Krueger et al., "Zoneout", ICLR 2017). Out of training both are the weights of an average of the two
            values, as the paper has it.
        return_cell_states: whether to return c of each step: of the last layer, or with "all" of each layer.
        recompute: whether the backward pass computes the gates again instead of keeping them: it keeps about a third
            of the memory and takes one product more.
        layer_norm: whether the gates' products and the cell state are normalised (Ba, Kiros and Hinton, "Layer
            Normalization", 2016); each direction then has four weights more, at its end: weight_ln_ih and
            weight_ln_hh ``[4H]``, weight_ln_c and bias_ln_c ``[H]``.

    Returns:
        ``(output, (h_n, c_n))``: the output shaped like the input with D * Hout features, the final states
        shaped like ``hx``. With ``return_cell_states`` also the cell states, shaped like the input with D * H
        features, for "all" with a first dimension of L.

    Raises:
        ValueError: ``input`` is neither 2-D nor 3-D, or its dtype is not that of the weights, or the number
            of weights does not fit ``num_layers``, ``bidirectional``, ``bias`` and ``layer_norm``, or a probability
            is not in [0, 1], or ``return_cell_states`` is neither a bool nor "all".
        RuntimeError: a size, dtype or device does not fit, or T = 0.
        NotImplementedError: there is no kernel for the device of the input.
    """
    asked = variant(reset_hx, weight_dropout, recurrent_dropout, zoneout, return_cell_states, recompute, layer_norm)
    return run(
        input,
        weights,
        hx,
        num_layers,
        bidirectional,
        bias,
        batch_first,
        dropout,
        training,
        batch_sizes,
        lengths,
        reset_mask,
        asked,
    )


class Variant(NamedTuple):
    """What a call asks for that nn.LSTM does not have; see :func:`lstm`."""

    reset_hx: State | None
    weight_dropout: float
    recurrent_dropout: float
    zoneout: tuple[float, float]
    return_cell_states: bool | str
    recompute: bool
    layer_norm: bool

    @property
    def regularises(self) -> bool:
        """Whether masks are drawn in training."""
        return bool(self.weight_dropout or self.recurrent_dropout) or self.zoneout != (0.0, 0.0)


PLAIN = Variant(None, 0.0, 0.0, (0.0, 0.0), False, False, False)


def variant(
    reset_hx: State | None,
    weight_dropout: float,
    recurrent_dropout: float,
    zoneout: tuple[float, float],
    return_cell_states: bool | str,
    recompute: bool,
    layer_norm: bool,
) -> Variant:
    """The Variant of these, which is PLAIN itself if they ask for nothing."""
    if (
        reset_hx is None
        and not (weight_dropout or recurrent_dropout or return_cell_states or recompute or layer_norm)
        and zoneout == (0.0, 0.0)
    ):
        return PLAIN
    return Variant(reset_hx, weight_dropout, recurrent_dropout, zoneout, return_cell_states, recompute, layer_norm)


def run(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: State | None,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset_mask: Tensor | None,
    variant: Variant,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """:func:`lstm` with arguments in order: matching them by name would be felt in a step of streaming inference."""
    if reset_mask is not None:
        checks.check_reset_mask(reset_mask, input.shape[:-1])
    x, unbatched = input, False
    if batch_sizes is not None:
        checks.check_batch_sizes(batch_sizes)
    else:
        rank = input.dim()
        unbatched = rank == 2
        if unbatched:
            x = input.unsqueeze(1)
            reset_mask = reset_mask if reset_mask is None else reset_mask.unsqueeze(1)
            lengths = lengths if lengths is None else lengths.unsqueeze(0)
        elif rank != 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {rank}D instead")
        elif batch_first:
            x = input.transpose(0, 1)
            reset_mask = reset_mask if reset_mask is None else reset_mask.transpose(0, 1)
    if hx is None:
        h_0, c_0 = _zero_states(x, weights, batch_sizes, num_layers, bidirectional, bias, variant.layer_norm)
    else:
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h_0, c_0 = hx
        if unbatched:
            _check_state_rank(input, h_0, c_0)
            h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
    if lengths is not None and lengths.device != x.device and not lengths.is_meta:
        lengths = lengths.to(x.device)
    if dropout and not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    structure = (num_layers, bidirectional, bias)
    draw = bool(dropout) and training and num_layers > 1
    extras, regularised = NO_EXTRAS, False
    if variant is not PLAIN:
        extras, regularised = _extras(variant, num_layers, reset_mask, unbatched), variant.regularises
        checks.check_regularisers(variant.weight_dropout, variant.recurrent_dropout, variant.zoneout)
    if draw or (regularised and training) or torch.compiler.is_compiling():
        # Before the draw: a call that fails leaves the generator as it was.
        _check(input, x, weights, h_0, c_0, batch_sizes, lengths, reset_mask, None, *structure, extras)
    mask = _draw_dropout_mask(x, dropout, num_layers - 1, (1 + bidirectional) * h_0.size(-1)) if draw else None
    if regularised:
        if training:
            per_direction = len(weights) // (num_layers * (1 + bidirectional))
            weights = _drop_weights(weights, variant.weight_dropout, per_direction)
        extras = _regularisers(extras, variant, x, h_0, c_0, training)

    arguments = (x, weights, h_0, c_0, batch_sizes, lengths, reset_mask, mask, *structure, extras)
    try:
        y, h_n, c_n, *cell_states = _ops.lstm(*arguments)
    except RuntimeError as error:
        raise _explained(error, x, _check, input, *arguments) from None

    if unbatched:
        y, h_n, c_n = y.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
    elif batch_first and batch_sizes is None:
        y = y.transpose(0, 1)
    if not cell_states:
        return y, (h_n, c_n)
    cells = cell_states[0]
    cells = torch.cat([cells[0::2], cells[1::2]], dim=-1) if bidirectional else cells
    if unbatched:
        cells = cells.squeeze(2)
    elif batch_first and batch_sizes is None:
        cells = cells.transpose(1, 2)
    return y, (h_n, c_n), (cells if variant.return_cell_states == "all" else cells.squeeze(0))


def lstm_cell(
    input: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> State:
    """Advance one step of one layer; the equations are those of :func:`fastlstm.reference.lstm_cell`.

    Args:
        input: ``[B, I]`` or unbatched ``[I]``; dtypes as for :func:`lstm`.
        hx: states ``(h [B, Hout], c [B, H])``, unbatched without B. Zeros in the dtype of the input if None.
        weight_ih: ``[4H, I]``, gates in the order i, f, g, o.
        weight_hh: ``[4H, Hout]``.
        bias_ih: ``[4H]``; given together with ``bias_hh`` or not at all.
        bias_hh: ``[4H]``.
        weight_hr: projection ``[P, H]`` with P < H; then ``Hout`` is P, else H. torch.nn.LSTMCell has none.

    Returns:
        The next states ``(h, c)``, shaped like ``hx``.

    Raises:
        ValueError: ``input`` or a state is neither 1-D nor 2-D, or one bias is given without the other.
        RuntimeError: a size, dtype or device does not fit.
        NotImplementedError: there is no kernel for the device of the input.
    """
    rank = input.dim()
    if rank not in (1, 2):
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {rank}D instead")
    weights = [weight_ih, weight_hh]
    if bias_ih is not None and bias_hh is not None:
        weights += (bias_ih, bias_hh)
    elif bias_ih is not bias_hh:
        raise ValueError("bias_ih and bias_hh must be given together, got only one of them")
    if weight_hr is not None:
        weights.append(weight_hr)
    bias = bias_ih is not None

    x = input if rank == 2 else input.unsqueeze(0)
    if hx is None:
        h, c = (state.squeeze(0) for state in _zero_states(x.unsqueeze(0), weights, None, 1, False, bias))
        hx = (h, c)
    else:
        if len(hx) != 2:
            raise RuntimeError("lstm_cell expects two hidden states")
        h, c = hx
        if rank == 1:
            h, c = h.unsqueeze(0), c.unsqueeze(0)
    if torch.compiler.is_compiling():
        _check_cell(hx, x, weights, h, c, bias)
    try:
        _, h_1, c_1 = _ops.lstm(x, weights, h, c, None, None, None, None, 1, False, bias)
    except RuntimeError as error:
        raise _explained(error, x, _check_cell, hx, x, weights, h, c, bias) from None
    return (h_1, c_1) if rank == 2 else (h_1.squeeze(0), c_1.squeeze(0))


def _zero_states(
    x: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    layer_norm: bool = False,
) -> State:
    directions = 2 if bidirectional else 1
    checks.check_weight_count(weights, num_layers, directions, bias, layer_norm)
    states, batch = num_layers * directions, x.size(1)
    if batch_sizes is not None:
        batch = int(batch_sizes[0]) if batch_sizes.size(0) else 0
    hidden_size, out_size = weights[0].size(0) // 4, weights[1].size(1)
    c_0 = x.new_zeros(states, batch, hidden_size)
    return (c_0 if out_size == hidden_size else x.new_zeros(states, batch, out_size)), c_0


def _draw_dropout_mask(x: Tensor, p: float, layers: int, features: int) -> Tensor:
    """Multipliers ``[layers, *x.shape[:-1], features]``: 1 / (1 - p) with probability 1 - p, else 0."""
    shape = (layers, *x.shape[:-1], features)
    if p == 1:
        return x.new_zeros(shape)
    mask = x.new_empty(shape)
    # One draw per layer, as nn.LSTM makes them: on the CPU the same seed then drops the same elements.
    for layer_mask in mask:
        layer_mask.bernoulli_(1 - p)
    return mask.div_(1 - p)


def _extras(variant: Variant, num_layers: int, reset_mask: Tensor | None, unbatched: bool) -> Extras:
    """Those of the operator that are no regularisers."""
    reset_hx, returned = variant.reset_hx, variant.return_cell_states
    if returned not in (True, False, "all"):
        raise ValueError(f'return_cell_states must be True, False or "all", got {returned!r}')
    reset_h, reset_c = None, None
    if reset_hx is not None:
        if len(reset_hx) != 2:
            raise RuntimeError(f"reset_hx must hold two states, like hx, got {len(reset_hx)}")
        if reset_mask is None:
            raise RuntimeError("reset_hx must come with a reset_mask, which says where these states are set")
        reset_h, reset_c = (state.unsqueeze(1) for state in reset_hx) if unbatched else reset_hx
    return Extras(
        reset_h=reset_h,
        reset_c=reset_c,
        cell_layers=num_layers if returned == "all" else int(returned),
        recompute=variant.recompute,
        layer_norm=variant.layer_norm,
    )


def _drop_weights(weights: Sequence[Tensor], p: float, per_direction: int) -> list[Tensor]:
    """The weights, each w_hh with elements dropped."""
    return [_drop(w, p) if p and i % per_direction == 1 else w for i, w in enumerate(weights)]


def _drop(tensor: Tensor, p: float) -> Tensor:
    """With elements zeroed with probability p and the rest scaled by 1 / (1 - p)."""
    if p == 1:
        return torch.zeros_like(tensor)
    return torch.where(_draw_marks(tensor.shape, p, tensor.device), 0, tensor / (1 - p))


def _draw_marks(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """A bool tensor, true with probability p, to within 2^-17.

    Four elements share a number of the generator. On the CPU ``bernoulli_`` draws one for each, which can take half as
    long as the training step that the marks are for.
    """
    if p == 1:
        return torch.ones(shape, dtype=torch.bool, device=device)
    count, limits = math.prod(shape), torch.iinfo(torch.int64)
    bits = torch.randint(limits.min, limits.max, ((count + 3) // 4,), dtype=torch.int64, device=device)
    return (bits.view(torch.int16)[:count] < round(p * 2**16) - 2**15).view(shape)


def _regularisers(extras: Extras, variant: Variant, x: Tensor, h_0: Tensor, c_0: Tensor, training: bool) -> Extras:
    """With the masks drawn that apply to a call in training, or the averages that do to others."""
    zoneout = variant.zoneout
    if not training:
        return extras._replace(zoneout_rate_h=float(zoneout[0]), zoneout_rate_c=float(zoneout[1]))
    if variant.recurrent_dropout:
        extras = extras._replace(recurrent_mask=_drop(torch.ones_like(h_0), variant.recurrent_dropout))

    def draw(state: Tensor, p: float) -> Tensor | None:
        shape = (state.size(0), *x.shape[:-1], state.size(-1))
        return _draw_marks(shape, p, x.device) if p else None

    return extras._replace(zoneout_h=draw(h_0, zoneout[0]), zoneout_c=draw(c_0, zoneout[1]))


def _check(input: Tensor, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, *options: Any) -> None:
    """Raise for what is wrong with the arguments of :func:`lstm`, if anything is; ``input`` is the caller's."""
    if input.dim() == 3:  # the states of unbatched input have been checked, and have a dimension more than they had
        _check_state_rank(input, h_0, c_0)
    checks.check_lstm(x, weights, h_0, c_0, *options)


def _check_cell(hx: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], h: Tensor, c: Tensor, bias: bool) -> None:
    """Raise for what is wrong with the arguments of :func:`lstm_cell`, if anything is; ``hx`` is the caller's."""
    for index, state in enumerate(hx):
        if state.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")
    checks.check_lstm_cell(x, weights, h, c, bias)


def _check_state_rank(input: Tensor, h_0: Tensor, c_0: Tensor) -> None:
    rank = input.dim()
    if not h_0.dim() == c_0.dim() == rank:
        kind = "unbatched" if rank == 2 else "batched"
        raise RuntimeError(
            f"For {kind} {rank}-D input, hx and cx should also be {rank}-D "
            f"but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
        )


def _explained(error: RuntimeError, x: Tensor, check: Callable[..., None], *arguments: Any) -> Exception:
    """What to raise for the operator's ``error``: the mistake that ``check`` finds, else the error itself."""
    try:
        check(*arguments)
    except (RuntimeError, ValueError) as mistake:
        return mistake
    if isinstance(error, NotImplementedError) and x.device.type not in ("cpu", "meta"):
        return NotImplementedError(
            f"this build of fastlstm has no LSTM kernel for tensors on {x.device}; move them to the CPU"
        )
    return error
