// Launchers of flow.h on CUDA. A power of two of threads shares a token, 8 channels (one or two 16-byte accesses) each.
//
// What a row is made of is summed token by token, then over the row's tokens in an order that depends on their number
// alone. One launch does both where a cluster of blocks is enough for a row; elsewhere the same kernel is launched once for
// the tokens and once for the rows, which gives the same bits.
#include "launch.h"
#include "flow.h"

using qirl::Lanes;

constexpr int kTokenThreads = 128, kRowThreads = 512;  // of a block
constexpr int kCluster = 8;                            // blocks, the most that any GPU with clusters takes
constexpr int kTurns = 4;                              // of a cluster over its row; beyond, more blocks are faster

// How many threads share a token of a call, as a power of two.
template <class T>
static int log_lanes(const qirl::TokenCall& call) {
  int log = 0;
  while (log < 5 && (T::width << log) < call.channels) ++log;
  return log;
}

// unit(i, lanes) for every token; threads past the last one repeat it, since a warp sums together.
template <class Unit>
__global__ void __launch_bounds__(kTokenThreads, 1) tokens_kernel(Unit unit, int64_t tokens, int log) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x, i = thread >> log;
  const Lanes lanes{static_cast<int>(threadIdx.x & ((1u << log) - 1)), 1 << log};
  if (!unit(i < tokens ? i : tokens - 1, lanes)) __trap();
}

template <class T, class Unit>
static void over_tokens(const qirl::TokenCall& call, Unit unit, cudaStream_t stream) {
  const int log = log_lanes<T>(call);
  const int64_t blocks = ((call.calls << log) + kTokenThreads - 1) / kTokenThreads;
  tokens_kernel<<<static_cast<unsigned>(blocks), kTokenThreads, 0, stream>>>(unit, call.calls, log);
}

// Waits for all blocks of the cluster, whose writes to memory are then seen.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

enum Part { kTokens = 1, kEnds = 2 };  // of a row's work

// Work on row blockIdx.x / spread: the sums of its tokens, shared out among `spread` blocks, then what one block makes of
// them. Both parts at once: the blocks are a cluster.
template <class Row>
__global__ void __launch_bounds__(kRowThreads, 1) rows_kernel(Row row, int log, int spread, int parts) {
  const int64_t r = blockIdx.x / spread, begin = row.call.offset[r], end = row.call.offset[r + 1];
  const int rank = static_cast<int>(blockIdx.x % spread);
  if (begin < 0 || end < begin || end > row.call.calls) __trap();
  if (parts & kTokens) {
    const auto of_row = row.of_row(r);
    const Lanes lanes{static_cast<int>(threadIdx.x & ((1u << log) - 1)), 1 << log};
    const int64_t together = kRowThreads >> log, own = threadIdx.x >> log;
    for (int64_t i = begin + rank * together; i < end; i += spread * together)
      row.sum(i + own < end ? i + own : end - 1, of_row, lanes);  // a warp sums together
    if (parts & kEnds) cluster_barrier();
  }
  if (!(parts & kEnds) || rank != 0) return;
  double total[Row::sums] = {};
  for (int64_t i = begin + threadIdx.x; i < end; i += kRowThreads)
    for (int k = 0; k < Row::sums; ++k) total[k] += __ldcg(row.call.sums + Row::sums * i + k);
  qirl::block_sum<kRowThreads>(total);
  if (threadIdx.x == 0) row.finish(r, total);
}

// Whether this device has clusters of blocks.
static bool has_clusters() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <class T, class Row>
static void over_rows(Row row, cudaStream_t stream) {
  const int log = log_lanes<T>(row.call);
  const int64_t rows = row.call.rows, threads = (row.call.calls << log) / (rows > 0 ? rows : 1);  // of a row
  const int64_t blocks = (threads + kRowThreads - 1) / kRowThreads;
  if (blocks > kTurns * kCluster || !has_clusters()) {
    const int spread = static_cast<int>(blocks > 0 ? blocks : 1);
    rows_kernel<<<static_cast<unsigned>(rows * spread), kRowThreads, 0, stream>>>(row, log, spread, kTokens);
    rows_kernel<<<static_cast<unsigned>(rows), kRowThreads, 0, stream>>>(row, log, 1, kEnds);
    return;
  }
  int cluster = 1;
  while (cluster < kCluster && cluster < blocks) cluster *= 2;
  cudaLaunchAttribute size;
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = static_cast<unsigned>(cluster);
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * cluster));
  config.blockDim = dim3(kRowThreads);
  config.stream = stream;
  config.attrs = &size;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, rows_kernel<Row>, row, log, cluster, kTokens | kEnds);
}

template <qirl::Policy kind, class T>
struct PolicyRow {
  static constexpr int sums = 5;
  qirl::PolicyCall call;
  __device__ auto of_row(int64_t r) const { return call.terms<kind>(r); }
  __device__ void sum(int64_t i, const qirl::Terms<kind>& terms, Lanes lanes) const {
    call.forward<kind, T>(i, terms, lanes);
  }
  __device__ void finish(int64_t r, const double (&total)[5]) const { call.finish<kind>(r, total); }
};

template <qirl::Policy kind, class T>
struct PolicyGradient {
  qirl::PolicyCall call;
  __device__ bool operator()(int64_t i, Lanes lanes) const { return call.backward<kind, T>(i, lanes); }
};

template <class T>
struct MatchRow {
  static constexpr int sums = 1;
  qirl::MatchCall call;
  __device__ int of_row(int64_t) const { return 0; }
  __device__ void sum(int64_t i, int, Lanes lanes) const { call.forward<T>(i, lanes); }
  __device__ void finish(int64_t r, const double (&total)[1]) const { call.finish(r, total); }
};

template <class T>
struct MatchGradient {
  qirl::MatchCall call;
  __device__ bool operator()(int64_t i, Lanes lanes) const { return call.backward<T>(i, lanes); }
};

template <class T>
struct FlowStep {
  qirl::FlowStepCall call;
  __device__ bool operator()(int64_t i, Lanes lanes) const { return call.token<T>(i, lanes); }
};

template <qirl::Policy kind>
static const char* policy(const qirl::PolicyCall& call, cudaStream_t stream) {
  if (call.calls == 0) return nullptr;
  with_types(call, [&](auto types) {
    using T = decltype(types);
    if (call.dv != nullptr) return over_tokens<T>(call, PolicyGradient<kind, T>{call}, stream);
    over_rows<T>(PolicyRow<kind, T>{call}, stream);
  });
  return qirl::launched();
}

extern "C" const char* qirl_policy_nft(const qirl::PolicyCall* call, cudaStream_t stream) {
  return policy<qirl::kNft>(*call, stream);
}

extern "C" const char* qirl_policy_nft_x0(const qirl::PolicyCall* call, cudaStream_t stream) {
  return policy<qirl::kNftX0>(*call, stream);
}

extern "C" const char* qirl_policy_ratio(const qirl::PolicyCall* call, cudaStream_t stream) {
  return policy<qirl::kRatio>(*call, stream);
}

extern "C" const char* qirl_flow_step(const qirl::FlowStepCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  with_types(*call, [&](auto types) {
    using T = decltype(types);
    over_tokens<T>(*call, FlowStep<T>{*call}, stream);
  });
  return qirl::launched();
}

extern "C" const char* qirl_velocity_match(const qirl::MatchCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  with_types(*call, [&](auto types) {
    using T = decltype(types);
    if (call->dv != nullptr) return over_tokens<T>(*call, MatchGradient<T>{*call}, stream);
    over_rows<T>(MatchRow<T>{*call}, stream);
  });
  return qirl::launched();
}
