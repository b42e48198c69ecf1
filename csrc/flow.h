// The sampler's step, the policy losses and the distillation loss, token by token (algorithm page, sections 2, 3 and 6).
// One source for g++ and nvcc. kernels/flow_step.py, policy_loss.py and velocity_match.py hold the references.
//
// A call does token i, each thread T::width neighbouring channels at a time, and writes its sums over the channels;
// finish(r, total) makes row r's results out of the sums of its tokens, which are neighbours. What a token's row says is read
// after the thread's first channels, since it has to wait for the row.
#pragma once
#include "philox.h"

namespace qirl {

enum Mode { kOde, kSde, kCps, kDance };

// mean = on_x x + on_v v, and the standard deviation around it.
struct Transition {
  float on_x, on_v, std;
};

// The steps of R samples. level: a or eta; sine: sin(a pi / 2).
struct Steps {
  int64_t rows;
  const float *t, *s, *cap;
  const int64_t* mode;
  float level, sine;

  QIRL_FN Transition at(int64_t row) const {
    const float from = t[row], to = s[row], dt = to - from;
    switch (mode[row]) {
      case kSde: {
        const float q2 = level * level * from / (1.0f - (from < 1.0f ? from : cap[row]));
        const float half = q2 / (2.0f * from);
        return {1.0f + half * dt, (1.0f + half * (1.0f - from)) * dt, sqrtf(q2 * -dt)};
      }
      case kCps: {
        const float std = to * sine, kept = sqrtf(to * to - std * std);
        return {(1.0f - to) + kept, kept * (1.0f - from) - (1.0f - to) * from, std};
      }
      case kDance: {
        const float half = level * level / (2.0f * from);
        return {1.0f + half * dt, (1.0f + half * (1.0f - from)) * dt, level * sqrtf(-dt)};
      }
      default:
        return {1.0f, dt, 0.0f};
    }
  }
};

// Dtypes of states (x, x', x0, noise) and of velocities, each bfloat16 or float, and how many neighbours go at once.
template <class X, class V, int Width>
struct Types {
  using State = X;
  using Velocity = V;
  static constexpr int width = Width;
};

// Calls f with the Types of a call; width 1 serves any channels and alignment.
template <class Call, class F>
auto with_types(const Call& call, F f) {
  const auto velocities = [&](auto state, auto width) {
    using X = decltype(state);
    constexpr int w = decltype(width)::value;
    return call.bf16_velocities ? f(Types<X, BF16, w>{}) : f(Types<X, float, w>{});
  };
  const auto states = [&](auto width) {
    return call.bf16_states ? velocities(BF16{}, width) : velocities(float{}, width);
  };
  return call.wide ? states(std::integral_constant<int, 8>{}) : states(std::integral_constant<int, 1>{});
}

// What all calls of this file have.
struct TokenCall {
  int64_t calls, channels;  // tokens
  bool bf16_states, bf16_velocities, wide;
  int64_t rows;
  const int64_t *row, *offset;  // [tokens]; [rows + 1], the token at which each row begins

  // The row of token i; where it is out of range, row 0 and `known` false, so that no load waits for a branch.
  struct Own {
    int64_t row = 0;
    bool known = true;
  };
  QIRL_FN Own own(int64_t i) const {
    const bool known = row[i] >= 0 && row[i] < rows;
    return {known ? row[i] : 0, known};
  }

  QIRL_FN int64_t elements(int64_t r) const { return (offset[r + 1] - offset[r]) * channels; }

  // 2 / n: the slope of a mean of squares over row r's elements.
  QIRL_FN float slope(int64_t r) const { return 2.0f / static_cast<float>(elements(r)); }

  // use(c, late) for the channels c at which a thread's vectors begin. late: now is the time for what the row says, if the
  // thread waits for its loads; else that time is before.
  template <class T, class Use>
  QIRL_FN void over_channels(Lanes lanes, Use use) const {
    for (int64_t c = lanes.lane * T::width; c < channels; c += lanes.count * T::width)
      use(c, Lanes::waits && c == lanes.lane * T::width);
  }
};

// Velocities guided by an unconditional twin: v- + g (v+ - v-), with norm rescale times |v+| / |guided| of the token.
struct Guided {
  const void *cond, *uncond;  // uncond: null for none
  float guidance;
  bool rescale;

