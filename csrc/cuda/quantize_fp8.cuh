// FP8 E4M3 by blocks on CUDA. Groups of 32 or 128 in a row are two or eight threads', and a block
// of 128 x 128 is one block of threads', which keep their elements in registers between the largest
// magnitude and the codes: each is read once. A row is read again from cache.
#pragma once

#include "quantize.cuh"

namespace rlkern {

template <class T>
struct Fp8Args {
  const T* w;
  const float* amax;        // of the whole tensor alone
  const uint8_t* previous;  // or null
  uint8_t* codes;
  float* scales;         // one of these two
  uint8_t* byte_scales;  //
  float* counts;         // a row for each block of threads
  int64_t rows, columns;
  Fp8Rule rule;
  bool aligned, previous_aligned;  // and whole chunks: of rows, and of what is written

  __device__ void put(int64_t block, const Fp8Scale& s) const {
    if (byte_scales)
      byte_scales[block] = static_cast<uint8_t>(s.scale);
    else
      scales[block] = s.scale;
  }
};

// Encodes the first `live` elements of a chunk at `at`, and counts.
template <bool kCounts, class T>
__device__ void encode_chunk(const Fp8Args<T>& a, const Chunk<T>& x, const Fp8Scale& s, int64_t at,
                             int64_t live, Counts& counts) {
  if (live <= 0) return;
  float scaled[kChunk];
  if (divides(a.rule.order)) {
    RLK_UNROLL
    for (int e = 0; e < kChunk; ++e) scaled[e] = x.element(e) / s.factor;
  } else {
    RLK_UNROLL
    for (int e = 0; e < kChunk; ++e) scaled[e] = product(x.element(e), s.factor);
  }
  // -0 plus -0 is -0, and plus 0 is 0
  const float zero = adds_zero(a.rule.order) ? 0.0f : -0.0f;
  RLK_UNROLL
  for (int e = 0; e < kChunk; ++e) scaled[e] += zero;
  Words codes;
  RLK_UNROLL
  for (int i = 0; i < 4; ++i)
    codes.w[i] =
        e4m3_of_four(scaled[4 * i], scaled[4 * i + 1], scaled[4 * i + 2], scaled[4 * i + 3]);
  const auto code_of = [](const Words& words, int e) {
    return static_cast<int32_t>(words.w[e / 4] >> (8 * (e % 4)) & 0xFF);
  };
  const bool whole = live >= kChunk && a.aligned;
  if (whole) {
    *reinterpret_cast<Words*>(a.codes + at) = codes;
  } else {
    RLK_UNROLL
    for (int e = 0; e < kChunk; ++e)
      if (e < live) a.codes[at + e] = static_cast<uint8_t>(code_of(codes, e));
  }
  if constexpr (kCounts) {
    if (a.previous) {
      Words before{};
      if (whole) {
        before = load_bytes<Words>(a.previous + at, a.previous_aligned);
      } else {
        RLK_UNROLL
        for (int e = 0; e < kChunk; ++e)
          if (e < live) before.w[e / 4] |= static_cast<uint32_t>(a.previous[at + e]) << 8 * (e % 4);
      }
      RLK_UNROLL
      for (int e = 0; e < kChunk; ++e)
        counts.changed += e < live && code_of(codes, e) != code_of(before, e) ? 1.0f : 0.0f;
    }
    const float step = s.value(a.rule.order);
    RLK_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      const int32_t code = code_of(codes, e) & 0x7F;
      // past `live` all is 0, but code and scale may be NaN
      if (e < live)
        counts.add(x.magnitude(e), scaled[e], kLargestE4m3Bits, code == 0,
                   product(from_e4m3<float>(code), step));
    }
  }
}

