// The kernels as the driver calls them. Each launcher returns what the CUDA runtime returned.
#pragma once

#ifdef FASTLSTM_EMULATE_CUDA
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "params.h"

namespace fastlstm::cuda {

// Success if this build has kernels for the current device.
cudaError_t probe_kernels();

// Runs of steps; the recurrent weights stay in the CTAs. params.exchange must hold 0xff bytes.
cudaError_t launch_persistent_forward(Element element, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_persistent_backward(Element element, const BackwardParams& params, cudaStream_t stream);

// The same with products of warpgroups, if the build has kernels with them: for GPUs of compute capability 9.0.
bool has_warpgroup_kernels();
cudaError_t launch_warpgroup_forward(Element element, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_warpgroup_backward(Element element, const BackwardParams& params, cudaStream_t stream);

// The same, of few hidden units; params.exchange is not used.
cudaError_t launch_resident_forward(Element element, const ForwardParams& params, cudaStream_t stream);
cudaError_t launch_resident_backward(Element element, const BackwardParams& params, cudaStream_t stream);

// The streamed family: a step; with n = T, what d_h_0 and d_c_0 are.
cudaError_t launch_streamed_forward(Element element, const StreamedForwardParams& params, cudaStream_t stream);
cudaError_t launch_streamed_backward(Element element, const StreamedBackwardParams& params, cudaStream_t stream);

// The stepwise family (and streamed, of the states): h and c from h_0 and c_0; the cells of a step; what follows the
// projection of a step.
cudaError_t launch_states_forward(Element element, const StepForwardParams& params, cudaStream_t stream);
cudaError_t launch_cells_forward(Element element, const StepForwardParams& params, cudaStream_t stream);
cudaError_t launch_outputs_forward(Element element, const StepForwardParams& params, cudaStream_t stream);

// d_h and d_c from d_h_n and d_c_n; with a projection, the gradient of a step's outputs; the cells of a step; d_h_0 and
// d_c_0.
cudaError_t launch_states_backward(Element element, const StepBackwardParams& params, cudaStream_t stream);
cudaError_t launch_outputs_backward(Element element, const StepBackwardParams& params, cudaStream_t stream);
cudaError_t launch_cells_backward(Element element, const StepBackwardParams& params, cudaStream_t stream);
cudaError_t launch_finish_backward(Element element, const StepBackwardParams& params, cudaStream_t stream);

// The cells of a step with normalised gates; norms of rows, and the way back through them; activations of normalised
// products.
cudaError_t launch_normalized_cells_forward(Element element, const NormalizedForwardParams& params,
                                            cudaStream_t stream);
cudaError_t launch_normalized_cells_backward(Element element, const NormalizedBackwardParams& params,
                                             cudaStream_t stream);
cudaError_t launch_normalize_rows(Element element, const NormalizeRowsParams& params, cudaStream_t stream);
cudaError_t launch_denormalize_rows(Element element, const DenormalizeRowsParams& params, cudaStream_t stream);
cudaError_t launch_activate_normalized(Element element, const ActivateNormalizedParams& params, cudaStream_t stream);

// Around a recurrence that has folded the projection into its weights.
cudaError_t launch_add_first_products(Element element, const FirstProductsParams& params, cudaStream_t stream);
cudaError_t launch_final_outputs(Element element, const FinalOutputsParams& params, cudaStream_t stream);
cudaError_t launch_given_gradients(Element element, const GivenGradientsParams& params, cudaStream_t stream);
cudaError_t launch_carried_gradients(Element element, const CarriedGradientsParams& params, cudaStream_t stream);
cudaError_t launch_hidden_states(Element element, const HiddenStatesParams& params, cudaStream_t stream);

// What all steps read as h, and their gates, for backward passes of any family.
cudaError_t launch_previous_outputs(Element element, const PreviousOutputsParams& params, cudaStream_t stream);
cudaError_t launch_activate_gates(Element element, const ActivateGatesParams& params, cudaStream_t stream);

}  // namespace fastlstm::cuda
