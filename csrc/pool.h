// The thread pool of all kernels. parallel(n, f) calls f(task, worker) for task = 0..n-1 on the caller and the workers, in any order;
// it returns when all are done. Tasks are taken one by one from a counter, so a worker that lost its core to another process delays
// the others by the one task it holds and no more; the caller never waits for a worker that has taken nothing.
//
// Workers spin for about 100 us after a region and then sleep: a decode step of 150 regions wakes them once, an idle process
// costs nothing. A second thread that calls while the pool is busy, and a call from inside a task, run alone on their caller.
// Results must not depend on which worker runs a task. `worker` (0 = the caller) indexes scratch memory,
// which belongs to the call: never static, since two callers can both be worker 0.
#pragma once
#include <atomic>

namespace lilliput {

using Task = void (*)(void* context, int task, int worker);

constexpr int MAX_THREADS = 256;
constexpr int MAX_TASKS = 1 << 15;  // of one region

void run(int tasks, Task task, void* context);
void set_threads(int count);  // of all regions from now on, the caller included
int threads();

template <class F>
static inline void parallel(int tasks, F&& f) {
  if (tasks <= 0) return;
  run(tasks, [](void* context, int task, int worker) { (*static_cast<F*>(context))(task, worker); }, const_cast<void*>(static_cast<const void*>(&f)));
}

// The same, but a worker begins with its own share of the tasks, the same one in every region of as many, and helps others when that is
// done: what it wrote or read last time is in its own cache. Between two cores a line takes 150 ns and more, where it is needed at once.
template <class F>
static inline void parallel_home(int tasks, F&& f) {
  constexpr int HOMES = 16;
  struct alignas(64) Share { std::atomic<int> next; int end; } shares[HOMES];
  const int homes = threads() < HOMES ? threads() : HOMES;
  for (int h = 0; h < homes; h++) { shares[h].next.store(int(long(tasks) * h / homes), std::memory_order_relaxed); shares[h].end = int(long(tasks) * (h + 1) / homes); }
  parallel(tasks, [&](int, int worker) {  // as many calls as tasks, so that each finds one
    for (int h = worker;; h++) {
      Share& s = shares[h % homes];
      if (s.next.load(std::memory_order_relaxed) >= s.end) continue;
      const int task = s.next.fetch_add(1, std::memory_order_relaxed);
      if (task < s.end) return f(task, worker);
    }
  });
}

// f(from, to) over ranges of `count` things, a whole number of `unit` each but for the last; several units a task where there are many.
template <class F>
static inline void parallel_ranges(long count, long unit, F&& f) {
  const long units = (count + unit - 1) / unit, each = (units + MAX_TASKS - 1) / MAX_TASKS * unit;
  if (count > 0) parallel(int((count + each - 1) / each), [&](int task, int) {
    const long from = task * each, to = from + each;
    f(from, to < count ? to : count);
  });
}

}  // namespace lilliput