// The whole tensor, whose largest magnitude is known.
template <class T, bool kCounts>
__global__ void __launch_bounds__(kThreads) fp8_tensor_kernel(const Fp8Args<T> a) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kChunk;
  const int64_t live = a.rows * a.columns - at;
  Chunk<T> x;
  x.load(a.w + at, live, a.aligned);
  const Fp8Scale s = fp8_scale(*a.amax, a.rule);
  if (at == 0) a.put(0, s);
  Counts counts;
  encode_chunk<kCounts>(a, x, s, at, live, counts);
  if constexpr (kCounts) counts.store(a.counts);
}

// A row for each block of threads.
template <class T, bool kCounts>
__global__ void __launch_bounds__(kThreads) fp8_row_kernel(const Fp8Args<T> a) {
  const int64_t row = blockIdx.x, columns = a.columns;
  int32_t most = 0;
  Chunk<T> x;
  for (int64_t j = threadIdx.x * kChunk; j < columns; j += kThreads * kChunk) {
    x.load(a.w + row * columns + j, columns - j, a.aligned);
    most = max(most, x.largest(false));
  }
  most = max_over_block(most);
  const Fp8Scale s = fp8_scale(Bits<float>::from(most), a.rule);
  if (threadIdx.x == 0) a.put(row, s);
  Counts counts;
  for (int64_t j = threadIdx.x * kChunk; j < columns; j += kThreads * kChunk) {
    // a row of one step is still in registers
    if (columns > kThreads * kChunk) x.load(a.w + row * columns + j, columns - j, a.aligned);
    encode_chunk<kCounts>(a, x, s, row * columns + j, columns - j, counts);
  }
  if constexpr (kCounts) counts.store(a.counts);
}

// Groups of 16 kLanes in a row, of kLanes threads.
template <class T, int kLanes, bool kCounts>
__global__ void __launch_bounds__(kThreads) fp8_group_kernel(const Fp8Args<T> a) {
  constexpr int64_t kWide = kLanes * kChunk;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t group = chunk / kLanes;
  int64_t at, live;
  if (a.columns % kWide == 0) {
    // groups follow each other without a gap
    at = chunk * kChunk;
    live = a.rows * a.columns - at;
  } else {
    const int64_t across = ceil_div(a.columns, kWide), row = group / across;
    const int64_t j = (group - row * across) * kWide + chunk % kLanes * kChunk;
    at = row * a.columns + j;
    live = row < a.rows ? a.columns - j : 0;
  }
  Chunk<T> x;
  x.load(a.w + at, live, a.aligned);
  const int32_t most = max_over_lanes(x.largest(false), 1, kLanes);
  const Fp8Scale s = fp8_scale(Bits<float>::from(most), a.rule);
  // the first chunk of a group is never empty
  if (chunk % kLanes == 0 && live > 0) a.put(group, s);
  Counts counts;
  encode_chunk<kCounts>(a, x, s, at, live, counts);
  if constexpr (kCounts) counts.store(a.counts);
}

// 128 x 128, a block of threads each.
template <class T, bool kCounts>
__global__ void __launch_bounds__(kThreads) fp8_tile_kernel(const Fp8Args<T> a) {
  constexpr int kSide = 128, kAcross = kSide / kChunk, kDown = kThreads / kAcross;
  constexpr int kChunks = kSide / kDown;
  const int64_t across = ceil_div(a.columns, int64_t{kSide});
  const int64_t down = blockIdx.x / across, along = blockIdx.x - down * across;
  const int64_t column = along * kSide + threadIdx.x % kAcross * kChunk;
  const int64_t first = down * kSide + threadIdx.x / kAcross;
  Chunk<T> x[kChunks];
  RLK_UNROLL
  for (int i = 0; i < kChunks; ++i) {
    const int64_t row = first + i * kDown;
    x[i].load(a.w + row * a.columns + column, row < a.rows ? a.columns - column : 0, a.aligned);
  }
  int32_t most = 0;
  RLK_UNROLL
  for (int i = 0; i < kChunks; ++i) most = max(most, x[i].largest(false));
  const Fp8Scale s = fp8_scale(Bits<float>::from(max_over_block(most)), a.rule);
  if (threadIdx.x == 0) a.put(blockIdx.x, s);
  Counts counts;
  RLK_UNROLL
  for (int i = 0; i < kChunks; ++i) {
    const int64_t row = first + i * kDown;
    const int64_t live = row < a.rows ? a.columns - column : 0;
    encode_chunk<kCounts>(a, x[i], s, row * a.columns + column, live, counts);
  }
  if constexpr (kCounts) counts.store(a.counts);
}

