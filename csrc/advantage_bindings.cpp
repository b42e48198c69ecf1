// qirl::group_advantage on torch's stable ABI.
#include <algorithm>
#include <numeric>

#include "advantage.h"
#include "bindings.h"

#ifdef QIRL_CUDA
extern "C" const char* qirl_group_order(const qirl::OrderCall* call, cudaStream_t stream);
extern "C" const char* qirl_group_advantage(const qirl::AdvantageCall* call, cudaStream_t stream);
#endif

static void run(const qirl::OrderCall& call, const Tensor& like) {
#ifdef QIRL_CUDA
  on_cuda(call, like, qirl_group_order);
#else
  (void)like;
  std::iota(call.order, call.order + call.calls, 0);
  std::stable_sort(call.order, call.order + call.calls,
                   [&](int64_t a, int64_t b) { return call.group[a] < call.group[b]; });
  for (int64_t m = 0; m < call.calls; ++m) call.sorted[m] = call.group[call.order[m]];
#endif
}

// scores, weights float64 and applies bool [N, K]; group int64 [N]; floors [K], scale [N] float64. order int64 [N]: the samples
// sorted by group, if group is sorted; without it the op sorts, on CUDA in a time that grows with the square of N.
static std::tuple<Tensor, Tensor> group_advantage(Tensor scores, Tensor applies, std::optional<Tensor> order, Tensor group,
                                                  Tensor weights, Tensor floors, Tensor scale, double floor, double clip,
                                                  int64_t convention) {
  const Beside beside{scores};
  check(scores.dim() == 2, "scores must be [samples, components], and has ", scores.dim(), " dimension(s)");
  const int64_t samples = size(scores, 0), components = size(scores, 1);
  check((!order || order->numel() == samples) && group.numel() == samples && scale.numel() == samples &&
        weights.numel() == samples * components && applies.numel() == samples * components &&
        floors.numel() == components,
        "group_advantage: tensors do not fit scores [", samples, ", ", components, "]");
  qirl::AdvantageCall call{samples,
                           components,
                           beside.of<double>(scores, "scores", ScalarType::Double, 2),
                           beside.of<double>(weights, "weights", ScalarType::Double, 2),
                           beside.of<uint8_t>(applies, "applies", ScalarType::Bool, 2),
                           order ? beside.integers(*order, "order") : nullptr,
                           beside.integers(group, "group"),
                           beside.of<double>(floors, "floors", ScalarType::Double, 1),
                           beside.of<double>(scale, "scale", ScalarType::Double, 1),
                           floor,
                           clip,
                           static_cast<int>(convention),
                           nullptr,
                           nullptr,
                           nullptr,
                           nullptr};
  if (refused()) return Nothing{scores};
  Tensor sorted = empty(scores, {2, order ? 0 : samples}, ScalarType::Long);
  if (!order) {
    int64_t* places = static_cast<int64_t*>(sorted.data_ptr());
    run(qirl::OrderCall{samples, call.group, places, places + samples}, scores);
    call.order = places;
    call.group = places + samples;
  }
  Tensor advantage = empty(scores, {samples}), valid = empty(scores, {samples}, ScalarType::Bool);
  Tensor kept = empty(scores, {2, samples}, ScalarType::Double);
  call.total = static_cast<double*>(kept.data_ptr());
  call.value = call.total + samples;
  call.advantage = static_cast<float*>(advantage.data_ptr());
  call.valid = static_cast<uint8_t*>(valid.data_ptr());
#ifdef QIRL_CUDA
  on_cuda(call, scores, qirl_group_advantage);
#else
  for (int64_t begin = 0; begin < samples; ++begin) call.run(begin, qirl::Alone{});
  if (call.of_batch()) call.finish(qirl::Alone{});
#endif
  return {advantage, valid};
}

#ifdef QIRL_CUDA
STABLE_TORCH_LIBRARY_IMPL(qirl, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(qirl, m) {
  m.def("group_advantage(Tensor scores, Tensor applies, Tensor? order, Tensor group, Tensor weights, Tensor floors, "
        "Tensor scale, float floor, float clip, int convention) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qirl, CPU, m) {
#endif
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
}
