"""FastLSTM and FastLSTMCell: drop-ins for torch.nn.LSTM and torch.nn.LSTMCell.

They hold the parameters, under the same names, in the same order and with the same initial values, and call
:mod:`fastlstm.functional`. They derive from nn.RNNBase and nn.RNNCellBase, not from nn.LSTM:
``torch.compile`` refuses every instance of nn.LSTM. :func:`fastlstm.swap_lstm` puts them into an existing
model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm import checks, functional
from fastlstm.functional import State

_Module = TypeVar("_Module", bound=nn.RNNBase | nn.RNNCellBase)

_LAYER_NORM = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")  # in the order of the operator


class FastLSTM(nn.RNNBase):
    """A multi-layer LSTM with the interface, the parameters and the results of :class:`torch.nn.LSTM`.

    The equations are those of :func:`fastlstm.reference.lstm_cell`. The same seed gives the same parameters
    as nn.LSTM, and a ``state_dict`` travels both ways with ``strict=True``. In the shapes below L is
    ``num_layers``, D is 2 if ``bidirectional`` else 1, H is ``hidden_size`` and ``Hout`` is ``proj_size`` if
    that is positive, else H.

    Differences from nn.LSTM: it compiles with ``torch.compile(fullgraph=True)``; it has no flat weight
    buffer, so :meth:`flatten_parameters` does nothing and the "not part of single contiguous chunk of memory"
    warning does not exist; the backward pass works in eval mode too, and so does a second one through the
    first; the error for states of another dtype says so; it is no instance of nn.LSTM and cannot be scripted
    by ``torch.jit`` (use :meth:`to_torch` for both).

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the cell state.
        num_layers: L, the layers, each fed by the one below.
        bias: whether the gates have biases.
        batch_first: whether input and output are ``[B, T, ...]`` instead of ``[T, B, ...]``. The states are
            ``[L * D, B, ...]`` in both cases.
        dropout: probability of zeroing an element of the output of every layer but the last in training.
        bidirectional: whether a second LSTM runs over the sequence backwards; the outputs are concatenated.
        proj_size: P < H, the size of the projected output (LSTMP), or 0 for none.
        device: of the parameters.
        dtype: of the parameters: fp32, fp64, bf16 or fp16.
        weight_dropout: probability of zeroing an element of the recurrent weights in a training call.
        recurrent_dropout: probability of zeroing an element of h, as the recurrent weights multiply it, in a training
            sequence.
        zoneout: probabilities (z_h, z_c) of an element of h and of c to keep its value in a training step.
        recompute: whether the backward pass computes the gates again instead of keeping them.
        layer_norm: whether the gates' products and the cell state are normalised, with the parameters below.

    For the last five see :func:`fastlstm.lstm`; all of them but ``layer_norm`` may be changed after construction, like
    ``dropout``.

    Attributes:
        weight_ih_l{k}: ``[4H, I]``, for k > 0 ``[4H, D * Hout]``; gates in the order i, f, g, o.
        weight_hh_l{k}: ``[4H, Hout]``.
        bias_ih_l{k}, bias_hh_l{k}: ``[4H]``, with ``bias``.
        weight_hr_l{k}: ``[P, H]``, with ``proj_size``.
        weight_ln_ih_l{k}, weight_ln_hh_l{k}: ``[4H]``, with ``layer_norm``: gains of the normalised products.
        weight_ln_c_l{k}, bias_ln_c_l{k}: ``[H]``, with ``layer_norm``: of the normalised cell state.
        ..._reverse: the same for the second direction.

    All of them are drawn from U(-1 / sqrt(H), 1 / sqrt(H)), but for those of ``layer_norm``, which are one and, for
    bias_ln_c, zero: the same seed gives the others the same values as without them.

    Raises:
        TypeError: ``input_size`` or ``hidden_size`` is not an int, or ``bias``, ``batch_first`` or ``layer_norm`` is
            not a bool.
        ValueError: a size is not positive, a probability is not in [0, 1] or ``proj_size`` is not in [0, H).
    """

    # Of a module that has been something else: an nn.LSTM, or pickled before there were these.
    weight_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    recompute: bool = False
    layer_norm: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: tuple[float, float] = (0.0, 0.0),
        recompute: bool = False,
        layer_norm: bool = False,
    ) -> None:
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(layer_norm).__name__}")
        checks.check_regularisers(weight_dropout, recurrent_dropout, zoneout)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        self.weight_dropout = weight_dropout
        self.recurrent_dropout = recurrent_dropout
        self.zoneout = zoneout
        self.recompute = recompute
        self.layer_norm = layer_norm
        if layer_norm:
            self._add_layer_norm()

    def _add_layer_norm(self) -> None:
        """Register the parameters of layer normalisation, behind the others of their direction."""
        for names in self._all_weights:
            for name in names:
                self._parameters[name] = self._parameters.pop(name)
            suffix = names[0].removeprefix("weight_ih")
            names += [name + suffix for name in _LAYER_NORM]
            for name in _LAYER_NORM:
                size = self.hidden_size if name.endswith("_c") else 4 * self.hidden_size
                fill = torch.zeros if name.startswith("bias") else torch.ones
                like = self._parameters[names[0]]
                values = fill(size, dtype=like.dtype, device=like.device)  # type: ignore[union-attr]
                self.register_parameter(name + suffix, nn.Parameter(values))
        self._flat_weights_names = [name for names in self._all_weights for name in names]

    def reset_parameters(self) -> None:
        """Draw the parameters anew, in nn.LSTM's order; those of ``layer_norm`` become one and zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, weight in self.named_parameters():
            if not name.startswith(_LAYER_NORM):
                nn.init.uniform_(weight, -bound, bound)
            elif name.startswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.ones_(weight)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_hx: State | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_hx: State | None = None,
        return_cell_states: Literal[True, "all"],
    ) -> tuple[Tensor, State, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        reset_mask: PackedSequence | None = None,
        reset_hx: State | None = None,
        return_cell_states: Literal[False] = False,
    ) -> tuple[PackedSequence, State]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        reset_mask: PackedSequence | None = None,
        reset_hx: State | None = None,
        return_cell_states: Literal[True, "all"],
    ) -> tuple[PackedSequence, State, PackedSequence | Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | PackedSequence | None = None,
        reset_hx: State | None = None,
        return_cell_states: bool | Literal["all"] = False,
    ) -> tuple[Tensor | PackedSequence, State] | tuple[Tensor | PackedSequence, State, Tensor | PackedSequence]:
        """Run the stack over a batch of sequences, one sequence or a PackedSequence.

        Args:
            input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, or packed. T > 0.
            hx: initial states ``(h_0 [L * D, B, Hout], c_0 [L * D, B, H])``, unbatched without B, in the
                order of the caller's batch also for a PackedSequence that was sorted. Zeros if None.
            lengths: int64 ``[B]``, each in [0, T]: the steps of each sequence of a padded batch, in any order;
                see :func:`fastlstm.lstm`. The result is that of packing and padding again, with sequences of
                no steps allowed.
            reset_mask: bool, shaped like the input without its features, packed like it where it is packed:
                where true, both states are zero before that step; see :func:`fastlstm.lstm`.
            reset_hx: the states that ``reset_mask`` sets in place of zeros, shaped and ordered like ``hx``.
            return_cell_states: whether to return c of each step: of the last layer, or with "all" of each layer.

        Returns:
            ``(output, (h_n, c_n))``: the output like the input with D * Hout features, the states like
            ``hx``. With ``return_cell_states`` also the cell states, like the input with D * H features; for "all" a
            tensor with a first dimension of L, which holds packed rows where the input is packed.

        Raises:
            ValueError, RuntimeError, NotImplementedError: as :func:`fastlstm.lstm`.
            TypeError: ``reset_mask`` is packed and ``input`` is not, or the other way round.
            ValueError: both are packed, with other lengths or in another order.
        """
        weights = _weights(self, self._flat_weights_names)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, weights, hx, lengths, reset_mask, reset_hx, return_cell_states)
        if isinstance(reset_mask, PackedSequence):
            raise TypeError("reset_mask must be a tensor like the input, got a PackedSequence")
        return self._run(input, weights, hx, None, lengths, reset_mask, reset_hx, return_cell_states)

    def _run(
        self,
        input: Tensor,
        weights: list[Tensor],
        hx: State | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset_mask: Tensor | None,
        reset_hx: State | None,
        return_cell_states: bool | Literal["all"],
    ) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
        return functional.run(
            input,
            weights,
            hx,
            self.num_layers,
            self.bidirectional,
            self.bias,
            self.batch_first,
            self.dropout,
            self.training,
            batch_sizes,
            lengths,
            reset_mask,
            functional.variant(
                reset_hx,
                self.weight_dropout,
                self.recurrent_dropout,
                self.zoneout,
                return_cell_states,
                self.recompute,
                self.layer_norm,
            ),
        )

    def _forward_packed(
        self,
        input: PackedSequence,
        weights: list[Tensor],
        hx: State | None,
        lengths: Tensor | None,
        reset_mask: Tensor | PackedSequence | None,
        reset_hx: State | None,
        return_cell_states: bool | Literal["all"],
    ) -> tuple[PackedSequence, State] | tuple[PackedSequence, State, PackedSequence | Tensor]:
        rows, batch_sizes, sorted_indices, unsorted_indices = input
        if isinstance(reset_mask, Tensor):
            raise TypeError("reset_mask must be a PackedSequence like the input, got a Tensor")
        if reset_mask is not None and not (
            _equal(reset_mask.batch_sizes, batch_sizes) and _equal(reset_mask.sorted_indices, sorted_indices)
        ):
            raise ValueError("reset_mask must be packed like the input, with the same lengths in the same order")
        output, states, *cells = self._run(
            rows,
            weights,
            hx if hx is None else self.permute_hidden(hx, sorted_indices),
            batch_sizes,
            lengths,
            None if reset_mask is None else reset_mask.data,
            reset_hx if reset_hx is None else self.permute_hidden(reset_hx, sorted_indices),
            return_cell_states,
        )

        def packed(rows: Tensor) -> PackedSequence:
            return PackedSequence(rows, batch_sizes, sorted_indices, unsorted_indices)

        states = self.permute_hidden(states, unsorted_indices)
        if not cells:
            return packed(output), states
        return packed(output), states, (cells[0] if return_cell_states == "all" else packed(cells[0]))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, nn.LSTM's before ours."""
        ours = ("weight_dropout", "recurrent_dropout", "zoneout", "recompute", "layer_norm")
        given = [f"{name}={getattr(self, name)}" for name in ours if getattr(self, name) != getattr(FastLSTM, name)]
        return ", ".join([super().extra_repr(), *given])

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:  # type: ignore[override]
        """Both states with their batch dimension in the order of ``permutation`` (None: as they are)."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def flatten_parameters(self) -> None:
        """Do nothing: the kernels read the weights where they are."""

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> FastLSTM:
        """Make a FastLSTM of an nn.LSTM, sharing its Parameter objects.

        Training either of them trains both, optimizers and tied weights stay valid, and the training flag is
        taken over. Hooks stay behind; :func:`fastlstm.swap_lstm` keeps them.

        Raises:
            TypeError: ``module`` is not an nn.LSTM, is a subclass of it, or has weights that are not
                Parameters (weight_norm, prune, parametrize).
        """
        return _with_parameters_of(module, nn.LSTM, cls)

    def to_torch(self) -> nn.LSTM:
        """Make an nn.LSTM of this module, sharing the Parameter objects; the inverse of :meth:`from_torch`.

        Raises:
            TypeError: this is a subclass of FastLSTM or has weights that are not Parameters.
            ValueError: it has a regulariser or layer normalisation, which nn.LSTM does not have.
        """
        if self.layer_norm:
            raise ValueError("nn.LSTM has no layer_norm, which this module has")
        for name, none in (("weight_dropout", 0), ("recurrent_dropout", 0), ("zoneout", (0, 0))):
            if getattr(self, name) != none:
                raise ValueError(f"nn.LSTM has no {name}; set it to {none} first, it is {getattr(self, name)}")
        return _with_parameters_of(self, FastLSTM, nn.LSTM)

    # nn.RNNBase keeps the weights in a second place, a list, for the flat buffer of cuDNN. Here the list is
    # derived from the attributes, so that nothing has to keep it up to date.

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: Sequence[Tensor | None]) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            if weight is not getattr(self, name, None):
                setattr(self, name, weight)

    def _init_flat_weights(self) -> None:
        """Do nothing: there is no list to rebuild."""

    def _update_flat_weights(self) -> None:
        """Do nothing: there is no list to update."""

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        # weight_norm and prune leave tensors they compute before each forward pass as plain attributes.
        # deepcopy refuses tensors with a history.
        for name in self._flat_weights_names:
            if isinstance(state.get(name), Tensor):
                state[name] = state[name].detach()
        return state


class FastLSTMCell(nn.RNNCellBase):
    """One step of an LSTM with the interface, the parameters and the results of :class:`torch.nn.LSTMCell`.

    The equations are those of :func:`fastlstm.reference.lstm_cell`; I is ``input_size``, H is
    ``hidden_size``.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of both states.
        bias: whether the gates have biases.
        device: of the parameters.
        dtype: of the parameters: fp32, fp64, bf16 or fp16.

    Attributes:
        weight_ih: ``[4H, I]``; gates in the order i, f, g, o.
        weight_hh: ``[4H, H]``.
        bias_ih, bias_hh: ``[4H]``, or None without ``bias``.

    All of them are drawn from U(-1 / sqrt(H), 1 / sqrt(H)).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Advance one step.

        Args:
            input: ``[B, I]`` or unbatched ``[I]``.
            hx: states ``(h, c)``, each ``[B, H]`` or unbatched ``[H]``. Zeros if None.

        Returns:
            The next states ``(h, c)``, shaped like ``hx``.

        Raises:
            ValueError, RuntimeError, NotImplementedError: as :func:`fastlstm.lstm_cell`.
        """
        return functional.lstm_cell(input, hx, *_weights(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))

    @classmethod
    def from_torch(cls, module: nn.LSTMCell) -> FastLSTMCell:
        """Make a FastLSTMCell sharing an nn.LSTMCell's Parameter objects; as :meth:`FastLSTM.from_torch`."""
        return _with_parameters_of(module, nn.LSTMCell, cls)

    def to_torch(self) -> nn.LSTMCell:
        """Make an nn.LSTMCell sharing this module's Parameter objects; as :meth:`FastLSTM.to_torch`."""
        return _with_parameters_of(self, FastLSTMCell, nn.LSTMCell)


