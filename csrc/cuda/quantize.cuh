// What the quantisers share on CUDA: sixteen elements of a thread, conversions by the instructions
// that a GPU has, largest magnitudes by their bits, and counts.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

#include "rlkern/math/quant.h"

// tests/csrc/cuda_on_cpu.h runs kernels without a GPU by a definition of its own.
#ifndef RLK_LAUNCH
#define RLK_LAUNCH(kernel, grid, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), ::rlkern::kThreads, 0, stream>>>(__VA_ARGS__)
#endif

// cvt to E2M1 is in no plain target, but in those of an architecture (100a) or a family (100f).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define RLK_HAS_CVT_E4M3
#if __CUDA_ARCH__ >= 1000 && \
    (defined(__CUDA_ARCH_SPECIFIC__) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__))
#define RLK_HAS_CVT_E2M1
#endif
#endif

namespace rlkern {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChunk = 16;

template <class A, class B>
constexpr RLK_HD auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

struct alignas(16) Words {
  uint32_t w[4];
};

// Any type from bytes, at once where they are aligned for it.
template <class V>
__device__ V load_bytes(const uint8_t* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const V*>(p);
  V out;
  memcpy(&out, p, sizeof out);
  return out;
}

// Sixteen neighbours in a row, as many bits each as in memory.
template <class T>
struct Chunk {
  static constexpr bool kHalves = sizeof(T) == 2;
  static constexpr int kWords = kChunk * sizeof(T) / 4;
  uint32_t words[kWords];

  // Elements from `live` on are 0. aligned: p is, to 16 bytes.
  __device__ void load(const T* p, int64_t live, bool aligned) {
    if (live >= kChunk && aligned) {
      RLK_UNROLL
      for (int i = 0; i < kWords / 4; ++i) {
        const Words four = reinterpret_cast<const Words*>(p)[i];
        RLK_UNROLL
        for (int j = 0; j < 4; ++j) words[4 * i + j] = four.w[j];
      }
      return;
    }
    RLK_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = 0;
    RLK_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      if (e >= live) continue;
      if constexpr (kHalves)
        words[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[e])
                        << (16 * (e % 2));
      else
        words[e] = reinterpret_cast<const uint32_t*>(p)[e];
    }
  }

  __device__ float element(int e) const {
    if constexpr (!kHalves) {
      return Bits<float>::from(words[e]);
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      const uint32_t word = words[e / 2];
      return Bits<float>::from(e % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
    } else {
      return from_half(words[e / 2] >> (16 * (e % 2)));
    }
  }
  __device__ float magnitude(int e) const {
    return Bits<float>::from(Bits<float>::of(element(e)) & kMagnitude);
  }

  // The bits of the largest magnitude, as float; NaN is above all, or where it is ignored is 0.
  __device__ int32_t largest(bool ignores_nan) const {
    int32_t most;
    if constexpr (kHalves) {
      uint32_t pair = 0;
      RLK_UNROLL
      for (int i = 0; i < kWords; ++i) pair = __vmaxs2(pair, words[i] & 0x7FFF7FFFu);
      const uint32_t low = pair & 0xFFFF, high = pair >> 16, half = low > high ? low : high;
      most = std::is_same_v<T, c10::BFloat16> ? static_cast<int32_t>(half << 16)
                                              : Bits<float>::of(from_half(half));
    } else {
      most = 0;
      RLK_UNROLL
      for (int i = 0; i < kWords; ++i)
        most = max(most, static_cast<int32_t>(words[i]) & kMagnitude);
    }
    if (ignores_nan && most > kInfinityBits) {
      most = 0;
      RLK_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        const int32_t bits = Bits<float>::of(element(e)) & kMagnitude;
        if (bits <= kInfinityBits) most = max(most, bits);
      }
    }
    return most;
  }

