#pragma once

#include <Python.h>

namespace fastlstm {

// lstm(x, weights, h_0, c_0, batch_sizes, lengths, reset_mask, dropout_mask, num_layers, bidirectional, has_bias,
// reduced_products) -> (y, h_n, c_n), or None where only torch.ops can make the call. A METH_FASTCALL function.
PyObject* call_lstm(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace fastlstm