  template <class T, int V>
  QIRL_FN void combine(int64_t at, float (&v)[V]) const {
    Vector<T, V>::load(cond, at, v);
    if (uncond == nullptr) return;
    float u[V];
    Vector<T, V>::load(uncond, at, u);
    for (int j = 0; j < V; ++j) v[j] = u[j] + guidance * (v[j] - u[j]);
  }

  // |v+| / |guided| of the token whose first element is `begin`; 1 without rescale.
  template <class T, int V>
  QIRL_FN float factor(int64_t begin, int64_t channels, Lanes lanes) const {
    if (uncond == nullptr || !rescale) return 1.0f;
    float before = 0, after = 0;
    for (int64_t c = lanes.lane * V; c < channels; c += lanes.count * V) {
      float v[V], guided[V];
      Vector<T, V>::load(cond, begin + c, v);
      combine<T>(begin + c, guided);
      for (int j = 0; j < V; ++j) before += v[j] * v[j], after += guided[j] * guided[j];
    }
    return sqrtf(lanes.sum(before)) / sqrtf(lanes.sum(after));
  }
};

// One sampler step. squares: per token the sum of (x' - mean)^2, with x and x' as rounded to the storage dtype.
struct FlowStepCall : TokenCall {
  const void* x;
  Guided v;
  Steps steps;
  bool noisy, rounds;
  Noise noise;
  float *x_next, *squares;  // [tokens, channels]; [tokens] or null

  // What token i's row says.
  struct Row : Own {
    Transition step;
  };
  QIRL_FN Row of(int64_t i) const {
    const Own own = this->own(i);
    return {{own.row, own.known && (!noisy || noise.fits(own.row, i))}, steps.at(own.row)};
  }

  template <class T>
  QIRL_FN bool token(int64_t i, Lanes lanes) const {
    constexpr int V = T::width;
    const int64_t begin = i * channels;
    const float factor = v.template factor<typename T::Velocity, V>(begin, channels, lanes);
    Row own = Lanes::waits ? Row{} : of(i);
    float square[V] = {};
    over_channels<T>(lanes, [&](int64_t c, bool late) QIRL_INLINE {
      float from[V], along[V], z[V] = {}, to[V];
      Vector<typename T::State, V>::load(x, begin + c, from);
      v.template combine<typename T::Velocity>(begin + c, along);
      if (late) own = of(i);
      const Transition step = own.step;
      if (noisy && step.std > 0) noise.draw(own.row, i, c, z);
      for (int j = 0; j < V; ++j) to[j] = step.on_x * from[j] + step.on_v * (factor * along[j]) + step.std * z[j];
      Vector<float, V>::store(to, x_next, begin + c);
      for (int j = 0; j < V; ++j) {
        const float error = round(to[j]) - (step.on_x * round(from[j]) + step.on_v * (factor * along[j]));
        square[j] += error * error;
      }
    });
    if (squares != nullptr) {
      const float total = lanes.sum(sum_of(square));
      if (lanes.lane == 0) squares[i] = total;
    }
    return own.known;
  }

  QIRL_FN float round(float value) const {
    if (!rounds) return value;
    BF16 stored;
    narrow(value, stored);
    return widen(stored);
  }
};

// The losses' kinds: nft on velocities, nft on x0 with self-normalising weight, and the ratio of grpo and guard.
enum Policy { kNft, kNftX0, kRatio };

// Numbers of a row that a policy's terms need, and the two terms of one element:
//   nft     a, b = v+ - u, v- - u;   on x0: x_t - t v+ - x0, x_t - t v- - x0
//   ratio   a, b = x' - mean, mean - mean_old
template <Policy kind>
struct Terms {
  float beta, t;
  Transition step;

  QIRL_FN void at(float v, float old, float first, float second, float& a, float& b) const {
    if constexpr (kind == kRatio) {
      a = second - (step.on_x * first + step.on_v * v);
      b = step.on_v * (v - old);
      return;
    }
    const float plus = beta * v + (1.0f - beta) * old, minus = (1.0f + beta) * old - beta * v;
    if constexpr (kind == kNft) {
      const float target = second - first;
      a = plus - target;
      b = minus - target;
    } else {
      const float x_t = (1.0f - t) * first + t * second;
      a = x_t - t * plus - first;
      b = x_t - t * minus - first;
    }
  }
};

// Loss per row, and its gradient in v once `coefficients` are there: dloss (c0 a + c1 b) + dkl 2/n (v - v_ref).
// first, second: x0 and noise of nft, x and x' of a ratio.
struct PolicyCall : TokenCall {
  const void *v, *v_old, *first, *second, *v_ref;  // v_ref: null for none
  Steps steps;
  const float *share, *advantage;  // [rows]: r of nft; A of a ratio
  float beta, scale, clip_low, clip_high;
  bool guard;
  float* sums;                                // [tokens, 5]: two terms, two of nft's x0 form, kl
  float *loss, *ratio, *kl, *coefficients;    // [rows], [rows], [rows], [rows, 2]
  uint8_t* clipped;                           // [rows]
  const float *dloss, *dkl;                   // [rows], or null for zeros
  void* dv;

