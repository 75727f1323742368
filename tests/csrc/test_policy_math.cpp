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

// kinds and numbers with the defaults of reference.py
struct Chosen {
  int kinds[rlkern::kNumKinds] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 1};
  double numbers[rlkern::kNumNumbers] = {
      0.8,       1.2,      INFINITY,  0,        0,         0, 20, -INFINITY, INFINITY,
      -INFINITY, INFINITY, -INFINITY, INFINITY, INFINITY,  0, 20, INFINITY,  0,
      -INFINITY, INFINITY, 0,         0,        -INFINITY, 0, 1};
  rlkern::PolicyParams params() const { return rlkern::PolicyParams(kinds, numbers); }
};

rlkern::PolicyToken<float> token(double z, double a, double live = -0.7) {
  rlkern::PolicyToken<float> t{};
  t.live = static_cast<float>(live);
  t.a = static_cast<float>(a);
  t.x = t.z = t.decided = static_cast<float>(z);
  t.old = t.live - t.x;
  t.r = rlkern::exp(t.z);
  return t;
}

void test_clipped() {
  Chosen chosen;
  chosen.numbers[1] = 1.28;
  chosen.numbers[2] = 3;
  chosen.numbers[6] = 1.5;
  const rlkern::PolicyParams p = chosen.params();
  for (double x = -2.0; x < 2.0; x += 0.0137)
    for (double a : {-2.5, -1.0, 0.0, 0.5, 3.0}) {
      rlkern::PolicyStats<float> stats;
      rlkern::PolicyInput<float> in{};
      in.logprob = static_cast<float>(x);
      in.advantage = static_cast<float>(a);
      in.weight = 0.25f;
      const auto t = rlkern::policy_ratio(p, in);
      const auto s = rlkern::surrogate(p.surrogate, t, p.shape);
      const float grad =
          rlkern::policy_surrogate<rlkern::SurrogateKind::kClip>(p, in, false, -1, t, s, stats);
      const Token want = clipped(in.logprob, a, 0.8f, 1.28f, 3.0f, 1.5f);
      near("clipped loss", stats.sum[rlkern::kLossSum], 0.25 * want.loss, 1e-6);
      near("clipped grad", grad, 0.25 * want.grad, 1e-6);
    }
}

void test_detached() {
  const float bounds[rlkern::kNumShape] = {0.5f, 2.0f};
  for (double r : {0.1, 0.5, 0.9, 1.0, 1.7, 2.0, 9.0})
    for (double a : {-2.0, 0.0, 1.5}) {
      auto t = token(0, a);
      t.r = static_cast<float>(r);
      const auto got = rlkern::surrogate(rlkern::SurrogateKind::kDetached, t, bounds);
      const double weight = std::fmin(std::fmax(static_cast<float>(r), 0.5), 2.0);
      near("detached grad", got.grad, -a * weight, 1e-6);
      near("detached loss", got.loss, -a * weight * -0.7f, 1e-6);
      near("detached low", got.low, -(r < 0.5), 0);
      near("detached high", got.high, -(r > 2.0), 0);
    }
}

// The table of MHPO with its defaults, and SAPO's, at these ratios: -grad for A = 1.
void test_smooth_tables() {
  const double ratios[] = {.05, .5, .8, 1, 1.25, 2, 5, 20};
  const double mhpo[] = {0.000208, 0.054418, 0.179021, 0.265062,
                         0.342756, 0.390651, 0.190816, 0.033300};
  const double value[] = {0.002925, 0.066889, 0.183012, 0.265062,
                          0.350397, 0.480178, 0.508850, 0.468757};
  const double sapo[] = {0.040222, 0.470007, 0.792053, 1, 1.230670, 1.572895, 0.353254, 4.5e-7};
  const float hazard[rlkern::kNumShape] = {1.5f, 1.5f, 1.0f, 2.0f, 0.8f, 1.0f},
              gate[rlkern::kNumShape] = {1.0f, 1.05f};
  for (int i = 0; i < 8; ++i) {
    const auto t = token(std::log(ratios[i]), 1);
    const auto h = rlkern::surrogate(rlkern::SurrogateKind::kHazard, t, hazard);
    near("MHPO grad", -h.grad, mhpo[i], 0, 6e-7);
    near("MHPO value", -h.loss, value[i], 0, 6e-7);
    const auto s = rlkern::surrogate(rlkern::SurrogateKind::kSoftGate, t, gate);
    near("SAPO grad", -s.grad, sapo[i], 0, 6e-7);
  }
}

void test_gamma_table() {
  const double w[] = {.1, .5, 1, 2, 4};
  const double up[] = {0.148797, 1.120422, 1, 0.199148, 0.001975};
  const double down[] = {0.006050, 0.339785, 1, 1.082682, 0.158640};
  const float gamma[rlkern::kNumShape] = {2, 3, 3, 2, -18.42f};
  for (int i = 0; i < 5; ++i)
    for (double a : {1.0, -1.0}) {
      const auto t = token(std::log(w[i]), a);
      const auto got = rlkern::surrogate(rlkern::SurrogateKind::kGammaWeight, t, gamma);
      near("VESPO weight", -got.grad * a, a > 0 ? up[i] : down[i], 0, 1e-6);
    }
}

