"""fastlstm: fused LSTM kernels for PyTorch and FastLSTM, a drop-in for torch.nn.LSTM.

>>> lstm = fastlstm.FastLSTM(128, 256, num_layers=2)
>>> output, (h_n, c_n) = lstm(torch.randn(100, 32, 128))
>>> model = fastlstm.swap_lstm(model)  # every nn.LSTM of an existing model
"""

from fastlstm import onnx as onnx
from fastlstm.convert import from_keras, swap_lstm, to_keras
from fastlstm.enabling import disable, enable, is_enabled
from fastlstm.functional import lstm, lstm_cell
from fastlstm.modules import FastLSTM, FastLSTMCell
from fastlstm.planning import available_isas, build_info, force, plan, plans

__version__ = "0.1.0"

__all__ = [
    "FastLSTM",
    "FastLSTMCell",
    "__version__",
    "available_isas",
    "build_info",
    "disable",
    "enable",
    "force",
    "from_keras",
    "is_enabled",
    "lstm",
    "lstm_cell",
    "plan",
    "plans",
    "swap_lstm",
    "to_keras",
]
