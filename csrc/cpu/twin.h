// Two vectors side by side as one type: every step of a formula is taken for both before the next.
// For long chains of operations, each of which waits for the last: the processor looks ahead no
// further than one such chain.
#pragma once

#include <type_traits>

#include "rlkern/math/mask.h"

namespace rlkern {

template <class V>
struct Twin {
  V a, b;

#define RLK_TWIN(op)                                                                  \
  friend RLK_HD Twin operator op(Twin x, Twin y) { return {x.a op y.a, x.b op y.b}; } \
  template <class S>                                                                  \
    requires std::is_arithmetic_v<S>                                                  \
  friend RLK_HD Twin operator op(Twin x, S y) {                                       \
    return {x.a op y, x.b op y};                                                      \
  }                                                                                   \
  template <class S>                                                                  \
    requires std::is_arithmetic_v<S>                                                  \
  friend RLK_HD Twin operator op(S x, Twin y) {                                       \
    return {x op y.a, x op y.b};                                                      \
  }                                                                                   \
  friend RLK_HD Twin& operator op## = (Twin & x, Twin y) { return x = x op y; }
  RLK_TWIN(+)
  RLK_TWIN(-)
  RLK_TWIN(*)
  RLK_TWIN(/)
  RLK_TWIN(&)
  RLK_TWIN(|)
  RLK_TWIN(<<)
  RLK_TWIN(>>)
#undef RLK_TWIN
  friend RLK_HD Twin operator-(Twin x) { return {-x.a, -x.b}; }
  friend RLK_HD Twin operator~(Twin x) { return {~x.a, ~x.b}; }
};

template <class V>
struct Bits<Twin<V>> {
  using Ints = Twin<decltype(Bits<V>::of(V{}))>;
  static RLK_HD Ints of(Twin<V> x) { return {Bits<V>::of(x.a), Bits<V>::of(x.b)}; }
  static RLK_HD Twin<V> from(Ints x) { return {Bits<V>::from(x.a), Bits<V>::from(x.b)}; }
};

template <class V>
RLK_HD Twin<V> exp(Twin<V> x) {
  return {exp(x.a), exp(x.b)};
}
template <class V>
RLK_HD Twin<V> exp_normal(Twin<V> x) {
  return {exp_normal(x.a), exp_normal(x.b)};
}

template <class V>
struct Lanes<Twin<V>> {
  using F = Twin<V>;
  using One = Lanes<V>;
  using Mask = Twin<typename One::Mask>;

  static RLK_HD Mask above(F x, F y) { return {One::above(x.a, y.a), One::above(x.b, y.b)}; }
  static RLK_HD Mask equal(F x, F y) { return {One::equal(x.a, y.a), One::equal(x.b, y.b)}; }
  static RLK_HD Mask differs(F x, F y) { return {One::differs(x.a, y.a), One::differs(x.b, y.b)}; }
  static RLK_HD Mask apart(F x, F y) { return {One::apart(x.a, y.a), One::apart(x.b, y.b)}; }
  static RLK_HD F select(Mask m, F x, F y) {
    return {One::select(m.a, x.a, y.a), One::select(m.b, x.b, y.b)};
  }
  static RLK_HD F where(Mask m, F x) { return {One::where(m.a, x.a), One::where(m.b, x.b)}; }
  static RLK_HD F unless(Mask m, F x) { return {One::unless(m.a, x.a), One::unless(m.b, x.b)}; }
  static RLK_HD F lesser(F x, F y) { return {One::lesser(x.a, y.a), One::lesser(x.b, y.b)}; }
  static RLK_HD F greater(F x, F y) { return {One::greater(x.a, y.a), One::greater(x.b, y.b)}; }
  static RLK_HD F times(Mask m, F x, F y) {
    return {One::times(m.a, x.a, y.a), One::times(m.b, x.b, y.b)};
  }
  static RLK_HD F root(F x) { return {One::root(x.a), One::root(x.b)}; }
};

}  // namespace rlkern
