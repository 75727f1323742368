// The one place that asks which compiler is reading.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RLK_HD __host__ __device__ __forceinline__
#define RLK_UNROLL _Pragma("unroll")
#else
#define RLK_HD inline __attribute__((always_inline))
#define RLK_UNROLL _Pragma("GCC unroll 16")
#endif

// A CPU kernel compiled once per instruction set and chosen when the library is loaded. The body
// must be always_inline functions, so that each clone is vectorised for its own registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RLK_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RLK_MULTIVERSION
#endif
