"""The registered operators, bare: the compiled extension, their arguments, and what they compute in plain PyTorch.

The only user of ``torch.ops.fastlstm``; the schemas stand in ``csrc/ops.cpp``. ``_ops.py`` puts fakes, autocast and
derivatives around them, ``transforms.py`` those of torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm import reference

_REBUILD = "build it again with: pip install --no-build-isolation --no-deps --force-reinstall <fastlstm's directory>"

try:
    from fastlstm import _C as _C  # importing it registers the operators
except ImportError as error:
    message = f"fastlstm's extension module does not load into torch {torch.__version__} ({error}); {_REBUILD}"
    raise ImportError(message) from error
# It uses torch's C++ interface, which changes with every minor version.
if _C.torch_built.split(".")[:2] != torch.__version__.split(".")[:2]:
    raise ImportError(
        f"fastlstm was built against torch {_C.torch_built} and cannot run with torch {torch.__version__}; {_REBUILD}"
    )

lstm = torch.ops.fastlstm.lstm.default
lstm_backward = torch.ops.fastlstm.lstm_backward.default


class Extras(NamedTuple):
    """What is rarely asked of the operator, in the order of its schema (``csrc/ops.cpp``); nothing by default."""

    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None
    zoneout_rate_h: float = 0.0
    zoneout_rate_c: float = 0.0
    cell_layers: int = 0
    recompute: bool = False
    layer_norm: bool = False


NO_EXTRAS = Extras()


class Options(NamedTuple):
    """What the operator takes beside x, weights, h_0 and c_0."""

    batch_sizes: Tensor | None
    lengths: Tensor | None
    reset_mask: Tensor | None
    dropout_mask: Tensor | None
    num_layers: int
    bidirectional: bool
    has_bias: bool
    reduced_products: bool
    extras: Extras = NO_EXTRAS

    def of_forward(self, save: bool) -> tuple[Any, ...]:
        """The arguments of ``fastlstm::lstm`` behind c_0."""
        return *self[:-1], save, *self.extras

    def of_backward(
        self, needs: Sequence[int], d_cell_states: Tensor | None = None, groups: int = 1
    ) -> tuple[Any, ...]:
        """The arguments of ``fastlstm::lstm_backward`` behind ``saved``."""
        return *self[:-1], list(needs), d_cell_states, *self.extras[:-3], groups, self.extras.layer_norm


def reference_of_options(
    x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor, options: Options
) -> tuple[Tensor, ...]:
    """The operator as differentiable PyTorch: what derivatives without a formula of their own are taken of."""
    single_step = options.batch_sizes is None and h_0.dim() == 2
    extras = options.extras
    if single_step:
        x, h_0, c_0 = x.unsqueeze(0), h_0.unsqueeze(0), c_0.unsqueeze(0)

    def whole(tensor: Tensor | None, dim: int) -> Tensor | None:
        return tensor.unsqueeze(dim) if single_step and tensor is not None else tensor

    reset_h, reset_c = whole(extras.reset_h, 0), whole(extras.reset_c, 0)
    zoneout_h, zoneout_c = whole(extras.zoneout_h, 1), whole(extras.zoneout_c, 1)
    y, h_n, c_n, *cell_states = reference.lstm(
        x,
        weights,
        h_0,
        c_0,
        num_layers=options.num_layers,
        bidirectional=options.bidirectional,
        has_bias=options.has_bias,
        batch_sizes=options.batch_sizes,
        lengths=options.lengths,
        reset_mask=whole(options.reset_mask, 0),
        dropout_mask=options.dropout_mask,
        reset_states=None if reset_h is None or reset_c is None else (reset_h, reset_c),
        recurrent_mask=whole(extras.recurrent_mask, 0),
        zoneout_h=extras.zoneout_rate_h if zoneout_h is None else zoneout_h,
        zoneout_c=extras.zoneout_rate_c if zoneout_c is None else zoneout_c,
        cell_layers=extras.cell_layers,
        layer_norm=extras.layer_norm,
    )
    if single_step:
        return y.squeeze(0), h_n.squeeze(0), c_n.squeeze(0), *(c.squeeze(1) for c in cell_states)
    return y, h_n, c_n, *cell_states