def _weights(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """The weights of these names: Parameters or, pruned, parametrized or replicated, attributes or properties."""
    parameters = module._parameters  # quicker than attributes, which a step of streaming inference would feel
    return [parameters[name] if name in parameters else getattr(module, name) for name in names]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _with_parameters_of(source: nn.Module, expected: type[nn.Module], cls: type[_Module]) -> _Module:
    """A ``cls`` with the configuration, the training flag and the Parameter objects of ``source``."""
    if type(source) is not expected:
        raise TypeError(f"module must be of class {expected.__name__} itself, got {type(source).__name__}")
    names = [name for name in cls.__constants__ if name not in ("mode", "dropout")]
    # On the meta device nothing is allocated and nothing is drawn from the generator.
    result = cls(**{name: getattr(source, name) for name in names}, device="meta")
    if source._parameters.keys() != result._parameters.keys():
        raise TypeError(
            f"the weights of module must be Parameters named {list(result._parameters)}, "
            f"got {list(source._parameters)}; swap_lstm() keeps weight_norm, prune and parametrizations"
        )
    for name, parameter in source._parameters.items():
        setattr(result, name, parameter)
    if isinstance(source, nn.RNNBase) and isinstance(result, nn.RNNBase):
        # Assigned here because the constructor would repeat its warning about dropout in a single layer.
        result.dropout = source.dropout
    result.train(source.training)
    return result
