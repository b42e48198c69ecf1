// The ops of flow.h on torch's stable ABI: tensors become calls, calls run on the CPU here and on CUDA in flow.cu.
#include "bindings.h"
#include "flow.h"

using qirl::Lanes;
using Maybe = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

static constexpr int64_t kGrain = 64;  // tokens of a task, at least
static constexpr const char* kRange = "every row must be in [0, rows), and counter words must fit uint32";

#ifdef QIRL_CUDA
extern "C" const char* qirl_flow_step(const qirl::FlowStepCall* call, cudaStream_t stream);
extern "C" const char* qirl_policy_nft(const qirl::PolicyCall* call, cudaStream_t stream);
extern "C" const char* qirl_policy_nft_x0(const qirl::PolicyCall* call, cudaStream_t stream);
extern "C" const char* qirl_policy_ratio(const qirl::PolicyCall* call, cudaStream_t stream);
extern "C" const char* qirl_velocity_match(const qirl::MatchCall* call, cudaStream_t stream);

static void run(const qirl::FlowStepCall& call, const Tensor& like) { on_cuda(call, like, qirl_flow_step); }
static void run(const qirl::MatchCall& call, const Tensor& like) { on_cuda(call, like, qirl_velocity_match); }
template <qirl::Policy kind>
static void run(const qirl::PolicyCall& call, const Tensor& like) {
  on_cuda(call, like, kind == qirl::kNft ? qirl_policy_nft : kind == qirl::kNftX0 ? qirl_policy_nft_x0 : qirl_policy_ratio);
}
#else
// finish(r) for every row, with the sums over its tokens in their order.
template <int K, class Call, class Finish>
static void finish_rows(const Call& call, Finish finish) {
  on_cpu(call.rows, 1, kRange, [&](int64_t r) {
    double total[K] = {};
    for (int64_t i = call.offset[r]; i < call.offset[r + 1]; ++i)
      for (int k = 0; k < K; ++k) total[k] += call.sums[K * i + k];
    finish(r, total);
    return true;
  });
}

static void run(const qirl::FlowStepCall& call, const Tensor&) {
  with_types(call, [&](auto types) {
    on_cpu(call.calls, kGrain, kRange, [call](int64_t i) { return call.token<decltype(types)>(i, Lanes{}); });
  });
}

static void run(const qirl::MatchCall& call, const Tensor&) {
  with_types(call, [&](auto types) {
    using T = decltype(types);
    on_cpu(call.calls, kGrain, kRange, [call](int64_t i) {
      if (call.dv) return call.backward<T>(i, Lanes{});
      call.forward<T>(i, Lanes{});
      return call.own(i).known;
    });
  });
  if (!call.dv) finish_rows<1>(call, [&](int64_t r, const double(&total)[1]) { call.finish(r, total); });
}

template <qirl::Policy kind>
static void run(const qirl::PolicyCall& call, const Tensor&) {
  with_types(call, [&](auto types) {
    using T = decltype(types);
    on_cpu(call.calls, kGrain, kRange, [call](int64_t i) {
      if (call.dv) return call.backward<kind, T>(i, Lanes{});
      const auto [own, known] = call.own(i);
      call.forward<kind, T>(i, call.terms<kind>(own), Lanes{});
      return known;
    });
  });
  if (!call.dv) finish_rows<5>(call, [&](int64_t r, const double(&total)[5]) { call.finish<kind>(r, total); });
}
#endif

namespace {

// Pointers of tensors [tokens, channels], all contiguous, of one of two dtypes; `wide` while 16-byte blocks fit all of them.
struct Tokens {
  const Tensor& like;
  bool wide = true;

  const void* of(const Tensor& t, const char* name, bool bf16) {
    check(t.scalar_type() == (bf16 ? ScalarType::BFloat16 : ScalarType::Float), name,
          " has another dtype than its neighbours: float32 or bfloat16 for all states, and for all velocities");
    check(t.dim() == 2 && t.is_contiguous() && size(t, 0) == size(like, 0) && size(t, 1) == size(like, 1), name,
          " must be contiguous [", size(like, 0), ", ", size(like, 1), "]");
    check(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
          " is on another device than the first tensor");
    wide = wide && size(t, 1) % 8 == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
    return t.data_ptr();
  }
  const void* of(const Maybe& t, const char* name, bool bf16) { return t ? of(*t, name, bf16) : nullptr; }
};

}  // namespace

static bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