void test_dynamic_table() {
  const double q[] = {.9, .64, .5, .1, .01, 1e-4};
  const double low[] = {0.768742, 0.5, 0.5, 0.5, 0.5, 0.5};
  const double high[] = {1.187184, 1.25, 1.306226, 2, 5, 10};
  const float bounds[rlkern::kNumShape] = {0.16f, 0.2f, 10.0f};
  for (int i = 0; i < 6; ++i) {
    // far past a bound the loss is that of the bound
    auto t = token(0, 1);
    t.old = static_cast<float>(std::log(q[i]));
    t.r = 1e4f;
    near("DCPO high", -rlkern::surrogate(rlkern::SurrogateKind::kDynamic, t, bounds).loss, high[i],
         0, 1e-6);
    t.a = -1;
    t.r = 1e-4f;
    near("DCPO low", rlkern::surrogate(rlkern::SurrogateKind::kDynamic, t, bounds).loss, low[i], 0,
         1e-6);
  }
}

void test_log() {
  for (double x = 1e-30; x < 1e30; x *= 1.0007) {
    const float y = static_cast<float>(x);
    near("log", rlkern::log(y), std::log(static_cast<double>(y)), 3e-7, 1e-9);
  }
  near("log(0)", 1 / rlkern::log(0.0f), 0, 0);
  near("log of a NaN", rlkern::log(static_cast<float>(NAN)), NAN, 0);
  near("log(-1)", rlkern::log(-1.0f), NAN, 0);
}

void test_kl() {
  using rlkern::KlType;
  for (double d = -25.0; d < 25.0; d += 0.00731) {
    const float delta = static_cast<float>(d);
    const double bound = std::fmin(std::fmax(static_cast<double>(delta), -20.0), 20.0);
    const bool inside = std::abs(delta) <= 20.0f;
    const auto k3 = rlkern::kl_term(delta, KlType::kK3, 20, INFINITY);
    // relative, also where exp(-D) + D - 1 would cancel
    near("k3", k3.value, std::expm1(-bound) + bound, 3e-6, 1e-12);
    near("k3 grad", k3.grad, inside ? -std::expm1(-bound) : 0.0, 3e-6, 1e-7);
    const auto k2 = rlkern::kl_term(delta, KlType::kK2, 20, INFINITY);
    near("k2", k2.value, 0.5 * bound * bound, 1e-6);
    near("k2 grad", k2.grad, inside ? bound : 0.0, 1e-6);
    const auto k1 = rlkern::kl_term(delta, KlType::kK1, 20, 10);
    near("k1", k1.value, std::fmin(std::fmax(bound, -10.0), 10.0), 1e-6);
    near("k1 grad", k1.grad, std::abs(bound) <= 10 && inside, 0);
    const auto abs = rlkern::kl_term(delta, KlType::kAbs, 20, INFINITY);
    near("abs", abs.value, std::abs(bound), 1e-6);
    near("abs grad", abs.grad, inside ? (d > 0) - (d < 0) : 0, 0);
    const auto plus = rlkern::kl_term(delta, KlType::kK3Plus, 20, 10);
    near("k3+", plus.value, std::fmin(std::expm1(-bound) + bound, 10.0), 3e-6, 1e-12);
    near("k3+ grad", plus.grad, delta, 0);
  }
}

void test_extremes() {
  using rlkern::SurrogateKind;
  const float open[rlkern::kNumShape] = {-INFINITY, INFINITY, INFINITY},
              bounds[rlkern::kNumShape] = {0.8f, 1.2f, 3.0f};
  for (SurrogateKind kind : {SurrogateKind::kClip, SurrogateKind::kDetached}) {
    auto t = token(0, 0);
    t.r = INFINITY;
    t.live = -INFINITY;
    near("loss of A = 0", rlkern::surrogate(kind, t, open).loss, 0, 0);
    near("grad of A = 0", rlkern::surrogate(kind, t, open).grad, 0, 0);
  }
  for (float a : {-1.0f, 1.0f}) {
    auto t = token(0, a);
    t.r = t.z = NAN;
    near("a NaN ratio gets through", rlkern::surrogate(SurrogateKind::kClip, t, bounds).loss, NAN,
         0);
    near("a NaN ratio gets through", rlkern::surrogate(SurrogateKind::kClip, t, bounds).grad, NAN,
         0);
  }
  near("a NaN advantage gets through",
       rlkern::surrogate(SurrogateKind::kClip, token(0, NAN), bounds).loss, NAN, 0);
  near("a NaN KL gets through",
       rlkern::kl_term(static_cast<float>(NAN), rlkern::KlType::kK3, 20, 10).value, NAN, 0);
}

void test_metrics() {
  Chosen chosen;
  chosen.kinds[3] = 1;
  const double sums[rlkern::kNumPolicySums] = {9, 2, 5, 3, 6, 2, 2, 7};
  const int64_t counts[rlkern::kNumPolicyCounts] = {4, 1, 2, 1};
  float out[rlkern::kNumPolicyMetrics];
  rlkern::policy_metrics(chosen.params(), sums, counts, 0.5f, 2.0f, 5, out);
  const double want[] = {4, 0.75, 0.25, 0.25, 0.5, -0.5, 1.25, 0.5,
                         2, 0.75, 1.5,  0.5,  0.5, 0.2,  1.75};
  for (int i = 0; i < rlkern::kNumPolicyMetrics; ++i) near("metric", out[i], want[i], 1e-7);
  const double none[rlkern::kNumPolicySums] = {};
  const int64_t never[rlkern::kNumPolicyCounts] = {};
  rlkern::policy_metrics(chosen.params(), none, never, INFINITY, -INFINITY, 0, out);
  for (float value : out) near("metric without tokens", value, 0, 0);
}

}  // namespace

int main() {
  test_clipped();
  test_detached();
  test_smooth_tables();
  test_gamma_table();
  test_dynamic_table();
  test_log();
  test_kl();
  test_extremes();
  test_metrics();
  return faults > 100 ? 100 : faults;
}
