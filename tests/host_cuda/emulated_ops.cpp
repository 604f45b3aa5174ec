// The CUDA operators on tensors of the CPU: the driver and the kernels as they are, compiled as host C++, on the
// emulation of emulation.h. Registered as fastlstm_emulated::lstm and lstm_backward, with the schemas of the real ones,
// and controlled through C functions (see emulated.py).
#include <ATen/Context.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda/cuda_ops.h"
#include "cuda/runtime.h"

namespace fastlstm::cuda {

namespace {

Device device = {132, 227 * 1024, 50 << 20, 1.98, true};

// The memory that an operator asks torch for, between guards that show stray writes. What was freed is given out again,
// newest first: as torch's allocator on a GPU does it, and so that a kernel meets what an earlier launch left behind.
class Memory final : public c10::Allocator {
 public:
  bool poison = true;  // fill with NaN what is given out; otherwise it holds what was there before

  static Memory& instance() {
    static auto* const memory = new Memory;  // tensors may outlive everything
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const std::lock_guard lock(mutex_);
    std::vector<Block*>& free = free_[bytes];
    Block* block = nullptr;
    if (!free.empty()) {
      block = free.back();
      free.pop_back();
    } else {
      const size_t whole = (bytes + 2 * kGuard + kAlignment - 1) / kAlignment * kAlignment;
      block = new Block{static_cast<unsigned char*>(std::aligned_alloc(kAlignment, whole)), bytes, whole};
      std::memset(block->memory, kNaN, whole);
      blocks_.push_back(block);
    }
    if (poison) std::memset(block->memory + kGuard, kNaN, bytes);
    return {block->memory + kGuard, block, release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Reports stray writes once.
  void check() {
    const std::lock_guard lock(mutex_);
    for (Block* block : blocks_)
      for (size_t i = 0; i < block->whole; ++i) {
        if (i == kGuard) i += block->bytes;
        if (i >= block->whole || block->memory[i] == kNaN) continue;
        block->memory[i] = kNaN;
        throw_joined("something wrote to byte ", static_cast<int64_t>(i) - static_cast<int64_t>(kGuard),
                     " of a tensor of ", block->bytes, " bytes");
      }
  }

 private:
  static constexpr size_t kGuard = 256, kAlignment = 64;
  static constexpr unsigned char kNaN = 0xff;  // in all bytes of a floating-point number: NaN

  struct Block {
    unsigned char* memory;
    size_t bytes, whole;  // of the tensor, with guards
  };

  static void release(void* of) {
    auto* const block = static_cast<Block*>(of);
    const std::lock_guard lock(instance().mutex_);
    instance().free_[block->bytes].push_back(block);
  }

  std::mutex mutex_;
  std::vector<Block*> blocks_;
  std::map<size_t, std::vector<Block*>> free_;
};

// Whatever is allocated while this lives comes from there. oneDNN, which torch takes for products where the CPU has
// instructions for their type, would want other pointers of an allocator: it is not asked.
class UseMemory {
 public:
  UseMemory() : before_(c10::GetCPUAllocator()), onednn_before_(at::globalContext().userEnabledMkldnn()) {
    at::globalContext().setUserEnabledMkldnn(false);
    c10::SetCPUAllocator(&Memory::instance(), kPriority);
  }
  ~UseMemory() {
    c10::SetCPUAllocator(before_, kPriority);
    at::globalContext().setUserEnabledMkldnn(onednn_before_);
  }
  UseMemory(const UseMemory&) = delete;
  UseMemory& operator=(const UseMemory&) = delete;

 private:
  static constexpr uint8_t kPriority = 255;
  c10::Allocator* const before_;
  const bool onednn_before_;
};

template <class Function>
struct InMemory;
template <class Result, class... Arguments>
struct InMemory<Result(Arguments...)> {
  template <Result (*Operator)(Arguments...)>
  static Result call(Arguments... arguments) {
    const UseMemory use;
    Result result = Operator(arguments...);
    Memory::instance().check();
    return result;
  }
};

}  // namespace

cudaStream_t current_stream(const at::Device&) { return nullptr; }

const Device& limits_of(const at::Device&) { return device; }

void check(cudaError_t error, const char* what) {
  FASTLSTM_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

}  // namespace fastlstm::cuda

#define FASTLSTM_EXPORT __attribute__((visibility("default")))

extern "C" {

// Repeats from here on what followed the last call with this seed.
FASTLSTM_EXPORT void emulated_seed(uint64_t seed) {
  fastlstm::cuda::emulation::settings().seed = seed;
  fastlstm::cuda::emulation::settings().launches = 0;
}
FASTLSTM_EXPORT void emulated_device(int sms, int shared_bytes) {
  fastlstm::cuda::device.sms = sms;
  fastlstm::cuda::device.shared_bytes = shared_bytes;
  fastlstm::cuda::device.warpgroups = shared_bytes >= 227 * 1024;
}
// Whether memory is NaN when an operator gets it, or as its last owner left it.
FASTLSTM_EXPORT void emulated_poison(bool poison) { fastlstm::cuda::Memory::instance().poison = poison; }
// Zeros (and an empty name) leave the choice to the planner.
FASTLSTM_EXPORT void emulated_force(const char* family, int octets, int tiles, int groups, int layers, int run_steps) {
  using namespace fastlstm::cuda;
  Constraints constraints;
  for (const Family f : families())
    if (std::string(family) == family_name(f)) constraints.family = f;
  if (octets > 0) constraints.octets = octets;
  if (tiles > 0) constraints.tiles = tiles;
  if (groups > 0) constraints.groups = groups;
  if (layers > 0) constraints.layers = layers;
  if (run_steps > 0) constraints.run_steps = run_steps;
  set_forced(constraints);
}
// The plan of a pass under what is forced, or why there is none, preceded by "!". Elements are numbered as in plan.h.
FASTLSTM_EXPORT const char* emulated_plan(bool backward, int element, int64_t steps, int64_t batch, int64_t hidden,
                                          int64_t projection, int64_t layers, int64_t directions) {
  using namespace fastlstm::cuda;
  static std::string text;
  fastlstm::Problem p = {};
  p.T = steps;
  p.B = batch;
  p.N = steps * batch;
  p.I = 1;
  p.H = hidden;
  p.P = projection;
  p.layers = layers;
  p.directions = directions;
  p.compute_bytes = static_cast<Element>(element) == Element::kFp64 ? 8 : 4;
  p.training = true;
  try {
    const auto plan = backward ? plan_backward : plan_forward;
    text = describe(plan(p, static_cast<Element>(element), device, forced()), p);
  } catch (const std::exception& error) {
    text = std::string("!") + error.what();
  }
  return text.c_str();
}
// Grids that have run since the seed was set.
FASTLSTM_EXPORT uint64_t emulated_launches() { return fastlstm::cuda::emulation::settings().launches; }
}

TORCH_LIBRARY(fastlstm_emulated, m) {
  for (const char* name : {"lstm", "lstm_backward"}) {
    const auto schema = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fastlstm::") + name).c_str(), "");
    m.def(schema.schema().cloneWithName(std::string("fastlstm_emulated::") + name, ""));
  }
}

TORCH_LIBRARY_IMPL(fastlstm_emulated, CPU, m) {
  using namespace fastlstm;
  m.impl("lstm", cuda::InMemory<Forward>::call<forward_kernel<cuda::lstm>>);
  m.impl("lstm_backward", cuda::InMemory<Backward>::call<backward_kernel<cuda::lstm_backward>>);
}