static qirl::TokenCall tokens_of(const Tensor& state, const Tensor& v, const Tensor& row, int64_t rows,
                                 const int64_t* offset) {
  check(v.dim() == 2 && row.numel() == size(v, 0), "row must name the sample of each of the ", size(v, 0),
        " tokens, and has ", row.numel());
  check(rows > 0 || row.numel() == 0, kRange);
  if (refused()) return {};
  return {size(v, 0), size(v, 1), is_bf16(state), is_bf16(v), true, rows, Beside{v}.integers(row, "row"), offset};
}

static const int64_t* offsets(const Tensor& offset, const Tensor& like, int64_t rows) {
  check(offset.numel() == rows + 1, "offset must have one entry more than the ", rows, " rows, and has ",
        offset.numel());
  return Beside{like}.integers(offset, "offset");
}

static qirl::Steps steps_of(const Tensor& t, const Tensor& s, const Tensor& cap, const Tensor& mode, double level,
                            double sine) {
  const Beside beside{t};
  check(s.numel() == t.numel() && cap.numel() == t.numel() && mode.numel() == t.numel(),
        "t, s, cap and mode differ in length");
  return {t.numel(), beside.floats(t, "t"), beside.floats(s, "s"), beside.floats(cap, "cap"),
          beside.integers(mode, "mode"), static_cast<float>(level), static_cast<float>(sine)};
}

// x' [N, C] and, where asked for, the sums of squares [N] of the log-probability; no counters: no noise. word: of all rows
// where there is no step_word.
static Two flow_step(Tensor x, Tensor v, Maybe uncond, Tensor row, Tensor t, Tensor s, Tensor cap, Tensor mode,
                     Maybe prompt, Maybe sample_word, Maybe step_word, Maybe token, double level, double sine,
                     double guidance, bool rescale, int64_t seed, bool squares, bool rounds, int64_t word) {
  qirl::FlowStepCall call{};
  static_cast<qirl::TokenCall&>(call) = tokens_of(x, v, row, t.numel(), nullptr);
  Tokens tokens{v};
  call.x = tokens.of(x, "x", call.bf16_states);
  call.v = {tokens.of(v, "v_cond", call.bf16_velocities), tokens.of(uncond, "v_uncond", call.bf16_velocities),
            static_cast<float>(guidance), rescale};
  call.steps = steps_of(t, s, cap, mode, level, sine);
  call.noisy = prompt.has_value();
  if (call.noisy) {
    check(call.channels % 4 == 0, "channels=", call.channels, " is not a multiple of 4: noise comes in fours");
    call.noise = noise_of(v, seed, *prompt, *sample_word, step_word, *token, call.channels, word);
    check(call.noise.rows == call.rows && token->numel() == call.calls,
          "the noise must have a counter for each of the ", call.rows, " rows and ", call.calls, " tokens");
  }
  if (refused()) return Nothing{v};
  call.rounds = rounds;
  Tensor next = empty(v, {call.calls, call.channels}), sums = empty(v, {squares ? call.calls : 0});
  call.x_next = static_cast<float*>(next.data_ptr());
  call.squares = squares ? static_cast<float*>(sums.data_ptr()) : nullptr;
  call.wide = tokens.wide;
  run(call, v);
  return {next, sums};
}

static qirl::PolicyCall policy_of(const Tensor& v, const Tensor& v_old, const Tensor& first, const Tensor& second,
                                  const Maybe& v_ref, const Tensor& row, const Tensor& offset, int64_t rows) {
  qirl::PolicyCall call{};
  static_cast<qirl::TokenCall&>(call) = tokens_of(first, v, row, rows, offsets(offset, v, rows));
  Tokens tokens{v};
  call.v = tokens.of(v, "v", call.bf16_velocities);
  call.v_old = tokens.of(v_old, "v_old", call.bf16_velocities);
  call.v_ref = tokens.of(v_ref, "v_ref", call.bf16_velocities);
  call.first = tokens.of(first, "x0 or x", call.bf16_states);
  call.second = tokens.of(second, "noise or x'", call.bf16_states);
  call.wide = tokens.wide;
  return call;
}

// What both directions of nft and of the ratio read beside the tokens.
static void read_nft(qirl::PolicyCall& call, const Tensor& t, const Tensor& r, double beta, double scale) {
  const Beside beside{t};
  check(r.numel() == t.numel(), "t and r differ in length: ", t.numel(), " and ", r.numel());
  call.steps.t = beside.floats(t, "t");
  call.share = beside.floats(r, "r");
  call.beta = static_cast<float>(beta);
  call.scale = static_cast<float>(scale);
}

