// The LSTM cell, forward and backward: the only place where its equations stand.
//
// Included by the CPU kernels, where V is a SIMD vector, and written so that CUDA kernels can use it with V = float.
// `Math` supplies sigmoid and tanh for V. The gate order everywhere is PyTorch's: i, f, g, o.
//
// Forward (Hochreiter & Schmidhuber 1997, with the forget gate of Gers, Schmidhuber & Cummins 2000):
//   i = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)
//   c_t = f * c_{t-1} + i * g             h_t = o * tanh(c_t)
// where a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh are the pre-activations. Backward is the chain rule through these
// lines, in two parts: with layer-normalised gates h_t is made of a normalised c_t (cpu/layer_norm.inl).
#pragma once

#if defined(__CUDACC__)
#define FASTLSTM_CELL __host__ __device__ __forceinline__
#else
#define FASTLSTM_CELL inline __attribute__((always_inline))
#endif

namespace fastlstm {

constexpr int kGates = 4;
constexpr double kNormEpsilon = 1e-5;  // what layer normalisation adds to a variance

// i, f, g, o: pre-activations on entry, activations on exit. c: c_{t-1} on entry, c_t on exit.
template <class Math, class V>
FASTLSTM_CELL void cell_state(V& i, V& f, V& g, V& o, V& c) {
  i = Math::sigmoid(i);
  f = Math::sigmoid(f);
  g = Math::tanh(g);
  o = Math::sigmoid(o);
  c = f * c + i * g;
}

// h_t from the output gate and c_t.
template <class Math, class V>
FASTLSTM_CELL V cell_output(V o, V c) {
  return o * Math::tanh(c);
}

// The way back through cell_output. o: activation on entry, gradient of the pre-activation on exit. d_h: whole gradient
// of h_t. Returns the gradient that reaches c.
template <class Math, class V>
FASTLSTM_CELL V cell_output_backward(V& o, V c, V d_h) {
  const V tanh_c = Math::tanh(c);
  const V d_o = d_h * tanh_c;
  const V d_c = d_h * o * (1 - tanh_c * tanh_c);
  o = d_o * o * (1 - o);
  return d_c;
}

// The way back through cell_state. i, f, g: activations on entry, gradients of the pre-activations on exit. d_c: whole
// gradient of c_t on entry, gradient of c_{t-1} on exit.
template <class V>
FASTLSTM_CELL void cell_state_backward(V& i, V& f, V& g, V c_prev, V& d_c) {
  const V d_i = d_c * g;
  const V d_f = d_c * c_prev;
  const V d_g = d_c * i;
  d_c = d_c * f;
  i = d_i * i * (1 - i);
  f = d_f * f * (1 - f);
  g = d_g * (1 - g * g);
}

// i, f, g, o: activations on entry, gradients of the pre-activations on exit.
// d_c: gradient of c_t through c_{t+1} on entry, gradient of c_{t-1} on exit. d_h: whole gradient of h_t.
template <class Math, class V>
FASTLSTM_CELL void cell_backward(V& i, V& f, V& g, V& o, V c, V c_prev, V d_h, V& d_c) {
  d_c = d_c + cell_output_backward<Math>(o, c, d_h);
  cell_state_backward(i, f, g, c_prev, d_c);
}

}  // namespace fastlstm
