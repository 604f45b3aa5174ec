"""The LSTM in plain, differentiable PyTorch: what every kernel of this package has to compute.

It is the oracle of the tests (run in fp64), the documentation of the mathematics, and the path of last resort
where a kernel has no formula of its own (double backward). Speed is no concern here: each step is one cell.

Sources: S. Hochreiter and J. Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997 (the cell);
F. Gers, J. Schmidhuber and F. Cummins, "Learning to Forget", Neural Computation 12(10), 2000 (the forget
gate); H. Sak, A. Senior and F. Beaufays, "Long Short-Term Memory Recurrent Neural Network Architectures for
Large Scale Acoustic Modeling", Interspeech 2014 (the projected output, LSTMP); Y. Gal and Z. Ghahramani, "A
Theoretically Grounded Application of Dropout in Recurrent Neural Networks", NIPS 2016 (recurrent dropout);
D. Krueger et al., "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations", ICLR 2017;
J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", arXiv:1607.06450, 2016 (layer normalisation,
equations 20 to 22 of the supplement).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm as normalize
from torch.nn.functional import linear

#: The parameters of layer normalisation of one direction of one layer: weight_ln_ih and _hh, weight_ln_c, bias_ln_c.
LAYER_NORM_WEIGHTS = 4


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    layer_norm: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """One step of one layer in one direction, in the dtype of its arguments.

    The rows of the weights hold the gates in the order i, f, g, o::

        i = sigmoid(W_ii x + b_ii + W_hi h + b_hi)      input gate
        f = sigmoid(W_if x + b_if + W_hf h + b_hf)      forget gate
        g = tanh   (W_ig x + b_ig + W_hg h + b_hg)      candidate
        o = sigmoid(W_io x + b_io + W_ho h + b_ho)      output gate
        c' = f * c + i * g
        h' = o * tanh(c')                               and with a projection  h' = W_hr (o * tanh(c'))

    With ``layer_norm``, where ``norm(v) = (v - mean(v)) / sqrt(variance(v) + 1e-5)`` over all elements of a row, those
    of the four gates together::

        W x of all gates    becomes  weight_ln_ih * norm(W_ih x)
        W h of all gates    becomes  weight_ln_hh * norm(W_hh h)
        tanh(c')            becomes  tanh(weight_ln_c * norm(c') + bias_ln_c)

    Args:
        x: input ``[B, I]``.
        h: hidden state ``[B, H]``, with a projection ``[B, P]``.
        c: cell state ``[B, H]``.
        weight_ih: ``[4H, I]``.
        weight_hh: ``[4H, H]``, with a projection ``[4H, P]``.
        bias_ih: ``[4H]`` or None.
        bias_hh: ``[4H]`` or None.
        weight_hr: projection ``[P, H]`` or None.
        layer_norm: weight_ln_ih ``[4H]``, weight_ln_hh ``[4H]``, weight_ln_c ``[H]`` and bias_ln_c ``[H]``, or none.

    Returns:
        The next states ``(h', c')``, shaped like ``(h, c)``.
    """
    if not layer_norm:
        gates = linear(x, weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)
    else:
        gain_ih, gain_hh, gain_c, bias_c = layer_norm
        gates = normalize(linear(x, weight_ih), gain_ih.shape, gain_ih, bias_ih)
        gates = gates + normalize(linear(h, weight_hh), gain_hh.shape, gain_hh, bias_hh)
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * (normalize(c, gain_c.shape, gain_c, bias_c) if layer_norm else c).tanh()
    return (h if weight_hr is None else linear(h, weight_hr)), c


def lstm(
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    has_bias: bool = True,
    reset_states: tuple[Tensor, Tensor] | None = None,
    recurrent_mask: Tensor | None = None,
    zoneout_h: Tensor | float = 0.0,
    zoneout_c: Tensor | float = 0.0,
    cell_layers: int = 0,
    layer_norm: bool = False,
) -> tuple[Tensor, ...]:
    """A whole stack of L layers in D directions; ``Hout`` is P with a projection and H without.

    fp16 and bf16 arguments are computed in fp32 and only the results are rounded.

    Args:
        x: input ``[T, B, I]`` with T > 0, or with ``batch_sizes`` the packed rows ``[N, I]``.
        weights: per layer, then per direction: w_ih, w_hh, [b_ih, b_hh], [w_hr], [the four of ``layer_norm``];
            shapes as in :func:`lstm_cell`, where the input of the layers above the first has D * Hout features.
        h_0: initial hidden states ``[L * D, B, Hout]``. The stack has projections where Hout is not H.
        c_0: initial cell states ``[L * D, B, H]``.
        batch_sizes: int64 ``[T]`` on the CPU, non-increasing: the sequences that are still running at each
            step, as in :class:`torch.nn.utils.rnn.PackedSequence`.
        lengths: int64 ``[B]``: the steps of each sequence. A state stands still where its sequence is not
            running, and the output there is zero.
        reset_mask: bool ``[T, B]`` (packed: ``[N]``): cuts the sequence before the steps it marks. Where a
            direction enters a new piece (the first direction at a marked step, the second at the step before
            it), its states are zero, or ``reset_states``.
        dropout_mask: multipliers ``[L - 1, T, B, D * Hout]`` (packed: ``[L - 1, N, D * Hout]``), already
            scaled by 1 / (1 - p), on the output of every layer but the last as the next layer sees it.
        num_layers: L.
        bidirectional: True for D = 2; the second direction runs from each sequence's last step to its first.
        has_bias: whether ``weights`` holds biases.
        reset_states: shaped like ``(h_0, c_0)``.
        recurrent_mask: factors ``[L * D, B, Hout]`` on h as W_hh multiplies it, the same at each step (Gal and
            Ghahramani 2016).
        zoneout_h: the part z of h' that keeps the value of the step before, h'' = z h + (1 - z) h' (Krueger et al.
            2017): bool ``[L * D, T, B, Hout]`` (packed: ``[L * D, N, Hout]``), or one number for all.
        zoneout_c: the same of c', ``[L * D, T, B, H]``; h' comes from c', not from what zoneout makes of it.
        cell_layers: the number of layers, the highest of the stack, whose cell states are returned.
        layer_norm: whether each cell has layer normalisation.

    Returns:
        ``(y, h_n, c_n)``: y shaped like x with D * Hout features, the final states shaped like ``h_0`` and
        ``c_0``; with ``cell_layers`` also the cell states ``[cell_layers * D, T, B, H]`` (packed: ``N`` for T, B),
        zero where a sequence is not running.
    """
    directions = 2 if bidirectional else 1
    projected = h_0.size(-1) != c_0.size(-1)
    plain = 2 + 2 * has_bias + projected
    count = plain + LAYER_NORM_WEIGHTS * layer_norm
    sizes = [x.size(1)] * x.size(0) if batch_sizes is None else batch_sizes.tolist()
    masks = None if reset_mask is None else torch.split(reset_mask.flatten(), sizes)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if lengths is not None:  # what lies behind the end must not reach a gradient, not even as 0 * NaN
        running = torch.arange(x.size(0), device=x.device).unsqueeze(1) < lengths
        x = torch.where(running.unsqueeze(2), x, 0)
    layer_input = x.flatten(0, -2).to(dtype)
    final_h, final_c, cell_states = [], [], []
    for layer in range(num_layers):
        steps = torch.split(layer_input, sizes)
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            w = [weight.to(dtype) for weight in weights[k * count : (k + 1) * count]]
            w_ih, w_hh, w_hr = w[0], w[1], w[plain - 1] if projected else None
            b_ih, b_hh = w[2:4] if has_bias else (None, None)
            h, c = h_0[k].to(dtype), c_0[k].to(dtype)
            reset = None if reset_states is None else [state[k].to(dtype) for state in reset_states]
            kept_h, kept_c = (_steps_of(z, k, sizes, dtype) for z in (zoneout_h, zoneout_c))
            y, cells = list(steps), list(steps)
            reverse = k % directions == 1
            for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
                h_t, c_t = h[: sizes[t]], c[: sizes[t]]
                entered = t + 1 if reverse else t
                if masks is not None and entered < len(sizes):
                    marks = masks[entered] if lengths is None else masks[entered] & (lengths > entered)
                    h_t, c_t = (_reset(s, marks, r) for s, r in zip((h_t, c_t), reset or (None, None), strict=True))
                read = h_t if recurrent_mask is None else h_t * recurrent_mask[k][: sizes[t]].to(dtype)
                h_1, c_1 = lstm_cell(steps[t], read, c_t, w_ih, w_hh, b_ih, b_hh, w_hr, w[plain:])
                h_1, c_1 = _zoned(kept_h[t], h_t, h_1), _zoned(kept_c[t], c_t, c_1)
                y[t], cells[t] = h_1, c_1
                if lengths is not None:
                    running = (lengths > t).unsqueeze(1)
                    y[t], cells[t] = torch.where(running, h_1, 0), torch.where(running, c_1, 0)
                    h_1, c_1 = torch.where(running, h_1, h), torch.where(running, c_1, c)
                # The other rows have ended already (forward) or have not begun yet (reverse).
                h, c = torch.cat([h_1, h[sizes[t] :]]), torch.cat([c_1, c[sizes[t] :]])
            outputs.append(torch.cat(y))
            cell_states.append(torch.cat(cells))
            final_h.append(h)
            final_c.append(c)
        layer_input = torch.cat(outputs, dim=1)
        if dropout_mask is not None and layer < num_layers - 1:
            layer_input = layer_input * dropout_mask[layer].flatten(0, -2).to(dtype)
    y_all = layer_input.reshape(*x.shape[:-1], layer_input.size(1))
    results = [y_all, torch.stack(final_h), torch.stack(final_c)]
    if cell_layers:
        of_all = torch.stack(cell_states[-cell_layers * directions :])
        results.append(of_all.reshape(of_all.size(0), *x.shape[:-1], of_all.size(2)))
    return tuple(result.to(x.dtype) for result in results)


def _reset(state: Tensor, marks: Tensor, reset: Tensor | None) -> Tensor:
    """``state`` with the rows that are marked set to those of ``reset``, or to zero; marks may be of fewer rows."""
    rows = marks.size(0)
    value: Tensor | int = 0 if reset is None else reset[:rows]
    return torch.cat([torch.where(marks.unsqueeze(1), value, state[:rows]), state[rows:]])


def _steps_of(zoneout: Tensor | float, k: int, sizes: list[int], dtype: torch.dtype) -> Sequence[Tensor | float]:
    """What zoneout keeps of state k, for each step: of its rows, or one number."""
    if not isinstance(zoneout, Tensor):
        return [zoneout] * len(sizes)
    return torch.split(zoneout[k].flatten(0, -2).to(dtype), sizes)


def _zoned(kept: Tensor | float, before: Tensor, now: Tensor) -> Tensor:
    if not isinstance(kept, Tensor) and kept == 0:
        return now
    return kept * before + (1 - kept) * now
