// NVFP4 on CUDA: a block of sixteen elements is a thread's, from its largest magnitude to its eight
// bytes of codes, so that each element is read once.
#pragma once

#include "quantize.cuh"
#include "rlkern/math/philox.h"

namespace rlkern {

template <class T>
struct Nvfp4Args {
  const T* w;
  const float* amax;
  const uint8_t* previous;  // or null
  uint8_t *codes, *scales;
  float* decode;
  float* counts;  // a row for each block of threads
  int64_t rows, columns;
  int64_t recipe, rule;
  bool stochastic;
  uint64_t seed;
  bool aligned, previous_aligned;
};

// Blocks 16 x 16: of a warp four side by side, each sixteen rows of one thread for two of them.
constexpr int kBlocksOfWarp = 4, kTileBlocks = kBlocksOfWarp * kWarps;

// The scale of blocks and what becomes of their elements, by a recipe that the launch has chosen.
struct Nvfp4Scale {
  int32_t code;
  float factor;

  template <Nvfp4Recipe recipe>
  static __device__ Nvfp4Scale of(float b, const Nvfp4Global& global) {
    Nvfp4Scale out;
    out.code = nvfp4_scale<recipe>(b, global, out.factor);
    return out;
  }
  static __device__ Nvfp4Scale of(int64_t recipe, float b, const Nvfp4Global& global) {
    switch (recipe) {
      case kTe:
        return of<kTe>(b, global);
      case kVllm:
        return of<kVllm>(b, global);
      case kCompressedTensors:
        return of<kCompressedTensors>(b, global);
      case kTorchao:
        return of<kTorchao>(b, global);
      case kModelopt:
        return of<kModelopt>(b, global);
      default:
        return of<kFouroversix>(b, global);
    }
  }
};

template <Nvfp4Recipe recipe, class T>
__device__ void scale_elements(const Chunk<T>& x, float factor, float* scaled) {
  RLK_UNROLL
  for (int e = 0; e < kChunk; ++e) scaled[e] = nvfp4_scaled<recipe>(x.element(e), factor);
}

// What E2M1 rounds, for the recipes that treat elements alike.
template <class T>
__device__ void scale_elements(int64_t recipe, const Chunk<T>& x, float factor, float* scaled) {
  if (recipe == kCompressedTensors || recipe == kModelopt)
    scale_elements<kModelopt>(x, factor, scaled);
  else if (recipe == kFouroversix)
    scale_elements<kFouroversix>(x, factor, scaled);
  else
    scale_elements<kTe>(x, factor, scaled);
}

// Sets what is nearer of two candidates.
template <Nvfp4Recipe recipe, bool kOfSquares, class T>
__device__ Nvfp4Scale four_over_six(const Chunk<T>& x, float b, float amax,
                                    const Nvfp4Global& global) {
  const float raw = b / 6.0f * global.encode;
  auto six = Candidate<float>::of<recipe>(raw, global);
  auto four = Candidate<float>::of<recipe>(raw * 1.5f, global);
  constexpr bool kByHalves = recipe == kFouroversix;
  if (is_usual(amax)) {
    six.template add_errors<kOfSquares, kByHalves, true>(x, amax);
    four.template add_errors<kOfSquares, kByHalves, true>(x, amax);
  } else {
    six.template add_errors<kOfSquares, kByHalves, false>(x, amax);
    four.template add_errors<kOfSquares, kByHalves, false>(x, amax);
  }
  const bool better = four.error < six.error;
  return {better ? four.scale : six.scale, better ? four.factor : six.factor};
}

template <class T>
__device__ Nvfp4Scale four_over_six(int64_t recipe, int64_t rule, const Chunk<T>& x, float b,
                                    float amax, const Nvfp4Global& global) {
  if (recipe == kTe)
    return rule == kSquares ? four_over_six<kTe, true>(x, b, amax, global)
                            : four_over_six<kTe, false>(x, b, amax, global);
  return rule == kSquares ? four_over_six<kFouroversix, true>(x, b, amax, global)
                          : four_over_six<kFouroversix, false>(x, b, amax, global);
}

// Byte e % 4 of word e / 4 of the Philox counter that is the block's index is element e's.
__device__ inline uint2 stochastic_codes(const float* scaled, int64_t block, uint64_t seed) {
  const auto random =
      Philox<uint32_t>::of(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), seed);
  uint2 codes{0, 0};
  RLK_UNROLL
  for (int e = 0; e < kChunk; ++e) {
    const int32_t byte = (random.words[e / 4] >> (8 * (e % 4))) & 0xFF;
    const uint32_t code = e2m1_stochastic(scaled[e], byte);
    (e < 8 ? codes.x : codes.y) |= code << (4 * (e % 8));
  }
  return codes;
}

// Nibbles that are not 0.
__device__ inline int num_nibbles(uint32_t x) {
  return __popc((x | x >> 1 | x >> 2 | x >> 3) & 0x11111111u);
}

