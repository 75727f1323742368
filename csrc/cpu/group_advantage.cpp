// Group-relative advantages: three passes over the rows with one accumulator per group. Serial, so
// that each group's sums run in row order: a batch has thousands of rewards, not millions.
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
  const bool* mask;  // null: every row counts
  int64_t num_groups;

  bool masked(int64_t i) const { return mask && !mask[i]; }
  bool inside(int64_t i) const { return group[i] >= 0 && group[i] < num_groups; }
  bool counted(int64_t i) const { return inside(i) && !masked(i); }
};

template <class T>
std::vector<GroupMoments> moments_of(const T* rewards, const Rows& rows) {
  std::vector<GroupMoments> groups(rows.num_groups);
  for (int64_t i = 0; i < rows.count; ++i)
    if (rows.counted(i)) groups[rows.group[i]].push(static_cast<double>(rewards[i]));
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!rows.counted(i)) continue;
    GroupMoments& g = groups[rows.group[i]];
    g.push_deviation(g.deviation(static_cast<double>(rewards[i])));
  }
  return groups;
}

// The standard deviation of all rows from the groups' moments, so that it does not depend on how
// rows of different groups are mixed: squares within groups, and squares between their means.
double batch_std(const std::vector<GroupMoments>& groups) {
  int64_t count = 0;
  double sum = 0.0, squares = 0.0;
  for (const GroupMoments& g : groups) {
    if (g.count == 0) continue;
    sum += static_cast<double>(g.count) * g.mean();
    count += g.count;
  }
  const double mean = sum / static_cast<double>(count);
  for (const GroupMoments& g : groups) {
    if (g.count == 0) continue;
    const double between = g.mean() - mean;
    squares += g.squares + static_cast<double>(g.count) * between * between;
  }
  return unbiased_std(squares, count);
}

double denominator(const GroupMoments& g, AdvantageKind kind, double epsilon, double std_of_batch) {
  switch (kind) {
    case AdvantageKind::kGrpo:
      return unbiased_std(g.squares, g.count) + epsilon;
    case AdvantageKind::kRloo:
      return static_cast<double>(g.count - 1) / static_cast<double>(g.count);
    case AdvantageKind::kBatchStd:
      return std_of_batch + epsilon;
    case AdvantageKind::kDrGrpo:
      break;
  }
  return 1.0;
}

template <class T, class Out>
void advantages_of(const T* rewards, Out* out, const Rows& rows, AdvantageKind kind,
                   double epsilon) {
  const std::vector<GroupMoments> groups = moments_of(rewards, rows);
  const double std_of_batch = kind == AdvantageKind::kBatchStd ? batch_std(groups) : 0.0;
  for (int64_t i = 0; i < rows.count; ++i) {
    if (!rows.counted(i)) {
      out[i] = rows.masked(i) ? 0.0 : NAN;
      continue;
    }
    const GroupMoments& g = groups[rows.group[i]];
    const double deviation = g.deviation(static_cast<double>(rewards[i]));
    out[i] = static_cast<Out>(advantage(deviation, denominator(g, kind, epsilon, std_of_batch)));
  }
}

Tensor group_advantage(Tensor rewards, Tensor group_ids, std::optional<Tensor> mask, int64_t kind,
                       int64_t num_groups, double epsilon) {
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
  STD_TORCH_CHECK(kind >= 0 && kind < kNumAdvantageKinds, "kind must be in [0, ",
                  kNumAdvantageKinds, "), got ", kind);
  STD_TORCH_CHECK(num_groups >= 0, "num_groups must be at least 0, got ", num_groups);
  const Rows rows{count, group_ids.const_data_ptr<int64_t>(),
                  mask.has_value() ? mask->const_data_ptr<bool>() : nullptr, num_groups};
  const AdvantageKind which = static_cast<AdvantageKind>(kind);
  if (rewards.scalar_type() == ScalarType::Double) {
    Tensor out = torch::stable::new_empty(rewards, {count});
    advantages_of(rewards.const_data_ptr<double>(), out.mutable_data_ptr<double>(), rows, which,
                  epsilon);
    return out;
  }
  Tensor out = torch::stable::new_empty(rewards, {count}, ScalarType::Float);
  RLK_DISPATCH_FLOAT(rewards, T, {
    advantages_of(rewards.const_data_ptr<T>(), out.mutable_data_ptr<float>(), rows, which, epsilon);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rlkern, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage));
}

}  // namespace rlkern
