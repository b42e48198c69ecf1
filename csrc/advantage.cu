// Launcher of group_advantage on CUDA: one block a sample, of which the first of each group does the group's work.
#include "launch.h"
#include "advantage.h"

__global__ void groups_kernel(qirl::AdvantageCall call) { call.run(blockIdx.x, qirl::Block{}); }

__global__ void batch_kernel(qirl::AdvantageCall call) { call.finish(qirl::Block{}); }

extern "C" const char* qirl_group_advantage(const qirl::AdvantageCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  groups_kernel<<<static_cast<unsigned>(call->calls), qirl::kThreads, 0, stream>>>(*call);
  batch_kernel<<<1, qirl::kThreads, 0, stream>>>(*call);
  return qirl::launched();
}
