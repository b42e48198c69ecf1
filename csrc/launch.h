// What the CUDA launchers share: raw pointers in, no torch. A launcher returns nullptr, or what CUDA says is wrong; an
// input out of range traps the kernel, since reading it back would stop the host.
#pragma once
#include <cuda_runtime.h>

namespace qirl {

constexpr int kThreads = 256;

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

// The K sums over a block, in its thread 0; their order is fixed.
template <int Threads, int K>
__device__ __forceinline__ void block_sum(double (&x)[K]) {
  constexpr int warps = Threads / 32;
  __shared__ double part[K][warps];
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < K; ++k) {
    for (int distance = 16; distance > 0; distance /= 2) x[k] += __shfl_xor_sync(0xFFFFFFFFu, x[k], distance);
    if (lane == 0) part[k][threadIdx.x / 32] = x[k];
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int k = 0; k < K; ++k) {
    x[k] = lane < warps ? part[k][lane] : 0.0;
    for (int distance = 16; distance > 0; distance /= 2) x[k] += __shfl_xor_sync(0xFFFFFFFFu, x[k], distance);
  }
}

}  // namespace qirl
