// math/exp.h and math/softmax_stats.h against double. Prints nothing and returns 0 when all is
// well.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "rlkern/math/softmax_stats.h"

static int failures = 0;

static void expect(bool ok, const char* what, double at, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("%s at %.9g: got %.9g, want %.9g\n", what, at, got, want);
}

static void exp_is_within_two_ulp() {
  for (double x = -103.0; x < 88.7; x += 0.00137) {
    const float at = static_cast<float>(x);
    const double want = std::exp(static_cast<double>(at)), got = rlkern::exp(at);
    // one unit of the smallest denormal where the result is one
    const double ulp = std::max(std::ldexp(1.0, -149), want * 1.1920929e-7);
    expect(std::abs(got - want) <= 2 * ulp, "exp", at, got, want);
  }
  expect(rlkern::exp(-INFINITY) == 0.0f, "exp", -INFINITY, rlkern::exp(-INFINITY), 0);
  expect(rlkern::exp(-1e30f) == 0.0f, "exp", -1e30, rlkern::exp(-1e30f), 0);
  expect(rlkern::exp(0.0f) == 1.0f, "exp", 0, rlkern::exp(0.0f), 1);
  expect(std::isinf(rlkern::exp(89.0f)), "exp", 89, rlkern::exp(89.0f), INFINITY);
  expect(std::isinf(rlkern::exp(INFINITY)), "exp", INFINITY, rlkern::exp(INFINITY), INFINITY);
  expect(std::isnan(rlkern::exp(NAN)), "exp", NAN, rlkern::exp(NAN), NAN);
}

// The statistics of a row, pushed in pieces of random length and merged.
static void merged_statistics_match(unsigned seed, double offset, float inv_temperature) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(offset, 3.0);
  std::vector<float> row(1000);
  for (float& x : row) x = static_cast<float>(normal(random));
  rlkern::SoftmaxStats stats;
  for (size_t begin = 0; begin < row.size();) {
    const size_t end = std::min(row.size(), begin + 1 + random() % 90);
    rlkern::SoftmaxStats part;
    for (size_t i = begin; i < end; ++i) {
      rlkern::SoftmaxStats one;
      one.max = row[i];
      one.sum = 1.0f;
      part.merge(one, inv_temperature);
    }
    stats.merge(part, inv_temperature);
    begin = end;
  }
  double top = -INFINITY, sum = 0, dot = 0;
  for (float x : row) top = std::max(top, double(x) * inv_temperature);
  for (float x : row) {
    const double d = double(x) * inv_temperature - top;
    sum += std::exp(d);
    dot += std::exp(d) * d;
  }
  const double entropy = std::log(sum) - dot / sum;
  expect(std::abs(stats.entropy() - entropy) < 2e-5, "entropy", offset, stats.entropy(), entropy);
  const double logprob = double(row[7]) * inv_temperature - top - std::log(sum);
  const double got = stats.logprob(row[7], inv_temperature);
  expect(std::abs(got - logprob) < 2e-6 * (1 + std::abs(logprob)), "logprob", offset, got, logprob);
}

// The closed form of the gradient against a central difference in double.
static void gradient_is_the_derivative() {
  const double x[4] = {0.3, -1.2, 2.0, 0.1}, a = 0.7, b = -0.4, c = 0.25;
  const int target = 2;
  auto value = [&](const double* z) {
    double sum = 0, entropy = 0;
    for (int i = 0; i < 4; ++i) sum += std::exp(z[i]);
    const double lse = std::log(sum);
    for (int i = 0; i < 4; ++i) entropy -= std::exp(z[i] - lse) * (z[i] - lse);
    return a * (z[target] - lse) + b * entropy + c * lse;
  };
  double sum = 0, entropy = 0;
  for (double v : x) sum += std::exp(v);
  for (double v : x) entropy -= std::exp(v) / sum * (v - std::log(sum));
  const rlkern::SoftmaxGrad grad(a, b, c, static_cast<float>(entropy));
  for (int j = 0; j < 4; ++j) {
    double up[4], down[4];
    for (int i = 0; i < 4; ++i) up[i] = down[i] = x[i];
    up[j] += 1e-5;
    down[j] -= 1e-5;
    const double want = (value(up) - value(down)) / 2e-5;
    const float log_p = static_cast<float>(x[j] - std::log(sum));
    const double got = grad.off_target(log_p) + (j == target ? grad.target : 0.0f);
    expect(std::abs(got - want) < 1e-6, "gradient", j, got, want);
  }
}

int main() {
  exp_is_within_two_ulp();
  for (unsigned seed = 0; seed < 50; ++seed)
    for (double offset : {0.0, -5000.0, 1e4})
      for (float inv : {0.5f, 1.0f, 3.0f}) merged_statistics_match(seed, offset, inv);
  gradient_is_the_derivative();
  return failures != 0;
}
