// Moments of groups, and advantages from them: three passes over the rows with one accumulator per
// group. Serial, so that each group's sums run in row order: a batch has thousands of rewards, not
// millions.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "rlkern/math/group_moments.h"

namespace rlkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Rows {
  int64_t count;
  const int64_t* group;
  const bool* mask;       // null: every row counts
  const double* weights;  // null: every row counts once
  int64_t num_groups;

  bool masked(int64_t i) const { return mask && !mask[i]; }
  bool inside(int64_t i) const { return group[i] >= 0 && group[i] < num_groups; }
  bool counted(int64_t i) const { return inside(i) && !masked(i); }
};

template <bool kWeighted, class T>
std::vector<GroupMoments> moments_of(const T* rewards, const Rows& rows) {
  const auto weight = [&](int64_t i) { return kWeighted ? rows.weights[i] : 1.0; };
  std::vector<GroupMoments> groups(rows.num_groups);
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.counted(i)) groups[rows.group[i]].push(static_cast<double>(rewards[i]), weight(i));
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!rows.counted(i)) continue;
    GroupMoments& g = groups[rows.group[i]];
    g.push_deviation(g.deviation(static_cast<double>(rewards[i])), weight(i));
  }
  return groups;
}

template <class T>
std::vector<GroupMoments> moments_of(const T* rewards, const Rows& rows) {
  return rows.weights ? moments_of<true>(rewards, rows) : moments_of<false>(rewards, rows);
}

template <class T>
std::vector<BestReward> best_of(const T* rewards, const Rows& rows) {
  std::vector<BestReward> groups(rows.num_groups);
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.counted(i)) groups[rows.group[i]].push(static_cast<double>(rewards[i]), i);
  return groups;
}

// The standard deviation of all rows from the groups' moments, so that it does not depend on how
// rows of different groups are mixed: squares within groups, and squares between their means.
double batch_std(const std::vector<GroupMoments>& groups) {
  double count = 0.0, sum = 0.0, squares = 0.0;
  for (const GroupMoments& g : groups) {
    if (g.count == 0.0) continue;
    sum += g.count * g.mean();
    count += g.count;
  }
  const double mean = sum / count;
  for (const GroupMoments& g : groups) {
    if (g.count == 0.0) continue;
    const double between = g.mean() - mean;
    squares += g.squares + g.count * between * between;
  }
  return unbiased_std(squares, count);
}

double denominator(const GroupMoments& g, AdvantageKind kind, double epsilon, double std_of_batch) {
  switch (kind) {
    case AdvantageKind::kGrpo:
    case AdvantageKind::kGrpoPassK:
      return unbiased_std(g.squares, g.count) + epsilon;
    case AdvantageKind::kRloo:
      return (g.count - 1.0) / g.count;
    case AdvantageKind::kBatchStd:
      return std_of_batch + epsilon;
    case AdvantageKind::kMaxRl:
      return g.mean() + epsilon;
    case AdvantageKind::kDrGrpo:
    case AdvantageKind::kPassK:
      break;
  }
  return 1.0;
}

template <class T, class Out>
void advantages_of(const T* rewards, Out* out, const Rows& rows, AdvantageKind kind,
                   double epsilon) {
  const std::vector<GroupMoments> groups = moments_of(rewards, rows);
  const double std_of_batch = kind == AdvantageKind::kBatchStd ? batch_std(groups) : 0.0;
  const bool best_only = kind == AdvantageKind::kPassK || kind == AdvantageKind::kGrpoPassK;
  const std::vector<BestReward> best =
      best_only ? best_of(rewards, rows) : std::vector<BestReward>();
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!rows.counted(i)) {
      out[i] = rows.masked(i) ? 0.0 : NAN;
      continue;
    }
    const GroupMoments& g = groups[rows.group[i]];
    double deviation = g.deviation(static_cast<double>(rewards[i]));
    if (best_only && !std::isnan(deviation)) {
      const BestReward& b = best[rows.group[i]];
      deviation = b.row == i ? b.lead() : 0.0;
    }
    out[i] = static_cast<Out>(advantage(deviation, denominator(g, kind, epsilon, std_of_batch)));
  }
}