  template <class T>
  struct Loaded {
    float now[T::width], old[T::width], one[T::width], two[T::width], ref[T::width];
  };

  template <class T>
  QIRL_FN void load(int64_t at, Loaded<T>& to) const {
    using V = Vector<typename T::Velocity, T::width>;
    using X = Vector<typename T::State, T::width>;
    V::load(v, at, to.now);
    V::load(v_old, at, to.old);
    X::load(first, at, to.one);
    X::load(second, at, to.two);
    V::load(v_ref ? v_ref : v, at, to.ref);
  }

  template <Policy kind>
  QIRL_FN Terms<kind> terms(int64_t own) const {
    if constexpr (kind == kRatio) return {beta, 0.0f, steps.at(own)};
    return {beta, steps.t[own], {}};
  }

  // Whether sum k is one of this kind's.
  static QIRL_FN constexpr bool sums_up(Policy kind, int k) { return kind == kNftX0 || k < 2 || k == 4; }

  // The sums of token i; terms: those of its row.
  template <Policy kind, class T>
  QIRL_FN void forward(int64_t i, const Terms<kind>& terms, Lanes lanes) const {
    float sum[5][T::width] = {};
    over_channels<T>(lanes, [&](int64_t c, bool) QIRL_INLINE {
      Loaded<T> own;
      load(i * channels + c, own);
      for (int j = 0; j < T::width; ++j) {
        float a, b;
        terms.at(own.now[j], own.old[j], own.one[j], own.two[j], a, b);
        sum[0][j] += kind == kRatio ? b * (2.0f * a + b) : a * a;
        sum[1][j] += b * b;
        if (kind == kNftX0) sum[2][j] += fabsf(a), sum[3][j] += fabsf(b);
        sum[4][j] += (own.now[j] - own.ref[j]) * (own.now[j] - own.ref[j]);
      }
    });
    for (int k = 0; k < 5; ++k) {
      const float total = sums_up(kind, k) ? lanes.sum(sum_of(sum[k])) : 0.0f;
      if (lanes.lane == 0) sums[5 * i + k] = total;
    }
  }

  // total: the sums over the row's tokens.
  template <Policy kind>
  QIRL_FN void finish(int64_t r, const double (&total)[5]) const {
    const double n = static_cast<double>(elements(r));
    kl[r] = static_cast<float>(total[4] / n);
    if constexpr (kind == kRatio) return finish_ratio(r, n, total[0], total[1]);
    const double up = share[r], down = 1.0 - up;
    if constexpr (kind == kNft) {
      loss[r] = static_cast<float>((up * total[0] + down * total[1]) / n);
      return keep(r, 2.0 * beta * up / n, -2.0 * beta * down / n);
    }
    const double floor = 1e-5, a = total[2] / n, b = total[3] / n;
    const double plus = a < floor ? floor : a, minus = b < floor ? floor : b;
    loss[r] = static_cast<float>(scale * (up * total[0] / plus + down * total[1] / minus) / n / beta);
    const double slope = 2.0 * scale * steps.t[r] / n;
    keep(r, -slope * up / plus, slope * down / minus);
  }

  // total log ratio = sum of b (2 a + b) / (2 std^2), which is exactly 0 where nothing moved; cps without the std.
  QIRL_FN void finish_ratio(int64_t r, double n, double moved, double squared) const {
    const Transition step = steps.at(r);
    const double std = step.std, variance = std * std;
    const double weight = steps.mode[r] == kCps ? 1.0 : 0.5 / variance;
    double log_ratio = weight * moved / n;
    if (guard) log_ratio = std * (log_ratio + squared / (2.0 * variance * n));
    const double low = 1.0 - clip_low, high = 1.0 + clip_high, own = exp(log_ratio), a = advantage[r];
    const double bounded = own < low ? low : own > high ? high : own;
    const double slope = -a * own >= -a * bounded ? -a * own : 0.0;  // at own = bounded too
    loss[r] = static_cast<float>(-a * own >= -a * bounded ? -a * own : -a * bounded);
    ratio[r] = static_cast<float>(own);
    clipped[r] = bounded != own;
    const double outer = guard ? slope * std : slope;
    keep(r, outer * 2.0 * weight * step.on_v / n, guard ? outer * step.on_v / (variance * n) : 0.0);
  }

