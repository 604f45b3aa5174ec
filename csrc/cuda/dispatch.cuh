// From run-time values to template arguments.
#pragma once

#include <cstddef>
#include <utility>

#include "elements.cuh"
#include "layout.h"
#include "params.h"

namespace fastlstm::cuda {

// f(E{}) for an element that tensor cores multiply.
template <class F>
cudaError_t with_mma_element(Element element, const F& f) {
  switch (element) {
    case Element::kBf16: return f(Bf16{});
    case Element::kFp16: return f(Fp16{});
    case Element::kTf32: return f(Tf32{});
    case Element::kFp32: return f(Fp32{});
    default: return cudaErrorInvalidValue;
  }
}

// f(E{}) for any element, where no products are taken.
template <class F>
cudaError_t with_element(Element element, const F& f) {
  switch (element) {
    case Element::kBf16: return f(Bf16{});
    case Element::kFp16: return f(Fp16{});
    case Element::kFp64: return f(Full<double>{});
    default: return f(Full<float>{});
  }
}

// Kernels::kernel<variant> of the compiled variant that is wanted, or null.
template <const auto& Variants, class Kernels, class Variant>
auto find_variant(const Variant& wanted) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    decltype(Kernels::template kernel<Variants[0]>()) found = nullptr;
    ((Variants[I] == wanted ? void(found = Kernels::template kernel<Variants[I]>()) : void()), ...);
    return found;
  }(std::make_index_sequence<sizeof(Variants) / sizeof(Variants[0])>());
}

}  // namespace fastlstm::cuda