 private:
  // The low sixteen bits; multiplied by 2^112 their exponent is a float's.
  static __device__ float from_half(uint32_t bits) {
    const float finite = Bits<float>::from((bits & 0x7FFF) << 13) * 0x1p112f;
    const uint32_t special = (bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
    return Bits<float>::from(Bits<float>::of(finite) | special | (bits & 0x8000) << 16);
  }
};

__device__ inline uint32_t e4m3_of_four(float a, float b, float c, float d) {
#if defined(RLK_HAS_CVT_E4M3)
  uint32_t codes;
  // the second source of cvt becomes the low byte
  asm("{ .reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high}; }"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
#else
  return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | static_cast<uint32_t>(e4m3(d)) << 24;
#endif
}

// The codes of x[0 .. 8), four bits each, the first in the lowest.
__device__ inline uint32_t e2m1_of_eight(const float* x) {
#if defined(RLK_HAS_CVT_E2M1)
  uint32_t codes;
  asm("{ .reg .b8 b0, b1, b2, b3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3}; }"
      : "=r"(codes)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
  return codes;
#else
  uint32_t codes = 0;
  RLK_UNROLL
  for (int i = 0; i < 8; ++i) codes |= static_cast<uint32_t>(e2m1(x[i])) << (4 * i);
  return codes;
#endif
}

// The largest over lanes that differ in bits from `first` up to, but without, `last`.
__device__ inline int32_t max_over_lanes(int32_t x, int first, int last) {
  RLK_UNROLL
  for (int step = first; step < last; step *= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// The largest of a block of threads, in all of them.
__device__ inline int32_t max_over_block(int32_t x) {
  __shared__ int32_t by_warp[kWarps];
  x = max_over_lanes(x, 1, 32);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = by_warp[0];
  RLK_UNROLL
  for (int i = 1; i < kWarps; ++i) x = max(x, by_warp[i]);
  return x;
}

// What a sweep may count on its way: the columns of the schema's statistics.
struct Counts {
  static constexpr int kNum = 5;
  float changed = 0, saturated = 0, flushed = 0, squared_error = 0, squared = 0;

  // w: the magnitude of an element; scaled: what was encoded; value: of its code, without sign.
  __device__ void add(float w, float scaled, int32_t largest_bits, bool is_zero, float value) {
    const int32_t size = Bits<float>::of(scaled) & kMagnitude;
    saturated += size > largest_bits && size <= kInfinityBits ? 1.0f : 0.0f;
    flushed += is_zero && Bits<float>::of(w) != 0 ? 1.0f : 0.0f;
    const float off = value - w;
    squared_error += product(off, off);
    squared += product(w, w);
  }

  // The sums of a block of threads, to its row of five.
  __device__ void store(float* rows) const {
    __shared__ float by_warp[kNum][kWarps];
    float mine[kNum] = {changed, saturated, flushed, squared_error, squared};
    RLK_UNROLL
    for (int i = 0; i < kNum; ++i) {
      RLK_UNROLL
      for (int step = 1; step < 32; step *= 2) mine[i] += __shfl_xor_sync(~0u, mine[i], step);
      if (threadIdx.x % 32 == 0) by_warp[i][threadIdx.x / 32] = mine[i];
    }
    __syncthreads();
    if (threadIdx.x >= kNum) return;
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += by_warp[threadIdx.x][i];
    rows[static_cast<int64_t>(blockIdx.x) * kNum + threadIdx.x] = sum;
  }
};

// The sums of rows of counts, always in the same order: by one block.
static __global__ void __launch_bounds__(kThreads)
    sum_counts_kernel(const float* rows, int64_t num_rows, double* sums) {
  __shared__ double partial[kThreads];
  for (int column = 0; column < Counts::kNum; ++column) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < num_rows; i += kThreads)
      sum += rows[i * Counts::kNum + column];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned width = kThreads / 2; width > 0; width /= 2) {
      if (threadIdx.x < width) partial[threadIdx.x] += partial[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0) sums[column] = partial[0];
    __syncthreads();
  }
}

// Chunks of a thread of amax_kernel: enough bytes on their way to hide the latency of memory.
constexpr int kAmaxChunks = 4;

// Raises *most to the bits of max |w|. The order of atomic maxima changes nothing.
template <class T>
__global__ void __launch_bounds__(kThreads)
    amax_kernel(const T* w, int64_t count, bool aligned, bool ignores_nan, int32_t* most) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kAmaxChunks) + threadIdx.x;
  int32_t mine = 0;
  Chunk<T> x[kAmaxChunks];
  RLK_UNROLL
  for (int i = 0; i < kAmaxChunks; ++i) {
    const int64_t at = (first + i * kThreads) * kChunk;
    x[i].load(w + at, count - at, aligned);
  }
  RLK_UNROLL
  for (int i = 0; i < kAmaxChunks; ++i) mine = max(mine, x[i].largest(ignores_nan));
  mine = max_over_block(mine);
  if (threadIdx.x == 0 && mine != 0) atomicMax(most, mine);
}

// most: 0 before.
template <class T, class Stream>
void launch_amax(const T* w, int64_t count, bool ignores_nan, int32_t* most, Stream stream) {
  const bool aligned = is_aligned(w, 16);
  const int64_t grid = ceil_div(count, int64_t{kThreads * kAmaxChunks * kChunk});
  if (grid) RLK_LAUNCH(amax_kernel<T>, grid, stream, w, count, aligned, ignores_nan, most);
}

}  // namespace rlkern
