// Advantages of several rewards inside prompt groups (algorithm page, section 5; reference: kernels/group_advantage.py).
// One source for g++ and nvcc, in float64.
#pragma once
#include "scalars.h"

namespace qirl {

enum Convention { kPerReward, kSumThenNormalise, kGdpo, kGlobalStd, kNoStd };

// Sums over the threads that share a group, or the batch; on a CPU there is one.
struct Alone {
  static constexpr int lane = 0, count = 1;
  QIRL_FN double sum(double x) const { return x; }
};

// The samples in the order of their groups, those of a group in their own: order [samples], sorted [samples] the groups.
struct OrderCall {
  int64_t calls;
  const int64_t* group;
  int64_t *order, *sorted;
};

struct AdvantageCall {
  int64_t calls, components;         // samples
  const double *scores, *weights;    // [samples, components]
  const uint8_t* applies;            // [samples, components]
  const int64_t *order, *group;      // samples sorted by group, and their groups in that order
  const double *floors, *scale;      // [components]; [samples]
  double floor, clip;
  int convention;
  double *total, *value;             // [samples]: composite reward, and advantage before scale and clip
  float* advantage;                  // [samples]
  uint8_t* valid;                    // [samples]

  // The group whose first sample has place `begin` in the order; does nothing where none begins.
  template <class Team>
  QIRL_FN void run(int64_t begin, Team team) const {
    if (begin > 0 && group[begin] == group[begin - 1]) return;
    int64_t end = begin + 1;
    for (double found = team.count; found == team.count; end += static_cast<int64_t>(found)) {
      const int64_t m = end + team.lane;
      found = team.sum(m < calls && group[m] == group[begin]);
    }

    bool lost = false;
    for (int64_t k = 0; k < components; ++k) {
      double applied = 0, worked = 0;
      for (int64_t m = begin + team.lane; m < end; m += team.count) {
        const int64_t at = order[m] * components + k;
        applied += applies[at] != 0;
        worked += applies[at] && !std::isnan(scores[at]);
      }
      lost |= team.sum(applied) > 0 && team.sum(worked) == 0;
    }
    double size = 0;
    for (int64_t m = begin + team.lane; m < end; m += team.count) size += !failed(order[m]);
    const bool whole = team.sum(size) >= 2 && !lost;
    for (int64_t m = begin + team.lane; m < end; m += team.count) {
      const int64_t i = order[m];
      valid[i] = whole && !failed(i);
      total[i] = value[i] = 0;
    }
    if (convention == kPerReward || convention == kGdpo) {
      for (int64_t k = 0; k < components; ++k) {
        const auto has = [&](int64_t i) { return valid[i] && applies[i * components + k]; };
        const auto score = [&](int64_t i) { return scores[i * components + k]; };
        const auto add = [&](int64_t i, double z) { value[i] += share(i, k) * z; };
        normalise(begin, end, team, has, score, floors[k], true, add);
      }
    } else {
      const auto has = [&](int64_t i) { return valid[i] != 0; };
      for (int64_t m = begin + team.lane; m < end; m += team.count)
        for (int64_t k = 0, i = order[m]; k < components; ++k)
          if (valid[i] && applies[i * components + k]) total[i] += share(i, k) * scores[i * components + k];
      const auto set = [&](int64_t i, double z) { value[i] = z; };
      normalise(begin, end, team, has, [&](int64_t i) { return total[i]; }, floor, convention == kSumThenNormalise, set);
    }
    if (of_batch()) return;
    for (int64_t m = begin + team.lane; m < end; m += team.count) result(order[m], 0.0, 1.0);
  }

  // Calls use(i, (score - mean) / std) for the samples that have one; 0 under the floor; without `divide` (score - mean).
  template <class Team, class Has, class Score, class Use>
  QIRL_FN void normalise(int64_t begin, int64_t end, Team team, Has has, Score score, double least, bool divide,
                         Use use) const {
    const Spread of = spread(begin, end, team, has, score);
    const double factor = !divide ? 1.0 : gain(of.std, least);
    for (int64_t m = begin + team.lane; m < end; m += team.count)
      if (has(order[m])) use(order[m], (score(order[m]) - of.mean) * factor);
  }

  struct Spread {
    double mean, std;
  };

  // Mean and population standard deviation of the samples of a span of the order that have a score.
  template <class Team, class Has, class Score>
  QIRL_FN Spread spread(int64_t begin, int64_t end, Team team, Has has, Score score) const {
    double sum = 0, count = 0, squares = 0;
    for (int64_t m = begin + team.lane; m < end; m += team.count)
      if (has(order[m])) sum += score(order[m]), count += 1;
    count = team.sum(count);
    const double divisor = count < 1 ? 1 : count, mean = team.sum(sum) / divisor;
    for (int64_t m = begin + team.lane; m < end; m += team.count)
      if (has(order[m])) squares += (score(order[m]) - mean) * (score(order[m]) - mean);
    return {mean, sqrt(team.sum(squares) / divisor)};
  }

  // Whether the convention wants the whole batch's mean and spread, after all groups.
  QIRL_FN bool of_batch() const { return convention == kGdpo || convention == kGlobalStd; }

  template <class Team>
  QIRL_FN void finish(Team team) const {
    const double* values = convention == kGdpo ? value : total;
    const auto has = [&](int64_t i) { return valid[i] != 0; };
    const Spread of = spread(0, calls, team, has, [&](int64_t i) { return values[i]; });
    const double factor = gain(of.std, convention == kGdpo ? 0.0 : floor);
    const double mean = convention == kGdpo ? of.mean : 0;  // global_std has already taken the group's mean
    for (int64_t i = team.lane; i < calls; i += team.count) result(i, mean, factor);
  }

  // Scales and clips.
  QIRL_FN void result(int64_t i, double mean, double factor) const {
    const double own = scale[i] * ((value[i] - mean) * factor);
    advantage[i] = !valid[i] ? 0.0f : static_cast<float>(own < -clip ? -clip : own > clip ? clip : own);
  }

  // 1 / std, or 0 where the spread is under the floor or is the rounding of equal scores.
  static QIRL_FN double gain(double std, double least) { return std >= least && std > 1e-12 ? 1.0 / std : 0.0; }

  QIRL_FN bool failed(int64_t i) const {
    for (int64_t at = i * components; at < (i + 1) * components; ++at)
      if (applies[at] && std::isnan(scores[at])) return true;
    return false;
  }

  // Weight of component k among those that apply to sample i.
  QIRL_FN double share(int64_t i, int64_t k) const {
    double sum = 0;
    for (int64_t at = i * components; at < (i + 1) * components; ++at)
      if (applies[at]) sum += weights[at];
    return weights[i * components + k] / (sum < 1e-30 ? 1e-30 : sum);
  }
};

}  // namespace qirl