// Which kernel has blocks of so many rows and columns, 0 for all there are.
enum class Fp8Shape { kTensor, kRow, kGroup32, kGroup128, kTile, kNone };
inline Fp8Shape fp8_shape(int64_t high, int64_t wide) {
  if (high == 0 && wide == 0) return Fp8Shape::kTensor;
  if (high == 1 && wide == 0) return Fp8Shape::kRow;
  if (high == 1 && wide == 32) return Fp8Shape::kGroup32;
  if (high == 1 && wide == 128) return Fp8Shape::kGroup128;
  return high == 128 && wide == 128 ? Fp8Shape::kTile : Fp8Shape::kNone;
}

// Blocks of threads, and so rows of counts.
inline int64_t fp8_grid(Fp8Shape shape, int64_t rows, int64_t columns) {
  constexpr int64_t kSpan = kThreads * kChunk, kSide = 128;
  if (rows * columns == 0) return 0;
  switch (shape) {
    case Fp8Shape::kTensor:
      return ceil_div(rows * columns, kSpan);
    case Fp8Shape::kRow:
      return rows;
    case Fp8Shape::kGroup32:
      return ceil_div(rows * ceil_div(columns, int64_t{32}) * 32, kSpan);
    case Fp8Shape::kGroup128:
      return ceil_div(rows * ceil_div(columns, kSide) * kSide, kSpan);
    default:
      return ceil_div(rows, kSide) * ceil_div(columns, kSide);
  }
}

template <bool kCounts, class T, class Stream>
void launch_fp8(const Fp8Args<T>& a, Fp8Shape shape, int64_t grid, Stream stream) {
  switch (shape) {
    case Fp8Shape::kTensor:
      RLK_LAUNCH((fp8_tensor_kernel<T, kCounts>), grid, stream, a);
      break;
    case Fp8Shape::kRow:
      RLK_LAUNCH((fp8_row_kernel<T, kCounts>), grid, stream, a);
      break;
    case Fp8Shape::kGroup32:
      RLK_LAUNCH((fp8_group_kernel<T, 2, kCounts>), grid, stream, a);
      break;
    case Fp8Shape::kGroup128:
      RLK_LAUNCH((fp8_group_kernel<T, 8, kCounts>), grid, stream, a);
      break;
    default:
      RLK_LAUNCH((fp8_tile_kernel<T, kCounts>), grid, stream, a);
  }
}

// most: 0 before, where a.amax is of it; null where it is not asked for. sums: five, or null.
template <class T, class Stream>
void quantize_fp8(Fp8Args<T> a, Fp8Shape shape, int32_t* most, double* sums, Stream stream) {
  // a chunk of a later row begins where its row does
  const bool flat = shape == Fp8Shape::kTensor || a.columns % kChunk == 0;
  a.aligned = flat && is_aligned(a.w, 16);
  a.previous_aligned = is_aligned(a.previous, 16);
  const int64_t grid = fp8_grid(shape, a.rows, a.columns);
  if (most) launch_amax(a.w, a.rows * a.columns, false, most, stream);
  if (grid)
    sums ? launch_fp8<true>(a, shape, grid, stream) : launch_fp8<false>(a, shape, grid, stream);
  if (sums) RLK_LAUNCH(sum_counts_kernel, 1, stream, a.counts, grid, sums);
}

}  // namespace rlkern
