// Launchers of flow.h on CUDA. A power of two of threads shares a token, 8 channels (one or two 16-byte accesses) each; a
// second kernel sums a row's tokens in a fixed order and makes its results.
#include "launch.h"
#include "flow.h"

using qirl::Lanes;

// unit(i, lanes) for every token; threads past the last one repeat it, since a warp sums together.
template <class Unit>
__global__ void __launch_bounds__(qirl::kThreads) tokens_kernel(Unit unit, int64_t tokens, int lanes) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * qirl::kThreads + threadIdx.x, i = thread / lanes;
  if (!unit(i < tokens ? i : tokens - 1, Lanes{static_cast<int>(thread % lanes), lanes})) __trap();
}

template <class Finish, int K>
__global__ void __launch_bounds__(qirl::kThreads) rows_kernel(Finish finish, const int64_t* offset, const float* sums) {
  const int64_t r = blockIdx.x;
  const qirl::Block block;
  double total[K] = {};
  for (int64_t i = offset[r] + block.lane; i < offset[r + 1]; i += block.count)
    for (int k = 0; k < K; ++k) total[k] += sums[K * i + k];
  for (int k = 0; k < K; ++k) total[k] = block.sum(total[k]);
  if (block.lane == 0) finish(r, total);
}

template <class T, class Call, class Unit>
static void over_tokens(const Call& call, Unit unit, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < 32 && lanes * T::width < call.channels) lanes *= 2;
  tokens_kernel<<<qirl::blocks_for(call.calls * lanes), qirl::kThreads, 0, stream>>>(unit, call.calls, lanes);
}

template <int K, class Call, class Finish>
static void over_rows(const Call& call, Finish finish, cudaStream_t stream) {
  rows_kernel<Finish, K><<<static_cast<unsigned>(call.rows), qirl::kThreads, 0, stream>>>(finish, call.offset, call.sums);
}

template <class Call, class T>
struct Token {
  Call call;
  __device__ bool operator()(int64_t i, Lanes lanes) const { return call.template token<T>(i, lanes); }
};

template <qirl::Policy kind, class T, bool backward>
struct PolicyToken {
  qirl::PolicyCall call;
  __device__ bool operator()(int64_t i, Lanes lanes) const {
    if constexpr (backward) return call.backward<kind, T>(i, lanes);
    return call.forward<kind, T>(i, lanes);
  }
};

template <qirl::Policy kind>
struct PolicyRow {
  qirl::PolicyCall call;
  __device__ void operator()(int64_t r, const double (&total)[5]) const { call.finish<kind>(r, total); }
};

struct MatchRow {
  qirl::MatchCall call;
  __device__ void operator()(int64_t r, const double (&total)[1]) const { call.finish(r, total); }
};

template <qirl::Policy kind>
static const char* policy(const qirl::PolicyCall& call, cudaStream_t stream) {
  if (call.calls == 0) return nullptr;
  with_types(call, [&](auto types) {
    using T = decltype(types);
    if (call.dv != nullptr) return over_tokens<T>(call, PolicyToken<kind, T, true>{call}, stream);
    over_tokens<T>(call, PolicyToken<kind, T, false>{call}, stream);
  });
  if (call.dv == nullptr) over_rows<5>(call, PolicyRow<kind>{call}, stream);
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
    over_tokens<T>(*call, Token<qirl::FlowStepCall, T>{*call}, stream);
  });
  return qirl::launched();
}

extern "C" const char* qirl_velocity_match(const qirl::MatchCall* call, cudaStream_t stream) {
  if (call->calls == 0) return nullptr;
  with_types(*call, [&](auto types) {
    using T = decltype(types);
    over_tokens<T>(*call, Token<qirl::MatchCall, T>{*call}, stream);
  });
  if (call->dv == nullptr) over_rows<1>(*call, MatchRow{*call}, stream);
  return qirl::launched();
}
