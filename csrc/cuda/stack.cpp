#include "stack.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/ones.h>

#include <utility>

namespace fastlstm::cuda {

namespace {

constexpr double kFloat16Max = 65504;

Element element_of(ScalarType type, bool reduced_products) {
  switch (type) {
    case ScalarType::BFloat16: return Element::kBf16;
    case ScalarType::Half: return Element::kFp16;
    case ScalarType::Double: return Element::kFp64;
    default: return reduced_products ? Element::kTf32 : Element::kFp32;
  }
}

// Of those that are defined: whether they begin at multiples of bytes_of(tensor).
template <class F>
bool begin_aligned(std::initializer_list<const Tensor*> tensors, const F& bytes_of) {
  return std::ranges::all_of(tensors, [&](const Tensor* t) {
    return !t->defined() || reinterpret_cast<uintptr_t>(t->data_ptr()) % bytes_of(*t) == 0;
  });
}

}  // namespace

Stack::Stack(const Arguments& arguments, const Call& call, int64_t groups)
    : a(arguments),
      p(arguments.problem),
      groups(groups),
      element(element_of(a.type, call.reduced_products)),
      stream(current_stream(call.x.device())),
      limits(limits_of(call.x.device())),
      constraints(forced()),
      options(call.x.options()),
      x(rows(call.x)),
      h_0(states(call.h_0)),
      c_0(states(call.c_0)),
      reset_h(states(call.reset_h)),
      recurrent_mask(states(call.recurrent_mask)),
      reset_c_(states(call.reset_c)),
      zoneout_h_(marks(call.zoneout_h)),
      zoneout_c_(marks(call.zoneout_c)),
      zoneout_rate_h_(call.zoneout_rate_h),
      zoneout_rate_c_(call.zoneout_rate_c) {
  if (call.dropout_mask) dropout_mask = call.dropout_mask->reshape({p.layers - 1, p.N, width()});
  for (size_t i = 0; i < call.weights.size(); i += a.per_direction) {
    const Tensor* w = call.weights.data() + i;
    Weights weights = {};
    weights.w_ih = w[0].contiguous(), weights.w_hh = w[1].contiguous();
    if (call.has_bias) weights.b_ih = w[2].contiguous(), weights.b_hh = w[3].contiguous();
    const int64_t plain = a.plain_weights();
    if (p.P > 0) weights.w_hr = w[plain - 1].contiguous();
    if (p.layer_norm) {
      weights.gain_ih = w[plain].contiguous(), weights.gain_hh = w[plain + 1].contiguous();
      weights.gain_c = w[plain + 2].contiguous(), weights.bias_c = w[plain + 3].contiguous();
    }
    weights_.push_back(std::move(weights));
  }
  sequences.steps = static_cast<int>(p.T);
  sequences.batch = static_cast<int>(p.B);
  if (!a.offsets.empty()) {
    // A column has the steps that have a row for it.
    std::vector<int64_t> table = a.offsets;
    for (int64_t b = 0, t = p.T; b < p.B; ++b) {
      while (a.offsets[t] - a.offsets[t - 1] <= b) --t;
      table.push_back(t);
    }
    packing_ = on_device(table);
    sequences.offsets = data<int64_t>(packing_);
    sequences.lengths = sequences.offsets + p.T + 1;
  } else if (call.lengths) {
    lengths = call.lengths->contiguous().to(call.x.device());
    sequences.lengths = data<int64_t>(lengths);
  }
  if (call.reset_mask) {
    reset_mask_ = call.reset_mask->contiguous();
    sequences.resets = data<bool>(reset_mask_);
  }
}

Tensor Stack::on_device(const std::vector<int64_t>& values) const {
  const Tensor on_host = at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())},
                                       at::dtype(ScalarType::Long));
  return on_host.clone().to(options.device());
}

Tensor Stack::folded_weights(const Weights& w) const {
  // Every step multiplies them, so that their rounding is not to be more than that of other weights.
  const Element full = element == Element::kTf32 ? Element::kFp32 : element;
  Tensor folded = empty({kGates * p.H, p.H});
  multiply(full, folded, w.w_hh, w.w_hr);
  // Infinite sums of finite products would cancel to NaN where h itself is small.
  if (element == Element::kFp16) folded.clamp_(-kFloat16Max, kFloat16Max);
  return folded;
}

