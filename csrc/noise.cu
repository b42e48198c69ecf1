// Launchers of Philox on CUDA.
#include "launch.h"
#include "philox.h"

template <class Call>
__global__ void noise_kernel(Call call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * qirl::kThreads + threadIdx.x;
  if (i < call.calls && !call.run(i)) __trap();
}

template <class Call>
static const char* launch(Call call, cudaStream_t stream) {
  if (call.calls == 0) return nullptr;
  noise_kernel<<<qirl::blocks_for(call.calls), qirl::kThreads, 0, stream>>>(call);
  return qirl::launched();
}

extern "C" const char* qirl_philox_words(const qirl::WordsCall* call, cudaStream_t stream) {
  return launch(*call, stream);
}

extern "C" const char* qirl_philox_normal(const qirl::NormalCall* call, cudaStream_t stream) {
  return launch(*call, stream);
}
