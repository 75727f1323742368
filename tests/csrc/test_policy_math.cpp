// The scalar maths of the policy loss against double: compiled with the C++ compiler alone and run
// by tests/ops/test_policy_loss.py. Prints what is wrong; the exit status is the number of faults.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "rlkern/math/policy_loss.h"

namespace {

int faults = 0;

void near(const char* what, double got, double want, double relative, double absolute = 0) {
  if (std::isnan(got) && std::isnan(want)) return;
  if (std::abs(got - want) <= relative * std::abs(want) + absolute) return;
  std::printf("%s: got %.9g, want %.9g\n", what, got, want);
  ++faults;
}

struct Token {
  double loss, grad;
};

// The formulas with min, max and if, in double.
Token clipped(double x, double a, double low, double high, double cap, double limit) {
  const double r = std::exp(std::fmin(std::fmax(x, -limit), limit));
  const double clip = std::fmin(std::fmax(r, low), high);
  double loss = std::fmax(-a * r, -a * clip);
  if (a < 0) loss = std::fmin(loss, -a * cap);
  const bool kept = a > 0 ? r <= high : a < 0 ? r >= low && r <= cap : false;
  return {loss, kept && std::abs(x) <= limit ? -a * r : 0.0};
}

void test_clipped() {
  const rlkern::PolicyParams p{0, {0.8f, 1.28f, 3.0f}, 1.5f, {3, 0, 20, 20}, 0};
  for (double x = -2.0; x < 2.0; x += 0.0137)
    for (double a : {-2.5, -1.0, 0.0, 0.5, 3.0}) {
      rlkern::PolicyStats<float> stats;
      rlkern::PolicyInput<float> in{};
      in.logprob = static_cast<float>(x);
      in.log_ratio = in.logprob;
      in.advantage = static_cast<float>(a);
      in.weight = 0.25f;
      const float grad = rlkern::policy_token(p, in, 1.0f, false, false, stats);
      const Token want = clipped(in.logprob, a, 0.8f, 1.28f, 3.0f, 1.5f);
      near("clipped loss", stats.sum[rlkern::kLossSum], 0.25 * want.loss, 1e-6);
      near("clipped grad", grad, 0.25 * want.grad, 1e-6);
    }
}

void test_detached() {
  const rlkern::RatioBounds bounds{0.5f, 2.0f, INFINITY};
  for (double r : {0.1, 0.5, 0.9, 1.0, 1.7, 2.0, 9.0})
    for (double a : {-2.0, 0.0, 1.5}) {
      const auto got = rlkern::detached_surrogate<float>(static_cast<float>(r), -0.7f,
                                                         static_cast<float>(a), bounds);
      const double weight = std::fmin(std::fmax(static_cast<float>(r), 0.5), 2.0);
      near("detached grad", got.grad, -a * weight, 1e-6);
      near("detached loss", got.loss, -a * weight * -0.7f, 1e-6);
      near("detached low", got.low, r < 0.5, 0);
      near("detached high", got.high, r > 2.0, 0);
    }
}

void test_kl() {
  for (double d = -25.0; d < 25.0; d += 0.00731) {
    const float delta = static_cast<float>(d);
    const double bound = std::fmin(std::fmax(static_cast<double>(delta), -20.0), 20.0);
    const bool inside = std::abs(delta) <= 20.0f;
    const rlkern::KlParams p{3, 1, 20, INFINITY};
    const auto k3 = rlkern::kl_term(delta, p);
    // relative, also where exp(-D) + D - 1 would cancel
    near("k3", k3.value, std::expm1(-bound) + bound, 3e-6, 1e-12);
    near("k3 grad", k3.grad, inside ? -std::expm1(-bound) : 0.0, 3e-6, 1e-7);
    const auto k2 = rlkern::kl_term(delta, {2, 1, 20, INFINITY});
    near("k2", k2.value, 0.5 * bound * bound, 1e-6);
    near("k2 grad", k2.grad, inside ? bound : 0.0, 1e-6);
    const auto k1 = rlkern::kl_term(delta, {1, 1, 20, 10});
    near("k1", k1.value, std::fmin(std::fmax(bound, -10.0), 10.0), 1e-6);
    near("k1 grad", k1.grad, std::abs(bound) <= 10 && inside, 0);
  }
}

void test_extremes() {
  const rlkern::RatioBounds open{-INFINITY, INFINITY, INFINITY};
  const auto idle = rlkern::clipped_surrogate<float>(INFINITY, 0.0f, 0.0f, open);
  near("loss of A = 0", idle.loss, 0, 0);
  near("grad of A = 0", idle.grad, 0, 0);
  const auto detached = rlkern::detached_surrogate<float>(INFINITY, -INFINITY, 0.0f, open);
  near("detached loss of A = 0", detached.loss, 0, 0);
  near("detached grad of A = 0", detached.grad, 0, 0);
  const rlkern::RatioBounds bounds{0.8f, 1.2f, 3.0f};
  for (float a : {-1.0f, 1.0f}) {
    const auto nan = rlkern::clipped_surrogate<float>(NAN, NAN, a, bounds);
    near("a NaN ratio gets through", nan.loss, NAN, 0);
    near("a NaN ratio gets through", nan.grad, NAN, 0);
  }
  near("a NaN advantage gets through",
       rlkern::clipped_surrogate<float>(1.0f, 0.0f, NAN, bounds).loss, NAN, 0);
  near("a NaN KL gets through", rlkern::kl_term(NAN, {3, 1, 20, 10}).value, NAN, 0);
}

void test_metrics() {
  const double sums[rlkern::kNumPolicySums] = {9, 4, 1, 2, 1, -2, 5, 3, 6};
  float out[rlkern::kNumPolicyMetrics];
  rlkern::policy_metrics(sums, 0.5f, 2.0f, out);
  const double want[] = {4, 0.75, 0.25, 0.25, 0.5, -0.5, 1.25, 0.5, 2, 0.75, 1.5};
  for (int i = 0; i < rlkern::kNumPolicyMetrics; ++i) near("metric", out[i], want[i], 1e-7);
  const double none[rlkern::kNumPolicySums] = {};
  rlkern::policy_metrics(none, INFINITY, -INFINITY, out);
  for (float value : out) near("metric without tokens", value, 0, 0);
}

}  // namespace

int main() {
  test_clipped();
  test_detached();
  test_kl();
  test_extremes();
  test_metrics();
  return faults > 100 ? 100 : faults;
}