// kSquare: blocks of 16 x 16. kCandidates: four over six.
template <class T, bool kSquare, bool kCandidates, bool kCounts>
__global__ void __launch_bounds__(kThreads) nvfp4_kernel(const Nvfp4Args<T> a) {
  constexpr int kRows = kSquare ? 2 : 1;
  const int64_t across = a.columns / kChunk;
  // of each of the thread's blocks of sixteen
  int64_t block[kRows];
  bool live[kRows];
  if constexpr (kSquare) {
    const int64_t tiles = ceil_div(across, int64_t{kTileBlocks});
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t down = blockIdx.x / tiles, along = blockIdx.x - down * tiles;
    const int64_t column = along * kTileBlocks + warp * kBlocksOfWarp + lane % kBlocksOfWarp;
    RLK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = down * 16 + lane / kBlocksOfWarp + 8 * i;
      block[i] = row * across + column;
      live[i] = row < a.rows && column < across;
    }
  } else {
    block[0] = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    live[0] = block[0] < a.rows * across;
  }
  Chunk<T> x[kRows];
  RLK_UNROLL
  for (int i = 0; i < kRows; ++i)
    x[i].load(a.w + block[i] * kChunk, live[i] ? kChunk : 0, a.aligned);

  // while the elements are on their way
  __shared__ Nvfp4Global of_all;
  const float amax = *a.amax;
  if (threadIdx.x == 0) {
    of_all = Nvfp4Global::of(a.recipe, amax, kCandidates ? 1536.0f : 2688.0f);
    if (blockIdx.x == 0) *a.decode = of_all.decode;
  }
  __syncthreads();
  const Nvfp4Global global = of_all;

  int32_t most = 0;
  RLK_UNROLL
  for (int i = 0; i < kRows; ++i) most = max(most, x[i].largest(a.recipe == kTe));
  if constexpr (kSquare) most = max_over_lanes(most, kBlocksOfWarp, 32);
  const float b = Bits<float>::from(most);
  Nvfp4Scale scale;
  if constexpr (kCandidates)
    scale = four_over_six(a.recipe, a.rule, x[0], b, amax, global);
  else
    scale = Nvfp4Scale::of(a.recipe, b, global);

  Counts counts;
  RLK_UNROLL
  for (int i = 0; i < kRows; ++i) {
    float scaled[kChunk];
    scale_elements(a.recipe, x[i], scale.factor, scaled);
    const uint2 codes = !kCandidates && a.stochastic
                            ? stochastic_codes(scaled, block[i], a.seed)
                            : uint2{e2m1_of_eight(scaled), e2m1_of_eight(scaled + 8)};
    if (live[i]) {
      reinterpret_cast<uint2*>(a.codes)[block[i]] = codes;
      a.scales[block[i]] = static_cast<uint8_t>(scale.code);
    }
    if constexpr (kCounts) {
      if (!live[i]) continue;
      if (a.previous) {
        const uint2 before = load_bytes<uint2>(a.previous + block[i] * 8, a.previous_aligned);
        counts.changed += num_nibbles(codes.x ^ before.x) + num_nibbles(codes.y ^ before.y);
      }
      const float step = from_e4m3<float>(scale.code);
      RLK_UNROLL
      for (int e = 0; e < kChunk; ++e) {
        const int32_t code = ((e < 8 ? codes.x : codes.y) >> (4 * (e % 8))) & 7;
        const float value = product(product(from_e2m1<float>(code), step), global.decode);
        counts.add(x[i].magnitude(e), scaled[e], kLargestE2m1Bits, code == 0, value);
      }
    }
  }
  if constexpr (kCounts) counts.store(a.counts);
}

// Blocks of threads, and so rows of counts: one at least, which writes what decodes.
inline int64_t nvfp4_grid(int64_t rows, int64_t columns, bool square) {
  const int64_t across = columns / kChunk;
  const int64_t grid = square ? ceil_div(rows, int64_t{16}) * ceil_div(across, int64_t{kTileBlocks})
                              : ceil_div(rows * across, int64_t{kThreads});
  return grid ? grid : 1;
}

template <class T, bool kCounts, class Stream>
void launch_nvfp4(const Nvfp4Args<T>& a, bool square, int64_t grid, Stream stream) {
  if (a.rule != kNone)
    RLK_LAUNCH((nvfp4_kernel<T, false, true, kCounts>), grid, stream, a);
  else if (square)
    RLK_LAUNCH((nvfp4_kernel<T, true, false, kCounts>), grid, stream, a);
  else
    RLK_LAUNCH((nvfp4_kernel<T, false, false, kCounts>), grid, stream, a);
}

// most: 0 before, where a.amax is of it; null where amax was given. sums: five, or null.
template <class T, class Stream>
void quantize_nvfp4(Nvfp4Args<T> a, bool square, int32_t* most, double* sums, Stream stream) {
  a.aligned = is_aligned(a.w, 16);
  a.previous_aligned = is_aligned(a.previous, 8);
  if (most) launch_amax(a.w, a.rows * a.columns, a.recipe == kTe, most, stream);
  const int64_t grid = nvfp4_grid(a.rows, a.columns, square);
  if (!sums) return launch_nvfp4<T, false>(a, square, grid, stream);
  launch_nvfp4<T, true>(a, square, grid, stream);
  RLK_LAUNCH(sum_counts_kernel, 1, stream, a.counts, grid, sums);
}

}  // namespace rlkern
