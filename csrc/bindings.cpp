// The Python-facing core of the extension module `_C`: planner, instruction sets, build information, and the kernels
// one by one for tests and the roofline. Tensors pass only through lstm (call.cpp), on their way to the operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "call.h"
#include "cpu/isa.h"
#include "cpu/roofline.h"
#include "cuda/plan.h"
#include "plan.h"
#ifdef FASTLSTM_CUDA
#include "cuda/runtime.h"
#endif

namespace py = pybind11;

namespace {

using namespace fastlstm;

template <class Enum>
Enum parse_name(const char* argument, const std::string& name, const std::vector<Enum>& known,
                const char* (*name_of)(Enum)) {
  std::string all;
  for (const Enum e : known) {
    if (name == name_of(e)) return e;
    all += std::string(all.empty() ? "" : ", ") + "'" + name_of(e) + "'";
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + all + ", got '" + name + "'");
}

template <class Enum>
std::vector<std::string> names(const std::vector<Enum>& values, const char* (*name_of)(Enum)) {
  std::vector<std::string> result;
  for (const Enum e : values) result.emplace_back(name_of(e));
  return result;
}

py::dict pass_to_dict(const PassPlan& pass) {
  py::dict d;
  d["family"] = family_name(pass.family);
  d["split"] = split_name(pass.split);
  d["bulk_input"] = pass.bulk_input;
  d["products"] = products_name(pass.products);
  d["cycles"] = pass.cycles;
  return d;
}

py::dict plan_for(int64_t T, int64_t B, int64_t N, int64_t I, int64_t H, int64_t P, int64_t layers, int64_t directions,
                  int64_t compute_bytes, bool training, bool bf16_allowed, int threads, std::optional<int> vector_bytes,
                  std::optional<bool> bf16, std::optional<int64_t> l2_bytes, bool layer_norm) {
  const Problem problem = {T,     B,         N, I, H, P, layers, directions, compute_bytes, training, bf16_allowed,
                           false, layer_norm};
  Machine machine = cpu::this_machine(threads);
  machine.vector_bytes = vector_bytes.value_or(machine.vector_bytes);
  machine.fma = machine.fma || vector_bytes.value_or(0) > 16;
  machine.bf16 = bf16.value_or(machine.bf16);
  machine.l2_bytes = l2_bytes.value_or(machine.l2_bytes);
  const Plan plan = make_plan(problem, machine, cpu::forced().plan);
  py::dict d;
  d["forward"] = pass_to_dict(plan.forward);
  d["backward"] = plan.backward ? py::object(pass_to_dict(*plan.backward)) : py::none();
  d["isa"] = cpu::isa_name(cpu::selected_isa());
  d["threads"] = threads;
  d["reason"] = plan.reason;
  return d;
}

// The limits of a GPU of this machine.
std::tuple<int, int, int64_t, double, bool> cuda_device(int index) {
#ifdef FASTLSTM_CUDA
  const cuda::Device& limits = cuda::limits_of(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
  return {limits.sms, limits.shared_bytes, limits.l2_bytes, limits.gigahertz, limits.warpgroups};
#else
  throw std::invalid_argument("device must be the name of a GPU model: this build of fastlstm has no CUDA kernels");
#endif
}

py::dict cuda_pass_to_dict(const cuda::PassPlan& pass, const Problem& problem) {
  py::dict d;
  d["family"] = cuda::family_name(pass.family);
  d["octets"] = pass.team.octets;
  d["tiles"] = pass.team.tiles;
  d["groups"] = pass.groups;
  d["ctas"] = pass.ctas;
  d["shared_bytes"] = pass.shared_bytes;
  d["waves"] = pass.waves;
  d["layers"] = pass.layers;
  d["run_steps"] = pass.run_steps;
  d["microseconds"] = pass.microseconds;
  d["text"] = cuda::describe(pass, problem);
  return d;
}

py::dict cuda_plan_for(int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t layers, int64_t directions,
                       const std::string& element_text, bool training, bool step_extras, bool layer_norm, int sms,
                       int shared_bytes, int64_t l2_bytes, double gigahertz, bool warpgroups) {
  const int64_t compute_bytes = element_text == "float64" ? 8 : 4;
  const Problem problem = {T,        B,     T * B,       I,         H, P, layers, directions, compute_bytes,
                           training, false, step_extras, layer_norm};
  const auto element = parse_name("element", element_text, cuda::elements(), cuda::element_name);
  const cuda::Device device = {sms, shared_bytes, l2_bytes, gigahertz, warpgroups};
  py::dict d;
  d["forward"] = cuda_pass_to_dict(cuda::plan_forward(problem, element, device, cuda::forced()), problem);
  d["backward"] = py::none();
  if (training)
    d["backward"] = cuda_pass_to_dict(cuda::plan_backward(problem, element, device, cuda::forced()), problem);
  return d;
}

std::vector<py::dict> cuda_kernels() {
  std::vector<py::dict> kernels;
  const bool warpgroups = std::string_view(FASTLSTM_CUDA_TARGETS).find("sm_90a") != std::string_view::npos;
  for (const cuda::CompiledKernel& kernel : cuda::compiled_kernels()) {
    if (kernel.family == cuda::Family::kWarpgroup && !warpgroups) continue;
    py::dict d;
    d["function"] = std::string(cuda::family_name(kernel.family)) + (kernel.backward ? "_backward" : "_forward");
    d["element"] = cuda::element_name(kernel.element);
    d["sizes"] = kernel.sizes;
    d["shared_bytes"] = std::make_pair(kernel.least_shared_bytes, kernel.most_shared_bytes);
    kernels.push_back(d);
  }
  return kernels;
}

using Name = std::optional<std::string>;

// A family of either device, or of both; each obeys if it has one of this name.
void set_forced(const Name& plan, const Name& isa, const Name& split, std::optional<bool> bulk_input,
                const Name& products, std::optional<int> octets, std::optional<int> tiles, std::optional<int> groups,
                std::optional<int> layers, std::optional<int> run_steps) {
  cpu::Forced forced;
  cuda::Constraints cuda_forced;
  const auto find = [&](auto& family, const auto& known, const auto& name_of) {
    for (const auto f : known)
      if (*plan == name_of(f)) family = f;
  };
  if (plan) {
    find(forced.plan.family, families(), family_name);
    find(cuda_forced.family, cuda::families(), cuda::family_name);
    if (!forced.plan.family && !cuda_forced.family)
      throw std::invalid_argument("plan must be one of 'stepwise', 'packed', 'unpacked' (CPU), 'resident', " +
                                  ("'persistent', 'warpgroup', 'streamed' (CUDA), got '" + *plan + "'"));
  }
  if (isa) forced.isa = parse_name("isa", *isa, cpu::available_isas(), cpu::isa_name);
  if (split) forced.plan.split = parse_name("split", *split, splits(), split_name);
  forced.plan.bulk_input = bulk_input;
  if (products) forced.plan.products = parse_name("products", *products, all_products(), products_name);
  const auto positive = [](const char* name, std::optional<int> value) {
    if (value && *value < 1)
      throw std::invalid_argument(std::string(name) + " must be at least 1, got " + std::to_string(*value));
    return value;
  };
  cuda_forced.octets = positive("octets", octets);
  cuda_forced.tiles = positive("tiles", tiles);
  cuda_forced.groups = positive("groups", groups);
  cuda_forced.layers = positive("layers", layers);
  cuda_forced.run_steps = positive("run_steps", run_steps);
  cpu::set_forced(forced);
  cuda::set_forced(cuda_forced);
}

template <class T>
void apply_function(cpu::Function function, cpu::Isa isa, const py::buffer_info& values) {
  cpu::kernels<T, T>(isa).apply(function, static_cast<T*>(values.ptr), values.size);
}

// values[i] = function(values[i]) by the vector code of an instruction set; for tests of its error.
void apply(const std::string& function, const std::string& isa_text, const py::buffer& values) {
  using cpu::Function;
  static const std::vector<Function> all = {Function::kExp, Function::kSigmoid, Function::kTanh};
  const auto name_of = [](Function f) {
    return f == Function::kExp ? "exp" : f == Function::kSigmoid ? "sigmoid" : "tanh";
  };
  const Function parsed = parse_name<Function>("function", function, all, name_of);
  const cpu::Isa isa = parse_name("isa", isa_text, cpu::available_isas(), cpu::isa_name);
  const py::buffer_info info = values.request(/*writable=*/true);
  if (info.ndim != 1 || info.strides[0] != info.itemsize) throw std::invalid_argument("values must be contiguous, 1-D");
  if (info.item_type_is_equivalent_to<float>())
    apply_function<float>(parsed, isa, info);
  else if (info.item_type_is_equivalent_to<double>())
    apply_function<double>(parsed, isa, info);
  else
    throw std::invalid_argument("values must be float32 or float64, got format '" + info.format + "'");
}

std::vector<py::dict> time_kernels(int threads, double seconds_each) {
  std::vector<py::dict> timings;
  for (const cpu::KernelTiming& timing : cpu::time_kernels(cpu::selected_isa(), threads, seconds_each)) {
    py::dict d;
    d["kernel"] = timing.kernel;
    d["sizes"] = timing.sizes;
    d["multiply_adds"] = timing.multiply_adds;
    d["bytes"] = timing.bytes;
    d["seconds"] = timing.seconds;
    timings.push_back(d);
  }
  return timings;
}

// The arguments of set_forced that say what is forced now.
py::tuple get_forced() {
  const cpu::Forced forced = cpu::forced();
  const cuda::Constraints cuda_forced = cuda::forced();
  Name plan, isa, split, products;
  if (forced.plan.family) plan = family_name(*forced.plan.family);
  if (cuda_forced.family) plan = cuda::family_name(*cuda_forced.family);
  if (forced.isa) isa = cpu::isa_name(*forced.isa);
  if (forced.plan.split) split = split_name(*forced.plan.split);
  if (forced.plan.products) products = products_name(*forced.plan.products);
  return py::make_tuple(plan, isa, split, forced.plan.bulk_input, products, cuda_forced.octets, cuda_forced.tiles,
                        cuda_forced.groups, cuda_forced.layers, cuda_forced.run_steps);
}

PyMethodDef methods[] = {
    {"lstm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_lstm)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled core of fastlstm: operators (registered on import), planner, build information, kernels one by one.";
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("plan_for", &plan_for, py::kw_only(), py::arg("T"), py::arg("B"), py::arg("N"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("layers"), py::arg("directions"), py::arg("compute_bytes"), py::arg("training"),
        py::arg("bf16_allowed"), py::arg("threads"), py::arg("vector_bytes") = py::none(), py::arg("bf16") = py::none(),
        py::arg("l2_bytes") = py::none(), py::arg("layer_norm") = false);
  m.def("set_forced", &set_forced, py::arg("plan"), py::arg("isa"), py::arg("split"), py::arg("bulk_input"),
        py::arg("products"), py::arg("octets"), py::arg("tiles"), py::arg("groups"), py::arg("layers"),
        py::arg("run_steps"));
  m.def("get_forced", &get_forced);
  m.def("cuda_device", &cuda_device, py::arg("index"));
  m.def("cuda_plan_for", &cuda_plan_for, py::kw_only(), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("layers"), py::arg("directions"), py::arg("element"), py::arg("training"),
        py::arg("step_extras"), py::arg("layer_norm"), py::arg("sms"), py::arg("shared_bytes"), py::arg("l2_bytes"),
        py::arg("gigahertz"), py::arg("warpgroups"));
  m.def("apply", &apply, py::arg("function"), py::arg("isa"), py::arg("values"));
  m.def("time_kernels", &time_kernels, py::arg("threads"), py::arg("seconds_each"));
  m.def("plans", [] { return names(families(), family_name); });
  m.def("cuda_plans", [] { return names(cuda::families(), cuda::family_name); });
  m.def("isas_compiled", [] { return names(cpu::compiled_isas(), cpu::isa_name); });
  m.def("isas_available", [] { return names(cpu::available_isas(), cpu::isa_name); });
  m.def("isa", [] { return cpu::isa_name(cpu::selected_isa()); });
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.attr("torch_built") = FASTLSTM_TORCH_BUILT;
  m.attr("cuda") = py::str(FASTLSTM_CUDA_TARGETS).attr("split")();
  m.def("cuda_kernels", &cuda_kernels);
}
