// CUDA's words on a CPU, for the tests: a grid's blocks one after the other, and a block's threads as contexts that take turns.
//
// A thread runs until it waits (__syncthreads, a shuffle) or ends, then the next one does. Threads that wait for one another wait equally
// often, so that one round of turns is what a barrier promises, and no more: a barrier that is missing shows in the results, as each
// thread finds what those behind it have not yet written. It is slow, and runs one grid at a time.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
// One block at a time: what its threads share is what the program has once.
#define __shared__ static

using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lacuna::on_cpu {

constexpr size_t STACK = 64 * 1024;
// Of a block at most: some warps, and not all that a GPU has room for, as each is a context to be made and switched to. A kernel whose threads
// do not walk over whatever there is must do with so many.
constexpr unsigned THREADS = 128;

struct Thread {
  // Where it goes on: at its beginning, and from then on where it waits.
  ucontext_t beginning;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool begun = false, done = false;
};

inline std::vector<std::unique_ptr<Thread>> threads;
inline jmp_buf turns;
inline unsigned running = 0;
inline std::function<void()> work;
// What threads hand to one another.
inline std::vector<uint32_t> handed;
// Whose grid is running.
inline std::mutex turn;

// Jumps, and not swapcontext: that asks the system for the mask of signals each time.
inline void wait() {
  if (_setjmp(threads[running]->place) == 0) _longjmp(turns, 1);
}

// A context serves one block after another.
inline void begin() {
  for (;;) {
    work();
    threads[running]->done = true;
    wait();
  }
}

inline void go_on(unsigned thread) {
  running = thread;
  threadIdx = {thread, 0, 0};
  Thread& next = *threads[thread];
  if (_setjmp(turns) != 0) return;
  if (next.begun) _longjmp(next.place, 1);
  next.begun = true;
  setcontext(&next.beginning);
}

inline void block(unsigned count) {
  while (threads.size() < count) {
    auto thread = std::make_unique<Thread>();
    thread->stack.reset(new char[STACK]);
    getcontext(&thread->beginning);
    thread->beginning.uc_stack.ss_sp = thread->stack.get();
    thread->beginning.uc_stack.ss_size = STACK;
    thread->beginning.uc_link = nullptr;
    makecontext(&thread->beginning, begin, 0);
    threads.push_back(std::move(thread));
  }
  handed.resize(count);
  for (unsigned thread = 0; thread < count; ++thread) threads[thread]->done = false;
  for (unsigned left = count; left > 0;) {
    for (unsigned thread = 0; thread < count; ++thread) {
      if (threads[thread]->done) continue;
      go_on(thread);
      left -= threads[thread]->done;
    }
  }
}

template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, dim3 grid, unsigned count, Arguments... arguments) {
  const std::lock_guard<std::mutex> mine(turn);
  work = [=] { kernel(arguments...); };
  gridDim = grid;
  blockDim = {count, 1, 1};
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      block(count);
    }
  }
}

} // namespace lacuna::on_cpu

inline void __syncthreads() { lacuna::on_cpu::wait(); }

inline uint32_t __shfl_xor_sync(unsigned, uint32_t word, int bits) {
  using namespace lacuna::on_cpu;
  const unsigned mine = threadIdx.x;
  handed[mine] = word;
  wait();
  const uint32_t other = handed[mine ^ unsigned(bits)];
  wait();
  return other;
}

// A product that is rounded: it becomes no part of a fused sum.
inline float __fmul_rn(float a, float b) { return a * b; }
