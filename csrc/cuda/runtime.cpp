#include "runtime.h"

#include <ATen/DeviceGuard.h>

#include <array>
#include <mutex>

#include "../checks.h"
#include "launchers.h"

// torch's C interface to its streams, 0 on success. A build of torch without CUDA does not define it, and fastlstm can
// be built and loaded there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace fastlstm::cuda {

void check(cudaError_t error, const char* what) {
  FASTLSTM_CHECK(error == cudaSuccess, what, " failed: ", cudaGetErrorString(error));
}

cudaStream_t current_stream(const at::Device& device) {
  FASTLSTM_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  FASTLSTM_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream) == 0, "torch has no current stream for ",
                 device);
  return static_cast<cudaStream_t>(stream);
}

namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "asking for the limits of the GPU");
  return value;
}

Device ask(int index) {
  const at::DeviceGuard guard(at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, index),
            minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  const cudaError_t runs = probe_kernels();
  FASTLSTM_CHECK(runs == cudaSuccess,
                 "fastlstm was built for the CUDA targets " FASTLSTM_CUDA_TARGETS
                 ", and none of its kernels runs on device ",
                 index, " of compute capability ", major, ".", minor, ": ", cudaGetErrorString(runs),
                 "; build it again with TORCH_CUDA_ARCH_LIST=", major, ".", minor);
  return {attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          attribute(cudaDevAttrL2CacheSize, index), attribute(cudaDevAttrClockRate, index) * 1e-6,
          has_warpgroup_kernels() && major == 9 && minor == 0};
}

}  // namespace

const Device& limits_of(const at::Device& device) {
  constexpr size_t kMaxDevices = 64;
  static std::array<std::once_flag, kMaxDevices> asked;
  static std::array<Device, kMaxDevices> limits;
  const auto index = static_cast<size_t>(device.index());
  FASTLSTM_CHECK(index < kMaxDevices, "fastlstm knows up to ", kMaxDevices, " GPUs, got ", device);
  std::call_once(asked[index], [&] { limits[index] = ask(device.index()); });
  return limits[index];
}

}  // namespace fastlstm::cuda
