// math/divergence.h against double. Prints nothing and returns 0 when all is well.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "rlkern/math/divergence.h"

using rlkern::Divergence;

static int failures = 0;

static void expect(bool ok, const char* what, double ls, double lt, double got, double want) {
  if (ok) return;
  ++failures;
  std::printf("%s at %.9g, %.9g: got %.9g, want %.9g\n", what, ls, lt, got, want);
}

static void close(const char* what, double ls, double lt, double got, double want) {
  expect(std::abs(got - want) <= 4e-7 * (1 + std::abs(want)), what, ls, lt, got, want);
}

static void terms_and_gradients_match(float ls, float lt, float beta, float own) {
  const double s = std::exp(double(ls)), t = std::exp(double(lt));
  const double lm = std::log((1.0 - beta) * s + beta * t);
  const auto forward = rlkern::divergence_term<Divergence::kForward>(ls, lt, beta);
  close("forward", ls, lt, forward.value, t * (double(lt) - ls));
  expect(forward.own == 0.0f, "own", ls, lt, forward.own, 0);
  const auto reverse = rlkern::divergence_term<Divergence::kReverse>(ls, lt, beta);
  close("reverse", ls, lt, reverse.value, s * (double(ls) - lt));
  expect(reverse.own == reverse.value, "own", ls, lt, reverse.own, reverse.value);
  const auto jsd = rlkern::divergence_term<Divergence::kJsd>(ls, lt, beta);
  close("jsd", ls, lt, jsd.value, beta * t * (lt - lm) + (1.0 - beta) * s * (ls - lm));
  close("own", ls, lt, jsd.own, s * (ls - lm));
  const rlkern::OverMixture<float> over(ls, lt, beta);
  expect(std::abs(over.student - (ls - lm)) <= 1e-6 * (1 + std::abs(ls - lm)), "log s - log m", ls,
         lt, over.student, ls - lm);
  expect(std::abs(over.teacher - (lt - lm)) <= 1e-6 * (1 + std::abs(lt - lm)), "log t - log m", ls,
         lt, over.teacher, lt - lm);
  close("forward gradient", ls, lt,
        rlkern::divergence_gradient<Divergence::kForward>(ls, lt, own, beta), s - t);
  close("reverse gradient", ls, lt,
        rlkern::divergence_gradient<Divergence::kReverse>(ls, lt, own, beta),
        s * (double(ls) - lt - own));
  close("jsd gradient", ls, lt, rlkern::divergence_gradient<Divergence::kJsd>(ls, lt, own, beta),
        (1.0 - beta) * s * (ls - lm - own));
}

template <Divergence kKind>
static void limits(float from_student_alone, float from_teacher_alone) {
  const float none = -INFINITY, some = -0.5f;
  const auto value = [](float ls, float lt) {
    return rlkern::divergence_term<kKind>(ls, lt, 0.3f).value;
  };
  const auto same = [](float a, float b) { return a == b || std::abs(a - b) < 1e-6f; };
  expect(value(none, none) == 0.0f, "of neither", none, none, value(none, none), 0);
  expect(value(some, some) == 0.0f, "of both", some, some, value(some, some), 0);
  expect(same(value(some, none), from_student_alone), "of the student", some, none,
         value(some, none), from_student_alone);
  expect(same(value(none, some), from_teacher_alone), "of the teacher", none, some,
         value(none, some), from_teacher_alone);
  expect(std::isnan(value(NAN, some)), "NaN", NAN, some, value(NAN, some), NAN);
  expect(std::isnan(value(some, NAN)), "NaN", some, NAN, value(some, NAN), NAN);
  const float d = rlkern::divergence_gradient<kKind>(none, none, 0.1f, 0.3f);
  expect(d == 0.0f, "gradient of neither", none, none, d, 0);
}

int main() {
  for (float ls : {-1e-4f, -0.7f, -3.0f, -20.0f, -80.0f})
    for (float lt : {-1e-4f, -0.7f, -0.70001f, -3.5f, -30.0f, -90.0f})
      for (float beta : {0.1f, 0.5f, 0.9f}) terms_and_gradients_match(ls, lt, beta, 0.2f);
  const float p = std::exp(-0.5f);
  limits<Divergence::kForward>(0.0f, INFINITY);
  limits<Divergence::kReverse>(INFINITY, 0.0f);
  // -log of the other's weight
  limits<Divergence::kJsd>(-0.7f * p * std::log(0.7f), -0.3f * p * std::log(0.3f));
  return failures != 0;
}
