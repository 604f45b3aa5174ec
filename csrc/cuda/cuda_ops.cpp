#include "cuda_ops.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastlstm, CUDA, m) {
  m.impl("lstm", fastlstm::forward_kernel<fastlstm::cuda::lstm>);
  m.impl("lstm_backward", fastlstm::backward_kernel<fastlstm::cuda::lstm_backward>);
}
