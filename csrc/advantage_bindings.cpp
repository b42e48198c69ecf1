// qirl::group_advantage on torch's stable ABI.
#include "advantage.h"
#include "bindings.h"

#ifdef QIRL_CUDA
extern "C" const char* qirl_group_advantage(const qirl::AdvantageCall* call, cudaStream_t stream);
#endif

// scores, weights float64 and applies bool [N, K]; order, group int64 [N], sorted by group; floors [K], scale [N] float64.
static std::tuple<Tensor, Tensor> group_advantage(Tensor scores, Tensor applies, Tensor order, Tensor group, Tensor weights,
                                                  Tensor floors, Tensor scale, double floor, double clip,
                                                  int64_t convention) {
  const Beside beside{scores};
  check(scores.dim() == 2, "scores must be [samples, components], and has ", scores.dim(), " dimension(s)");
  const int64_t samples = size(scores, 0), components = size(scores, 1);
  check(order.numel() == samples && group.numel() == samples && scale.numel() == samples &&
        weights.numel() == samples * components && applies.numel() == samples * components &&
        floors.numel() == components,
        "group_advantage: tensors do not fit scores [", samples, ", ", components, "]");
  qirl::AdvantageCall call{samples,
                           components,
                           beside.of<double>(scores, "scores", ScalarType::Double, 2),
                           beside.of<double>(weights, "weights", ScalarType::Double, 2),
                           beside.of<uint8_t>(applies, "applies", ScalarType::Bool, 2),
                           beside.integers(order, "order"),
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
  call.finish(qirl::Alone{});
#endif
  return {advantage, valid};
}

#ifdef QIRL_CUDA
STABLE_TORCH_LIBRARY_IMPL(qirl, CUDA, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(qirl, m) {
  m.def("group_advantage(Tensor scores, Tensor applies, Tensor order, Tensor group, Tensor weights, Tensor floors, "
        "Tensor scale, float floor, float clip, int convention) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qirl, CPU, m) {
#endif
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
}
