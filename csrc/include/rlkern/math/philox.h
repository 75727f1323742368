// Philox4x32-10 (Salmon et al., SC 2011): random bits as a function of a counter and a key, so that
// any element's are found without those before it, in any order, on any device.
#pragma once

#include <cstdint>

#include "rlkern/macros.h"

namespace rlkern {

// The upper half of the 64-bit product; csrc/cpu specialises it for vectors.
template <class U>
struct HighHalf;
template <>
struct HighHalf<uint32_t> {
  static RLK_HD uint32_t of(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
  }
};

// U: one counter, or a vector of them with a lane each.
template <class U>
struct Philox {
  U words[4];

  // The random words of counter (low, high, 0, 0).
  static RLK_HD Philox of(U low, U high, uint64_t seed) {
    return of(Philox{{low, high, U{}, U{}}}, seed);
  }

  static RLK_HD Philox of(Philox c, uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const U a = c.words[0], b = c.words[2];
      const U high_a = HighHalf<U>::of(a, 0xD2511F53u), high_b = HighHalf<U>::of(b, 0xCD9E8D57u);
      c = {{high_b ^ c.words[1] ^ key0, b * 0xCD9E8D57u, high_a ^ c.words[3] ^ key1,
            a * 0xD2511F53u}};
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    return c;
  }
};

}  // namespace rlkern
