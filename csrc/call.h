#pragma once

#include <Python.h>

namespace fastlstm {

// lstm(x, weights, h_0, c_0, batch_sizes, lengths, reset_mask, dropout_mask, num_layers, bidirectional, has_bias,
// reduced_products, reset_h, reset_c, recurrent_mask, zoneout_h, zoneout_c, zoneout_rate_h, zoneout_rate_c,
// cell_layers, recompute, layer_norm) -> (y, h_n, c_n), with cell_layers (y, h_n, c_n, cell_states), or None where only
// torch.ops can make the call. A METH_FASTCALL function.
PyObject* call_lstm(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastlstm
