// The call of fastlstm::lstm from eager Python code. torch.ops converts the arguments of any operator by its schema,
// which takes longer than a step of a small layer; this function knows their types. It goes through the dispatcher as
// torch.ops does: autograd, autocast, dispatch modes and the profiler see the same operator.
#include "call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "ops.h"

namespace fastlstm {

namespace {

// The arguments: those of the operator's schema, in its order but without `save`, which follows from them.
enum Position {
  kX,
  kWeights,
  kH0,
  kC0,
  kBatchSizes,
  kLengths,
  kResetMask,
  kDropoutMask,
  kNumLayers,
  kBidirectional,
  kHasBias,
  kReducedProducts,
  kResetH,
  kResetC,
  kRecurrentMask,
  kZoneoutH,
  kZoneoutC,
  kZoneoutRateH,
  kZoneoutRateC,
  kCellLayers,
  kRecompute,
  kLayerNorm,
  kCount
};

OptionalTensor optional_tensor(PyObject* object) {
  return object == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(object));
}

bool is_plain(PyObject* object) { return THPVariable_CheckExact(object); }

// Whether each argument has the very type that the schema names.
bool have_plain_types(PyObject* const* arguments) {
  const auto all = [&](std::initializer_list<Position> positions, const auto& is) {
    return std::all_of(positions.begin(), positions.end(), [&](Position at) { return is(arguments[at]); });
  };
  return all({kX, kH0, kC0}, is_plain) &&
         all({kBatchSizes, kLengths, kResetMask, kDropoutMask, kResetH, kResetC, kRecurrentMask, kZoneoutH, kZoneoutC},
             [](PyObject* object) { return object == Py_None || is_plain(object); }) &&
         all({kNumLayers, kCellLayers}, [](PyObject* object) { return PyLong_CheckExact(object); }) &&
         all({kZoneoutRateH, kZoneoutRateC}, [](PyObject* object) { return PyFloat_CheckExact(object); }) &&
         all({kBidirectional, kHasBias, kReducedProducts, kRecompute, kLayerNorm},
             [](PyObject* object) { return PyBool_Check(object); });
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

}  // namespace

PyObject* call_lstm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kCount, "lstm takes ", +kCount, " arguments, got ", count);
  // Subclasses of Tensor and torch function modes have a say in what an operator does, and what has another type than
  // the schema says an error of its own: all that is for torch.ops.
  PyObject* const list = arguments[kWeights];
  if (at::impl::torch_function_mode_enabled() || !PyList_CheckExact(list) || !have_plain_types(arguments))
    Py_RETURN_NONE;
  PyObject* const* const items = PySequence_Fast_ITEMS(list);
  const Py_ssize_t weight_count = PyList_GET_SIZE(list);
  if (!std::all_of(items, items + weight_count, is_plain)) Py_RETURN_NONE;

  // Owned here: with the interpreter's lock released, another thread may drop what the caller's list holds.
  std::vector<Tensor> weights;
  weights.reserve(weight_count);
  for (Py_ssize_t i = 0; i < weight_count; ++i) weights.push_back(THPVariable_Unpack(items[i]));
  const Tensor x = THPVariable_Unpack(arguments[kX]), h_0 = THPVariable_Unpack(arguments[kH0]),
               c_0 = THPVariable_Unpack(arguments[kC0]);
  OptionalTensor first_options[kNumLayers - kBatchSizes], last_options[kZoneoutRateH - kResetH];
  std::transform(arguments + kBatchSizes, arguments + kNumLayers, first_options, optional_tensor);
  std::transform(arguments + kResetH, arguments + kZoneoutRateH, last_options, optional_tensor);
  const auto flag = [&](Position at) { return arguments[at] == Py_True; };
  const Call call = {x,
                     weights,
                     h_0,
                     c_0,
                     first_options[0],
                     first_options[1],
                     first_options[2],
                     first_options[3],
                     integer(arguments[kNumLayers]),
                     flag(kBidirectional),
                     flag(kHasBias),
                     flag(kReducedProducts),
                     last_options[0],
                     last_options[1],
                     last_options[2],
                     last_options[3],
                     last_options[4],
                     PyFloat_AS_DOUBLE(arguments[kZoneoutRateH]),
                     PyFloat_AS_DOUBLE(arguments[kZoneoutRateC]),
                     flag(kLayerNorm)};
  const int64_t cell_layers = integer(arguments[kCellLayers]);

  ForwardResult result;
  try {
    const pybind11::gil_scoped_release released;
    result = lstm_operator(call, {cell_layers, needs_gradient(call), flag(kRecompute)});
  } catch (const std::invalid_argument& error) {  // which torch's handler would make a RuntimeError
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  auto& [y, h_n, c_n, saved, cell_states] = result;
  PyObject* const outputs = PyTuple_New(3 + static_cast<Py_ssize_t>(cell_states.size()));
  if (!outputs) throw python_error();
  PyTuple_SET_ITEM(outputs, 0, THPVariable_Wrap(std::move(y)));
  PyTuple_SET_ITEM(outputs, 1, THPVariable_Wrap(std::move(h_n)));
  PyTuple_SET_ITEM(outputs, 2, THPVariable_Wrap(std::move(c_n)));
  for (size_t i = 0; i < cell_states.size(); ++i)
    PyTuple_SET_ITEM(outputs, 3 + static_cast<Py_ssize_t>(i), THPVariable_Wrap(std::move(cell_states[i])));
  return outputs;
  END_HANDLE_TH_ERRORS
}

}  // namespace fastlstm