  QIRL_FN void keep(int64_t r, double on_a, double on_b) const {
    coefficients[2 * r] = static_cast<float>(on_a);
    coefficients[2 * r + 1] = static_cast<float>(on_b);
  }

  // What token i's row says of the gradient.
  template <Policy kind>
  struct Slopes : Own {
    Terms<kind> terms;
    float on_a, on_b, on_kl;
  };
  template <Policy kind>
  QIRL_FN Slopes<kind> of(int64_t i) const {
    const Own own = this->own(i);
    const int64_t r = own.row;
    const float outer = dloss ? dloss[r] : 0.0f;
    return {own, terms<kind>(r), outer * coefficients[2 * r], outer * coefficients[2 * r + 1],
            v_ref && dkl ? dkl[r] * slope(r) : 0.0f};
  }

  template <Policy kind, class T>
  QIRL_FN bool backward(int64_t i, Lanes lanes) const {
    Slopes<kind> row = Lanes::waits ? Slopes<kind>{} : of<kind>(i);
    over_channels<T>(lanes, [&](int64_t c, bool late) QIRL_INLINE {
      Loaded<T> own;
      load(i * channels + c, own);
      if (late) row = of<kind>(i);
      float gradient[T::width];
      for (int j = 0; j < T::width; ++j) {
        float a, b;
        row.terms.at(own.now[j], own.old[j], own.one[j], own.two[j], a, b);
        gradient[j] = row.on_a * a + row.on_b * b + row.on_kl * (own.now[j] - own.ref[j]);
      }
      Vector<typename T::Velocity, T::width>::store(gradient, dv, i * channels + c);
    });
    return row.known;
  }
};

// |v - u|^2 per row, u the teacher's guided velocity (of the states' dtype); its gradient in v is dloss 2/n (v - u).
struct MatchCall : TokenCall {
  const void* v;
  Guided teacher;
  float *sums, *loss;  // [tokens]; [rows]
  const float* dloss;  // [rows]
  void* dv;            // null: forward

  // The sum of token i.
  template <class T>
  QIRL_FN void forward(int64_t i, Lanes lanes) const {
    const float factor = teacher.template factor<typename T::State, T::width>(i * channels, channels, lanes);
    float sum[T::width] = {};
    over_channels<T>(lanes, [&](int64_t c, bool) QIRL_INLINE {
      float away[T::width];
      error<T>(i * channels + c, factor, away);
      for (int j = 0; j < T::width; ++j) sum[j] += away[j] * away[j];
    });
    const float total = lanes.sum(sum_of(sum));
    if (lanes.lane == 0) sums[i] = total;
  }

  // What token i's row says of the gradient.
  struct Slope : Own {
    float on;
  };
  QIRL_FN Slope of(int64_t i) const {
    const Own own = this->own(i);
    return {own, dloss[own.row] * slope(own.row)};
  }

  template <class T>
  QIRL_FN bool backward(int64_t i, Lanes lanes) const {
    const float factor = teacher.template factor<typename T::State, T::width>(i * channels, channels, lanes);
    Slope row = Lanes::waits ? Slope{} : of(i);
    over_channels<T>(lanes, [&](int64_t c, bool late) QIRL_INLINE {
      float away[T::width];
      error<T>(i * channels + c, factor, away);
      if (late) row = of(i);
      for (int j = 0; j < T::width; ++j) away[j] *= row.on;
      Vector<typename T::Velocity, T::width>::store(away, dv, i * channels + c);
    });
    return row.known;
  }

  // v - u of the vector that begins at element `at`.
  template <class T>
  QIRL_FN void error(int64_t at, float factor, float (&away)[T::width]) const {
    float target[T::width];
    Vector<typename T::Velocity, T::width>::load(v, at, away);
    teacher.template combine<typename T::State>(at, target);
    for (int j = 0; j < T::width; ++j) away[j] -= factor * target[j];
  }

  QIRL_FN void finish(int64_t r, const double (&total)[1]) const {
    loss[r] = static_cast<float>(total[0] / static_cast<double>(elements(r)));
  }
};

}  // namespace qirl
