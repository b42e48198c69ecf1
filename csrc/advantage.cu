// Launchers of group_advantage on CUDA: a warp for each sample, of which the first of a group does the group's work; then
// one block for what the whole batch says, where the convention wants it.
#include "launch.h"
#include "advantage.h"

constexpr int kBatchThreads = 1024;
constexpr int kEach = 4;  // samples that a warp finds the places of, with one reading of all groups

// The threads of a warp.
struct Warp {
  int lane = threadIdx.x % 32;
  static constexpr int count = 32;

  __device__ __forceinline__ double sum(double x) const {
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
  }
};

// The threads of a block of kBatchThreads; every one gets the sum, in an order that is fixed.
struct Batch {
  int lane = threadIdx.x;
  static constexpr int count = kBatchThreads;

  __device__ __forceinline__ double sum(double x) const {
    __shared__ double warp[kBatchThreads / 32];
    const Warp own;
    x = own.sum(x);
    if (own.lane == 0) warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = own.sum(warp[own.lane]);
    __syncthreads();
    return x;
  }
};

__device__ __forceinline__ int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * qirl::kThreads + threadIdx.x) / 32;
}

// A sample's place: how many samples come before it. Every warp reads all groups, so the work grows with their square.
__global__ void __launch_bounds__(qirl::kThreads) order_kernel(qirl::OrderCall call) {
  const int64_t first = warp_index() * kEach;
  const int lane = threadIdx.x % 32;
  int64_t own[kEach];
  unsigned place[kEach] = {};
  for (int e = 0; e < kEach; ++e) own[e] = first + e < call.calls ? call.group[first + e] : 0;
  for (int64_t j = lane; j < call.calls; j += 32) {
    const int64_t other = call.group[j];
    for (int e = 0; e < kEach; ++e) place[e] += other < own[e] || (other == own[e] && j < first + e);
  }
  for (int e = 0; e < kEach; ++e) {
    const unsigned at = __reduce_add_sync(0xFFFFFFFFu, place[e]);
    if (lane != 0 || first + e >= call.calls) continue;
    call.order[at] = first + e;
    call.sorted[at] = own[e];
  }
}

__global__ void __launch_bounds__(qirl::kThreads) groups_kernel(qirl::AdvantageCall call) {
  const int64_t begin = warp_index();
  if (begin < call.calls) call.run(begin, Warp{});
}

__global__ void __launch_bounds__(kBatchThreads) batch_kernel(qirl::AdvantageCall call) { call.finish(Batch{}); }

extern "C" const char* qirl_group_order(const qirl::OrderCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  order_kernel<<<qirl::blocks_for((call->calls + kEach - 1) / kEach * 32), qirl::kThreads, 0, stream>>>(*call);
  return qirl::launched();
}

extern "C" const char* qirl_group_advantage(const qirl::AdvantageCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  groups_kernel<<<qirl::blocks_for(call->calls * 32), qirl::kThreads, 0, stream>>>(*call);
  if (call->of_batch()) batch_kernel<<<1, kBatchThreads, 0, stream>>>(*call);
  return qirl::launched();
}
