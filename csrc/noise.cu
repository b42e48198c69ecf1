// Launchers of Philox on CUDA: raw pointers in, no torch. They return nullptr, or what CUDA says is wrong;
// an input out of range traps the kernel, since reading it back would stop the host.
#include <cuda_runtime.h>

#include "philox.h"

constexpr int kThreads = 256;

template <class Call>
__global__ void noise_kernel(Call call) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < call.calls && !call.run(i)) __trap();
}

template <class Call>
static const char* launch(Call call, cudaStream_t stream) {
  if (call.calls == 0) return nullptr;
  const int64_t blocks = (call.calls + kThreads - 1) / kThreads;
  noise_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" const char* qirl_philox_words(const qirl::WordsCall* call, cudaStream_t stream) {
  return launch(*call, stream);
}

extern "C" const char* qirl_philox_normal(const qirl::NormalCall* call, cudaStream_t stream) {
  return launch(*call, stream);
}
