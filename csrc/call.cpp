// The call of fastlstm::lstm from eager Python code. torch.ops converts the arguments of any operator by its schema,
// which takes longer than a step of a small layer; this function knows their types. It goes through the dispatcher as
// torch.ops does: autograd, autocast, dispatch modes and the profiler see the same operator.
#include "call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "ops.h"

namespace fastlstm {

namespace {

// The arguments, in the order of the operator's schema.
enum Position { kX, kWeights, kH0, kC0, kFirstOption, kNumLayers = kFirstOption + 4, kFlags, kCount = kFlags + 3 };

OptionalTensor optional_tensor(PyObject* object) {
  return object == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(object));
}

}  // namespace

PyObject* call_lstm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kCount, "lstm takes ", +kCount, " arguments, got ", count);
  // Subclasses of Tensor and torch function modes have a say in what an operator does, and what has another type than
  // the schema says an error of its own: all that is for torch.ops.
  PyObject* const list = arguments[kWeights];
  if (at::impl::torch_function_mode_enabled() || !PyList_CheckExact(list)) Py_RETURN_NONE;
  PyObject* const* const items = PySequence_Fast_ITEMS(list);
  const Py_ssize_t weight_count = PyList_GET_SIZE(list);
  const auto plain = [](PyObject* object) { return THPVariable_CheckExact(object); };
  const auto absent_or_plain = [&](PyObject* object) { return object == Py_None || plain(object); };
  if (!plain(arguments[kX]) || !plain(arguments[kH0]) || !plain(arguments[kC0]) ||
      !std::all_of(items, items + weight_count, plain) ||
      !std::all_of(arguments + kFirstOption, arguments + kNumLayers, absent_or_plain) ||
      !PyLong_CheckExact(arguments[kNumLayers]) ||
      !std::all_of(arguments + kFlags, arguments + kCount, [](PyObject* object) { return PyBool_Check(object); }))
    Py_RETURN_NONE;

  // Owned here: with the interpreter's lock released, another thread may drop what the caller's list holds.
  std::vector<Tensor> weights;
  weights.reserve(weight_count);
  for (Py_ssize_t i = 0; i < weight_count; ++i) weights.push_back(THPVariable_Unpack(items[i]));
  const Tensor x = THPVariable_Unpack(arguments[kX]), h_0 = THPVariable_Unpack(arguments[kH0]),
               c_0 = THPVariable_Unpack(arguments[kC0]);
  OptionalTensor options[4];
  std::transform(arguments + kFirstOption, arguments + kNumLayers, options, optional_tensor);
  const int64_t num_layers = PyLong_AsLongLong(arguments[kNumLayers]);
  if (num_layers == -1 && PyErr_Occurred()) throw python_error();
  bool flags[3];
  std::transform(arguments + kFlags, arguments + kCount, flags, [](PyObject* flag) { return flag == Py_True; });

  ForwardResult result;
  try {
    const pybind11::gil_scoped_release released;
    result = lstm_operator().call(x, weights, h_0, c_0, options[0], options[1], options[2], options[3], num_layers,
                                  flags[0], flags[1], flags[2], needs_gradient(x, weights, h_0, c_0));
  } catch (const std::invalid_argument& error) {  // which torch's handler would make a RuntimeError
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  PyObject* const outputs = PyTuple_New(3);
  if (!outputs) throw python_error();
  PyTuple_SET_ITEM(outputs, 0, THPVariable_Wrap(std::move(std::get<0>(result))));
  PyTuple_SET_ITEM(outputs, 1, THPVariable_Wrap(std::move(std::get<1>(result))));
  PyTuple_SET_ITEM(outputs, 2, THPVariable_Wrap(std::move(std::get<2>(result))));
  return outputs;
  END_HANDLE_TH_ERRORS
}

}  // namespace fastlstm
