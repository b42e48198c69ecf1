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

// The sum over a block of kThreads, the same bits in every thread and on every run.
struct Block {
  int lane = threadIdx.x;
  static constexpr int count = kThreads;

  __device__ __forceinline__ double sum(double x) const {
    __shared__ double warp[kThreads / 32];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    if (lane % 32 == 0) warp[lane / 32] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += warp[w];
    __syncthreads();
    return total;
  }
};

}  // namespace qirl