template <qirl::Policy kind>
static Five losses(qirl::PolicyCall call, const Tensor& v) {
  if (refused()) return Nothing{v};
  Tensor sums = empty(v, {call.calls, 5}), loss = empty(v, {call.rows}), kl = empty(v, {call.rows});
  Tensor ratio = empty(v, {call.rows}), clipped = empty(v, {call.rows}, ScalarType::Bool);
  Tensor coefficients = empty(v, {call.rows, 2});
  call.sums = static_cast<float*>(sums.data_ptr());
  call.loss = static_cast<float*>(loss.data_ptr());
  call.ratio = static_cast<float*>(ratio.data_ptr());
  call.clipped = static_cast<uint8_t*>(clipped.data_ptr());
  call.kl = static_cast<float*>(kl.data_ptr());
  call.coefficients = static_cast<float*>(coefficients.data_ptr());
  run<kind>(call, v);
  return {loss, kl, coefficients, ratio, clipped};
}

template <qirl::Policy kind>
static Tensor gradient(qirl::PolicyCall call, const Tensor& v, const Maybe& dloss, const Maybe& dkl,
                       const Tensor& coefficients) {
  const Beside beside{v};
  const auto of_rows = [&](const Maybe& t, const char* name) -> const float* {
    if (!t) return nullptr;
    check(t->numel() == call.rows, name, " must have one entry for each of the ", call.rows, " rows");
    return beside.floats(*t, name);
  };
  call.dloss = of_rows(dloss, "dloss");
  call.dkl = of_rows(dkl, "dkl");
  call.coefficients = beside.floats(coefficients, "coefficients", 2);
  check(coefficients.numel() == 2 * call.rows, "coefficients must have two entries for each of the ", call.rows, " rows");
  if (refused()) return Nothing{v};
  Tensor dv = torch::stable::empty_like(v);
  call.dv = dv.data_ptr();
  run<kind>(call, v);
  return dv;
}

static std::tuple<Tensor, Tensor, Tensor> policy_nft(Tensor v, Tensor v_old, Tensor x0, Tensor noise, Maybe v_ref,
                                                     Tensor row, Tensor offset, Tensor t, Tensor r, double beta,
                                                     bool x0_weighted, double scale) {
  qirl::PolicyCall call = policy_of(v, v_old, x0, noise, v_ref, row, offset, t.numel());
  read_nft(call, t, r, beta, scale);
  auto [loss, kl, coefficients, ratio, clipped] = x0_weighted ? losses<qirl::kNftX0>(call, v) : losses<qirl::kNft>(call, v);
  return {loss, kl, coefficients};
}

static Tensor policy_nft_backward(Maybe dloss, Maybe dkl, Tensor coefficients, Tensor v, Tensor v_old, Tensor x0,
                                  Tensor noise, Maybe v_ref, Tensor row, Tensor offset, Tensor t, Tensor r, double beta,
                                  bool x0_weighted, double scale) {
  qirl::PolicyCall call = policy_of(v, v_old, x0, noise, v_ref, row, offset, t.numel());
  read_nft(call, t, r, beta, scale);
  return x0_weighted ? gradient<qirl::kNftX0>(call, v, dloss, dkl, coefficients)
                     : gradient<qirl::kNft>(call, v, dloss, dkl, coefficients);
}

static Five policy_ratio(Tensor v, Tensor v_old, Tensor x, Tensor x_next, Maybe v_ref, Tensor row, Tensor offset, Tensor t,
                         Tensor s, Tensor cap, Tensor mode, Tensor advantage, double level, double sine, double clip_low,
                         double clip_high, bool guard) {
  qirl::PolicyCall call = policy_of(v, v_old, x, x_next, v_ref, row, offset, t.numel());
  call.steps = steps_of(t, s, cap, mode, level, sine);
  call.advantage = Beside{v}.floats(advantage, "advantage");
  check(advantage.numel() == call.rows, "advantage must have ", call.rows, " entries");
  call.clip_low = static_cast<float>(clip_low);
  call.clip_high = static_cast<float>(clip_high);
  call.guard = guard;
  return losses<qirl::kRatio>(call, v);
}

static Tensor policy_ratio_backward(Maybe dloss, Maybe dkl, Tensor coefficients, Tensor v, Tensor v_old, Tensor x,
                                    Tensor x_next, Maybe v_ref, Tensor row, Tensor offset, Tensor t, Tensor s, Tensor cap,
                                    Tensor mode, double level, double sine) {
  qirl::PolicyCall call = policy_of(v, v_old, x, x_next, v_ref, row, offset, t.numel());
  call.steps = steps_of(t, s, cap, mode, level, sine);
  return gradient<qirl::kRatio>(call, v, dloss, dkl, coefficients);
}

