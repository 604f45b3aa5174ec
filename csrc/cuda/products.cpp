#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <map>
#include <memory>
#include <optional>

#include "../checks.h"
#include "runtime.h"

// The part of cuBLAS's interface that is used here. torch brings the library, which its build against the CPU alone
// does not: the symbols are weak, so that fastlstm loads there too.
extern "C" {
struct cublasContext;
using cublasHandle_t = cublasContext*;
__attribute__((weak)) int cublasCreate_v2(cublasHandle_t* handle);
__attribute__((weak)) int cublasDestroy_v2(cublasHandle_t handle);
__attribute__((weak)) int cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream);
__attribute__((weak)) int cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes);
__attribute__((weak)) int cublasGemmEx(cublasHandle_t handle, int op_a, int op_b, int m, int n, int k,
                                       const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b,
                                       int ldb, const void* beta, void* c, int type_c, int ldc, int compute_type,
                                       int algorithm);
}

namespace fastlstm::cuda {

using at::Tensor;

namespace {

// Values of cuBLAS's enumerations.
enum { kAsStored = 0, kTransposed = 1 };       // cublasOperation_t
enum { kFloat32 = 0 };                         // cudaDataType_t
enum { kTf32Compute = 77 };                    // cublasComputeType_t: CUBLAS_COMPUTE_32F_FAST_TF32
enum { kDefaultAlgorithm = -1 };               // cublasGemmAlgo_t
constexpr int64_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

void check_cublas(int status, const char* what) {
  FASTLSTM_CHECK(status == 0, what, " failed with cuBLAS status ", status);
}

// One per thread and device: cuBLAS's handles are not for several threads at once.
cublasHandle_t handle_for(const at::Device& device) {
  struct Destroy {
    void operator()(cublasHandle_t handle) const { cublasDestroy_v2(handle); }
  };
  using Handle = std::unique_ptr<cublasContext, Destroy>;
  thread_local std::map<int, Handle> handles;
  Handle& handle = handles[device.index()];
  if (!handle) {
    cublasHandle_t created = nullptr;
    check_cublas(cublasCreate_v2(&created), "creating a cuBLAS handle");
    handle.reset(created);
  }
  return handle.get();
}

// A matrix as cuBLAS takes it, by columns: that of row-major memory is the transposed one.
struct Operand {
  const void* data;
  int op, leading;
};
std::optional<Operand> operand(const Tensor& t) {
  const auto fits = [](int64_t x) { return x <= std::numeric_limits<int>::max(); };
  const int64_t rows = t.size(0), columns = t.size(1);
  if (!fits(rows) || !fits(columns) || !fits(t.stride(0)) || !fits(t.stride(1))) return std::nullopt;
  if (t.stride(1) == 1 && t.stride(0) >= columns)
    return Operand{t.data_ptr(), kAsStored, static_cast<int>(t.stride(0))};
  if (t.stride(0) == 1 && t.stride(1) >= rows) return Operand{t.data_ptr(), kTransposed, static_cast<int>(t.stride(1))};
  return std::nullopt;
}

// out^T = b^T a^T with factors rounded to TF32. False if cuBLAS cannot be asked.
bool multiply_tf32(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (cublasGemmEx == nullptr) return false;
  const auto left = operand(b), right = operand(a), result = operand(out);
  if (!left || !right || !result || result->op != kAsStored) return false;
  const cublasHandle_t handle = handle_for(out.device());
  const Tensor workspace = at::empty({kWorkspaceBytes}, out.options().dtype(at::kByte));
  check_cublas(cublasSetStream_v2(handle, current_stream(out.device())), "setting cuBLAS's stream");
  check_cublas(cublasSetWorkspace_v2(handle, workspace.data_ptr(), kWorkspaceBytes), "setting cuBLAS's workspace");
  const float one = 1, beta = accumulate ? 1 : 0;
  check_cublas(
      cublasGemmEx(handle, left->op, right->op, static_cast<int>(out.size(1)), static_cast<int>(out.size(0)),
                   static_cast<int>(a.size(1)), &one, left->data, kFloat32, left->leading, right->data, kFloat32,
                   right->leading, &beta, out.data_ptr(), kFloat32, result->leading, kTf32Compute, kDefaultAlgorithm),
      "a matrix product");
  return true;
}

}  // namespace

void multiply(Element element, const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  if (out.numel() == 0) return;
  // torch's own switch for TF32 in matrix products is another one than that for RNNs, and both are the whole process's.
  if (element == Element::kTf32 && a.size(1) > 0 && multiply_tf32(out, a, b, accumulate)) return;
  std::optional<at::NoTF32Guard> full_precision;
  if (element == Element::kFp32) full_precision.emplace();
  Tensor to = out;
  at::addmm_out(to, out, a, b, accumulate ? 1 : 0, 1);  // beta = 0 ignores what `out` held, NaN included
}

Tensor multiply_batches(const Tensor& a, const Tensor& b) {
  const at::NoTF32Guard full_precision;
  return at::bmm(a, b);
}

}  // namespace fastlstm::cuda
