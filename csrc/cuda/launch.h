// The launchers of the CUDA kernels, for the bindings: host code without torch. Every pointer in the arguments is to
// device memory. They return the launch's error and read nothing back.
#pragma once
#include <cuda_runtime_api.h>

#include "kernels.h"

namespace difusores {
namespace cuda {

// Blocks of a cluster at most, on the current device, where each may take all of its shared memory; 1: no clusters.
unsigned group_norm_silu_cluster(int capability, int64_t shared_limit);
GroupNormPlan group_norm_silu_plan(const GroupNormSiluArgs& args, bool channels_last, int64_t shared_limit,
                                   unsigned most_cluster);
// partial: plan.partials of 16 bytes.
cudaError_t group_norm_silu(const GroupNormSiluArgs& args, const GroupNormPlan& plan, void* partial,
                            cudaStream_t stream);

// nullptr, or what the kernel takes and this is not. Keys there must be.
const char* attention_refuses(const AttentionArgs& args, int64_t shared_limit);
cudaError_t attention(const AttentionArgs& args, int64_t shared_limit, int multiprocessors, cudaStream_t stream);
// The same with the instructions of sm_90a. capability: 90 for sm_90.
const char* attention_wgmma_refuses(const AttentionArgs& args, int64_t shared_limit, int capability);
cudaError_t attention_wgmma(const AttentionArgs& args, cudaStream_t stream);
// The same; the forward pass takes these arguments.
const char* attention_gradients_refuses(const AttentionGradArgs& args, int64_t shared_limit);
cudaError_t attention_gradients(const AttentionGradArgs& args, int64_t shared_limit, cudaStream_t stream);

// Whether the kernel counts as far as these sizes.
bool bias_residual_takes(const BiasResidualArgs& args);
cudaError_t bias_residual(const BiasResidualArgs& args, bool channels_last, cudaStream_t stream);

cudaError_t geglu(const GegluArgs& args, cudaStream_t stream);

// tiles.threads == 0: the kernels do not count that far. scratch: plan.floats floats.
GroupNormBackwardPlan group_norm_silu_backward_plan(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                                    bool channels_last);
cudaError_t group_norm_silu_backward(const GroupNormSiluArgs& args, const GroupNormSiluGrads& grads,
                                     const GroupNormBackwardPlan& plan, void* scratch, cudaStream_t stream);

// Bytes that guidance_rescale needs at `partial`; 0: none.
int64_t guidance_rescale_bytes(const GuidanceRescaleArgs& args);
cudaError_t guidance_rescale(const GuidanceRescaleArgs& args, const StepRow& row, void* partial, cudaStream_t stream);

// lanes == 0: the kernel does not take rows that long.
LayerNormPlan layer_norm_plan(const LayerNormArgs& args);
cudaError_t layer_norm(const LayerNormArgs& args, const LayerNormPlan& plan, cudaStream_t stream);

cudaError_t scheduler_step(const SchedulerStepArgs& args, const StepRow& row, cudaStream_t stream);

}  // namespace cuda
}  // namespace difusores
