"""swap_lstm: turn every nn.LSTM and nn.LSTMCell of a model into a FastLSTM or FastLSTMCell, in place.

The modules stay the objects they are and only their class changes, as torch.nn.utils.parametrize does it. So
everything attached to them stays valid: Parameters, optimizers, tied weights, hooks and the handles that
remove them, parametrizations, the training flag, references from elsewhere in the model.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from fastlstm.modules import FastLSTM, FastLSTMCell

_Module = TypeVar("_Module", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.LSTM: FastLSTM, nn.LSTMCell: FastLSTMCell}


def swap_lstm(model: _Module) -> _Module:
    """Turn every nn.LSTM of ``model`` into a FastLSTM and every nn.LSTMCell into a FastLSTMCell.

    Works in place, at any depth, on a model that is itself an nn.LSTM, and in the middle of a training.
    Nothing but the class of these modules changes. Subclasses of nn.LSTM and nn.LSTMCell are left untouched,
    because what they override would be lost, and a UserWarning names them.

    Args:
        model: any module.

    Returns:
        ``model`` itself.
    """
    for name, module in model.named_modules():
        cls = parametrize.type_before_parametrizations(module)
        if cls in _REPLACEMENTS:
            _change_class(module, _REPLACEMENTS[cls])
        elif isinstance(module, tuple(_REPLACEMENTS)):
            warnings.warn(
                f"swap_lstm left {name or 'the model itself'} untouched: {cls.__qualname__} is a subclass of "
                f"nn.{'LSTM' if isinstance(module, nn.LSTM) else 'LSTMCell'} and may override its behaviour",
                stacklevel=2,
            )
    return model


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    # nn.LSTM's own list of its weights would keep stale tensors alive; FastLSTM derives it.
    module.__dict__.pop("_flat_weights", None)
    if parametrize.is_parametrized(module):
        # parametrize has put properties for the weights into a class made for this module alone.
        properties = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        cls = type(f"Parametrized{cls.__name__}", (cls,), properties)
    module.__class__ = cls
