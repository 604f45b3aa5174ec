// What the CPU driver takes from torch: its thread pool, its allocator and its GEMM, behind plain pointers.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "../checks.h"

namespace fastlstm::cpu {

using at::ScalarType;
using at::Tensor;

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

// An uninitialised contiguous tensor, without the detour through the dispatcher.
inline Tensor empty(at::IntArrayRef sizes, ScalarType type) { return at::detail::empty_cpu(sizes, type); }

// Uninitialised memory, aligned to cache lines: torch's, so that its allocator and memory profiler see it, but for a
// few kilobytes, where making a tensor takes as long as a step of a small cell. An empty buffer is a null pointer.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (bytes > kSmallBytes) {
      tensor_ = empty({static_cast<int64_t>(bytes)}, ScalarType::Byte);
      data_ = static_cast<T*>(tensor_.data_ptr());
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

  Tensor tensor_;
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
  return at::from_blob(const_cast<std::remove_const_t<T>*>(m.data), {m.rows, m.columns},
                       {m.row_stride, m.column_stride}, at::dtype(kScalarType<std::remove_const_t<T>>));
}

// out = a b, or out += a b. Any of the sizes may be zero.
template <class T>
void matmul(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b, bool accumulate = false) {
  if (out.rows == 0 || out.columns == 0) return;
  Tensor out_tensor = as_tensor(out);
  // beta = 0 ignores what `out` held, NaN included.
  at::cpu::addmm_out(out_tensor, out_tensor, as_tensor(a), as_tensor(b), accumulate ? 1 : 0, 1);
}

}  // namespace fastlstm::cpu
