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

// Kernels::kernel<Octets, Blocks> of the compiled variant that has the shape's octets and blocks, or null.
template <const auto& Variants, class Kernels>
auto find_variant(const TeamShape& shape) {
  return [&]<size_t... I>(std::index_sequence<I...>) {
    decltype(Kernels::template kernel<Variants[0].octets, Variants[0].blocks>()) found = nullptr;
    ((Variants[I].octets == shape.octets && Variants[I].blocks == shape.blocks
          ? void(found = Kernels::template kernel<Variants[I].octets, Variants[I].blocks>())
          : void()),
     ...);
    return found;
  }(std::make_index_sequence<sizeof(Variants) / sizeof(Variants[0])>());
}

}  // namespace fastlstm::cuda