static qirl::MatchCall match_of(const Tensor& v, const Tensor& cond, const Maybe& uncond, const Tensor& row,
                                const Tensor& offset, double guidance, bool rescale) {
  qirl::MatchCall call{};
  const int64_t rows = offset.numel() - 1;
  static_cast<qirl::TokenCall&>(call) = tokens_of(cond, v, row, rows, offsets(offset, v, rows));
  Tokens tokens{v};
  call.v = tokens.of(v, "v", call.bf16_velocities);
  call.teacher = {tokens.of(cond, "teacher_cond", call.bf16_states),
                  tokens.of(uncond, "teacher_uncond", call.bf16_states), static_cast<float>(guidance), rescale};
  call.wide = tokens.wide;
  return call;
}

static Tensor velocity_match(Tensor v, Tensor cond, Maybe uncond, Tensor row, Tensor offset, double guidance, bool rescale) {
  qirl::MatchCall call = match_of(v, cond, uncond, row, offset, guidance, rescale);
  if (refused()) return Nothing{v};
  Tensor sums = empty(v, {call.calls}), loss = empty(v, {call.rows});
  call.sums = static_cast<float*>(sums.data_ptr());
  call.loss = static_cast<float*>(loss.data_ptr());
  run(call, v);
  return loss;
}

static Tensor velocity_match_backward(Tensor dloss, Tensor v, Tensor cond, Maybe uncond, Tensor row, Tensor offset,
                                      double guidance, bool rescale) {
  qirl::MatchCall call = match_of(v, cond, uncond, row, offset, guidance, rescale);
  call.dloss = Beside{v}.floats(dloss, "dloss");
  check(dloss.numel() == call.rows, "dloss must have ", call.rows, " entries, and has ", dloss.numel());
  if (refused()) return Nothing{v};
  Tensor dv = torch::stable::empty_like(v);
  call.dv = dv.data_ptr();
  run(call, v);
  return dv;
}

#ifdef QIRL_CUDA
STABLE_TORCH_LIBRARY_IMPL(qirl, CUDA, m) {
#else
#define PAIRS "Tensor v, Tensor v_old, Tensor first, Tensor second, Tensor? v_ref, Tensor row, Tensor offset, "
#define STEPS "Tensor t, Tensor s, Tensor cap, Tensor mode, "
#define TEACHER "Tensor v, Tensor teacher_cond, Tensor? teacher_uncond, Tensor row, Tensor offset, float guidance, bool rescale"
#define GRADIENTS "Tensor? dloss, Tensor? dkl, Tensor coefficients, "
STABLE_TORCH_LIBRARY_FRAGMENT(qirl, m) {
  m.def("flow_step(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor row, " STEPS
        "Tensor? prompt, Tensor? sample_word, Tensor? step_word, Tensor? token, float level, float sine, float guidance, "
        "bool rescale, int seed, bool squares, bool rounds, int word=0) -> (Tensor, Tensor)");
  m.def("policy_nft(" PAIRS "Tensor t, Tensor r, float beta, bool x0_weighted, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("policy_nft_backward(" GRADIENTS PAIRS "Tensor t, Tensor r, float beta, bool x0_weighted, float scale) -> Tensor");
  m.def("policy_ratio(" PAIRS STEPS "Tensor advantage, float level, float sine, float clip_low, float clip_high, "
        "bool guard) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_ratio_backward(" GRADIENTS PAIRS STEPS "float level, float sine) -> Tensor");
  m.def("velocity_match(" TEACHER ") -> Tensor");
  m.def("velocity_match_backward(Tensor dloss, " TEACHER ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qirl, CPU, m) {
#endif
  m.impl("flow_step", TORCH_BOX(&flow_step));
  m.impl("policy_nft", TORCH_BOX(&policy_nft));
  m.impl("policy_nft_backward", TORCH_BOX(&policy_nft_backward));
  m.impl("policy_ratio", TORCH_BOX(&policy_ratio));
  m.impl("policy_ratio_backward", TORCH_BOX(&policy_ratio_backward));
  m.impl("velocity_match", TORCH_BOX(&velocity_match));
  m.impl("velocity_match_backward", TORCH_BOX(&velocity_match_backward));
}