void write_moments(const std::vector<GroupMoments>& groups, double* out) {
  const int64_t num = static_cast<int64_t>(groups.size());
  for (int64_t i = 0; i < num; ++i) {
    const GroupMoments& g = groups[i];
    const bool broken = !std::isfinite(g.sum);
    out[i] = g.count;
    out[num + i] = broken ? NAN : g.mean();
    out[2 * num + i] = broken ? NAN : unbiased_std(g.squares, g.count);
  }
}

Rows checked_rows(const Tensor& rewards, const Tensor& group_ids, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& weights, int64_t num_groups) {
  RLK_CHECK_CPU(rewards);
  RLK_CHECK_DIM(rewards, 1);
  RLK_CHECK_CONTIGUOUS(rewards);
  const int64_t count = rewards.size(0);
  RLK_CHECK_CPU(group_ids);
  RLK_CHECK_DIM(group_ids, 1);
  RLK_CHECK_DTYPE(group_ids, Long);
  RLK_CHECK_SIZE(group_ids, 0, count);
  RLK_CHECK_CONTIGUOUS(group_ids);
  if (mask.has_value()) {
    RLK_CHECK_CPU(*mask);
    RLK_CHECK_DTYPE(*mask, Bool);
    RLK_CHECK_DIM(*mask, 1);
    RLK_CHECK_SIZE(*mask, 0, count);
    RLK_CHECK_CONTIGUOUS(*mask);
  }
  if (weights.has_value()) {
    RLK_CHECK_CPU(*weights);
    RLK_CHECK_DTYPE(*weights, Double);
    RLK_CHECK_DIM(*weights, 1);
    RLK_CHECK_SIZE(*weights, 0, count);
    RLK_CHECK_CONTIGUOUS(*weights);
  }
  STD_TORCH_CHECK(num_groups >= 0, "num_groups must be at least 0, got ", num_groups);
  return {count, group_ids.const_data_ptr<int64_t>(),
          mask.has_value() ? mask->const_data_ptr<bool>() : nullptr,
          weights.has_value() ? weights->const_data_ptr<double>() : nullptr, num_groups};
}

Tensor group_advantage(Tensor rewards, Tensor group_ids, std::optional<Tensor> mask,
                       std::optional<Tensor> weights, int64_t kind, int64_t num_groups,
                       double epsilon) {
  const Rows rows = checked_rows(rewards, group_ids, mask, weights, num_groups);
  STD_TORCH_CHECK(kind >= 0 && kind < kNumAdvantageKinds, "kind must be in [0, ",
                  kNumAdvantageKinds, "), got ", kind);
  const AdvantageKind which = static_cast<AdvantageKind>(kind);
  if (rewards.scalar_type() == ScalarType::Double) {
    Tensor out = torch::stable::new_empty(rewards, {rows.count});
    advantages_of(rewards.const_data_ptr<double>(), out.mutable_data_ptr<double>(), rows, which,
                  epsilon);
    return out;
  }
  Tensor out = torch::stable::new_empty(rewards, {rows.count}, ScalarType::Float);
  RLK_DISPATCH_FLOAT(rewards, T, {
    advantages_of(rewards.const_data_ptr<T>(), out.mutable_data_ptr<float>(), rows, which, epsilon);
  });
  return out;
}

Tensor group_moments(Tensor rewards, Tensor group_ids, std::optional<Tensor> mask,
                     std::optional<Tensor> weights, int64_t num_groups) {
  const Rows rows = checked_rows(rewards, group_ids, mask, weights, num_groups);
  Tensor out = torch::stable::new_empty(rewards, {3, num_groups}, ScalarType::Double);
  double* moments = out.mutable_data_ptr<double>();
  if (rewards.scalar_type() == ScalarType::Double) {
    write_moments(moments_of(rewards.const_data_ptr<double>(), rows), moments);
    return out;
  }
  RLK_DISPATCH_FLOAT(rewards, T,
                     { write_moments(moments_of(rewards.const_data_ptr<T>(), rows), moments); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
  m.impl("group_moments", TORCH_BOX(&group_moments));
}

}  // namespace rlkern
