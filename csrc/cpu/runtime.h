// What the CPU driver takes from torch: its thread pool, its allocator and its GEMM, behind plain pointers.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "../checks.h"

namespace fastlstm::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
constexpr ScalarType kScalarType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

constexpr int64_t kElementwiseGrain = 16384;  // elements below which a thread is not worth waking

inline int thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

// While it exists, this thread's denormal numbers count as zero, which they are to any gate: arithmetic on them takes
// many times as long on x86-64. (Elsewhere nothing is done.) The caller's mode comes back afterwards.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : mode_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(mode_ | kFlushToZero | kDenormalsAreZero);
  }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(mode_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned mode_;
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
};

// f(begin, end) on sub-ranges of [0, n), on torch's own threads, with denormal numbers flushed; inline when n <= grain.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    f(begin, end);
  });
}

// A number that stands for the dtype, for comparisons: to make a ScalarType of it takes many calls.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}
inline int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// An uninitialised contiguous tensor, without the detour through the dispatcher.
inline Tensor empty(const Sizes& sizes, ScalarType type) {
  std::array<int64_t, 4> strides;
  int64_t stride = 1;
  for (int64_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides.data(), dtype_code(type),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void zero(Tensor tensor) { torch::stable::zero_(tensor); }

// Uninitialised memory, aligned to cache lines: torch's, so that its allocator and memory profiler see it, but for a
// few kilobytes, where making a tensor takes as long as a step of a small cell. An empty buffer is a null pointer.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (bytes > kSmallBytes) {
      tensor_ = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
      data_ = static_cast<T*>(tensor_->data_ptr());
    } else if (bytes > 0) {
      small_.reset(static_cast<T*>(::operator new(bytes, kAlignment)));
      data_ = small_.get();
    }
  }
  T* data() const { return data_; }

 private:
  static constexpr size_t kSmallBytes = 16384;
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };

  std::optional<Tensor> tensor_;
  std::unique_ptr<T, Delete> small_;
  T* data_ = nullptr;
};

// A strided view of memory that somebody else owns.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix rows_from(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
};

// Row-major and dense.
template <class T>
Matrix<T> dense(T* data, int64_t rows, int64_t columns) {
  return {data, rows, columns, columns};
}

template <class T>
Tensor as_tensor(const Matrix<T>& m) {
  return torch::stable::from_blob(
      const_cast<std::remove_const_t<T>*>(m.data), {m.rows, m.columns}, {m.row_stride, m.column_stride},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalarType<std::remove_const_t<T>>);
}

// out = a b, or out += a b. Any of the sizes may be zero.
template <class T>
void matmul(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b, bool accumulate = false) {
  if (out.rows == 0 || out.columns == 0) return;
  const Tensor out_tensor = as_tensor(out), a_tensor = as_tensor(a), b_tensor = as_tensor(b);
  // beta = 0 ignores what `out` held, NaN included.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out_tensor.get(), out_tensor.get(), a_tensor.get(),
                                                         b_tensor.get(), accumulate ? 1.0 : 0.0, 1.0));
}

}  // namespace fastlstm::cpu
