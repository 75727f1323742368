// Runs CUDA kernels on the CPU, to test their indexing, barriers and shuffles where there is no
// GPU: the threads of a block take turns, from one barrier to the next. Included before a kernel's
// header; conversions are those of quant.h, as on a GPU without the instructions.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
// blocks run one after the other
#define __shared__ static

using std::max;
using std::min;

struct uint2 {
  uint32_t x, y;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace cuda_on_cpu {

// swapcontext saves signal masks, a system call: it enters a thread once, _longjmp does from then
// on.
struct Thread {
  ucontext_t entry;
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool entered = false, done = false;
};

inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<uint64_t> lanes;

// Lets every other thread of the block come here.
inline void barrier() {
  if (_setjmp(threads[threadIdx.x].at) == 0) _longjmp(scheduler, 1);
}

inline void run_thread() {
  for (;;) {
    body();
    threads[threadIdx.x].done = true;
    barrier();
  }
}

// Runs a thread up to its next barrier.
inline void resume(int thread) {
  threadIdx.x = thread;
  Thread& t = threads[thread];
  if (_setjmp(scheduler) != 0) return;
  if (t.entered) _longjmp(t.at, 1);
  t.entered = true;
  getcontext(&t.entry);
  t.entry.uc_stack.ss_sp = t.stack.data();
  t.entry.uc_stack.ss_size = t.stack.size();
  makecontext(&t.entry, run_thread, 0);
  setcontext(&t.entry);
}

inline void launch(int64_t grid, int num_threads, const std::function<void()>& kernel) {
  if (grid <= 0) std::abort();  // as CUDA refuses it
  threads.resize(num_threads);
  lanes.resize(num_threads);
  body = kernel;
  for (int64_t block = 0; block < grid; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (Thread& t : threads) t.done = false;
    for (int done = 0; done == 0;) {
      for (int i = 0; i < num_threads; ++i) {
        resume(i);
        done += threads[i].done;
      }
      if (done == 0 || done == num_threads) continue;
      std::fprintf(stderr, "a barrier that %d of %d threads reach\n", num_threads - done,
                   num_threads);
      std::abort();
    }
  }
}

}  // namespace cuda_on_cpu

#define RLK_LAUNCH(kernel, grid, stream, ...) \
  (static_cast<void>(stream),                 \
   cuda_on_cpu::launch(grid, ::rlkern::kThreads, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { cuda_on_cpu::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int step) {
  uint64_t& mine = cuda_on_cpu::lanes[threadIdx.x];
  std::memcpy(&mine, &x, sizeof x);
  cuda_on_cpu::barrier();
  T other;
  std::memcpy(&other, &cuda_on_cpu::lanes[threadIdx.x ^ step], sizeof other);
  // nobody writes before all have read
  cuda_on_cpu::barrier();
  return other;
}

inline int32_t atomicMax(int32_t* p, int32_t x) {
  const int32_t before = *p;
  *p = max(before, x);
  return before;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline uint32_t __vmaxs2(uint32_t a, uint32_t b) {
  const auto half = [&](int shift) -> uint32_t {
    const auto of = [shift](uint32_t x) { return static_cast<int16_t>(x >> shift); };
    return static_cast<uint32_t>(static_cast<uint16_t>(max(of(a), of(b)))) << shift;
  };
  return half(0) | half(16);
}