StepExtras Stack::extras(int64_t state) const {
  const auto zoneout = [&](const Tensor& mask, double rate) -> Zoneout {
    return {static_cast<const bool*>(pointer(mask, state)), rate};
  };
  return {pointer(reset_h, state), pointer(reset_c_, state), pointer(recurrent_mask, state),
          zoneout(zoneout_h_, zoneout_rate_h_), zoneout(zoneout_c_, zoneout_rate_c_)};
}

NormWeights Stack::norm_weights(const Weights& w) {
  return {pointer(w.gain_ih), pointer(w.gain_hh), pointer(w.b_ih),
          pointer(w.b_hh),    pointer(w.gain_c),  pointer(w.bias_c)};
}

Tensor Stack::exchange_buffer(const PassPlan& plan, int runs) const {
  const auto bytes = static_cast<int64_t>(plan.exchange_bytes) * runs * plan.groups;
  Tensor buffer = at::empty({bytes}, options.dtype(ScalarType::Byte));
  check(cudaMemsetAsync(buffer.data_ptr(), 0xff, bytes, stream), "clearing an exchange buffer");
  return buffer;
}

Tensor Stack::padding() const {
  const Tensor steps = at::arange(p.T, lengths.options()).unsqueeze(1);
  return steps.ge(lengths.unsqueeze(0)).reshape({p.N, 1});
}

Tensor Stack::without_padding(const Tensor& rows) const { return rows.masked_fill(padding(), 0); }

RowRange Stack::rows_of_steps(bool back_in_time, int begin, int end) const {
  const TimeRange times = times_of_steps(back_in_time, begin, end);
  if (a.offsets.empty()) return {times.begin * p.B, (times.end - times.begin) * p.B};
  return {a.offsets[times.begin], a.offsets[times.end] - a.offsets[times.begin]};
}

Tensor Stack::input_of_layer(int64_t layer, const Tensor& below, const RowRange& rows) const {
  const Tensor input = rows.of(below);
  return layer > 0 && dropout_mask.defined() ? input.mul(rows.of(dropout_mask[layer - 1])) : input;
}

bool Stack::aligned(std::initializer_list<const Tensor*> tensors) const {
  return p.H % (16 / storage_bytes(element)) == 0 && begin_aligned(tensors, [](const Tensor&) { return 16; });
}

bool Stack::vectors(std::initializer_list<const Tensor*> tensors) const {
  const int64_t elements = element == Element::kFp64 ? 2 : 4;
  return p.H % elements == 0 && p.P % elements == 0 &&
         begin_aligned(tensors, [&](const Tensor& t) { return elements * t.element_size(); });
}

Tensor Stack::factor_rows(const Tensor& t) const {
  if (row_stride() == p.H && aligned({&t})) return t;
  Tensor padded = at::zeros({t.size(0), row_stride()}, options);
  padded.narrow(1, 0, p.H).copy_(t);
  return padded;
}

Tensor Stack::product(const Tensor& left, const Tensor& right) const {
  Tensor result = empty({left.size(0), right.size(1)});
  multiply(element, result, left, right);
  return result;
}

Tensor Stack::grouped(const Tensor& t) const {
  const int64_t features = t.size(1), rows = p.B / groups;
  return t.view({p.T, groups, rows, features}).transpose(0, 1).reshape({groups, p.T * rows, features});
}

Tensor Stack::gradient(const Tensor& left, const Tensor& right) const {
  return groups == 1 ? product(left.t(), right) : multiply_batches(grouped(left).transpose(1, 2), grouped(right));
}

Tensor Stack::sum_of_rows(const Tensor& t) const {
  const Tensor ones = at::ones({1, t.size(0) / groups}, options);
  if (groups > 1) return multiply_batches(ones.expand({groups, 1, ones.size(1)}), grouped(t)).squeeze(1);
  const Tensor sum = empty({1, t.size(1)});
  multiply(element == Element::kTf32 ? Element::kFp32 : element, sum, ones, t);
  return sum.squeeze(0);
}

void Stack::normalize(const Tensor& rows, void* rstd) const {
  const NormalizeRowsParams params = {rows.size(0), static_cast<int>(rows.size(1)), rows.data_ptr(), rstd};
  check(launch_normalize_rows(element, params, stream), "normalising products");
}

}  // namespace fastlstm::cuda
