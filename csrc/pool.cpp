#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <mutex>
#include <thread>
#include <vector>

namespace lilliput {
namespace {

constexpr int SPIN_US = 100;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Place {  // of a worker
  std::atomic<int> at{-1};  // the core it was last seen on
  int kept_off = -1;        // the core that it may not use; -1: none
};

// One 64-bit word says everything: region number (32 bits), number of tasks (16), next task (16). A worker takes a task by
// fetch_add; whether what it got is a task follows from the word alone, so a late worker can never run a task of a region that
// has ended, and the region's fields cannot change while a task that was taken is not yet counted in `done`.
struct Pool {
  std::atomic<uint64_t> word{0};
  Task task = nullptr;
  void* context = nullptr;
  alignas(64) std::atomic<int> done{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<uint32_t> bell{0};  // the futex; rung for a new region when somebody sleeps
  std::atomic<bool> stop{false};
  std::mutex busy;
  std::vector<std::thread> workers;
  std::vector<Place> places;

  void work(int worker) {
    uint64_t got = word.fetch_add(1, std::memory_order_acq_rel);
    while (int(got & 0xffff) < int(got >> 16 & 0xffff)) {
      task(context, int(got & 0xffff), worker);
      done.fetch_add(1, std::memory_order_release);
      got = word.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  static bool open(uint64_t w) { return (w & 0xffff) < (w >> 16 & 0xffff); }

  void loop(int worker) {
    while (!stop.load(std::memory_order_relaxed)) {
      const auto since = std::chrono::steady_clock::now();
      bool found = false;
      for (int round = 1; !(found = open(word.load(std::memory_order_acquire))); round++) {
        pause();
        if (round % 64 == 0 && std::chrono::steady_clock::now() - since > std::chrono::microseconds(SPIN_US)) break;
      }
      if (found) {
        places[size_t(worker) - 1].at.store(sched_getcpu(), std::memory_order_relaxed);
        work(worker);
        continue;
      }
      const uint32_t heard = bell.load(std::memory_order_acquire);
      sleeping.fetch_add(1, std::memory_order_seq_cst);
      if (!open(word.load(std::memory_order_seq_cst)) && !stop.load(std::memory_order_seq_cst))
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAIT_PRIVATE, heard, nullptr, nullptr, 0);
      sleeping.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void ring() {
    bell.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Workers are not bound to cores one by one: two programs that both bind their first worker to core 1 would share it for ever.
  // But a worker must not wake up on its caller's own core, as it does where the system knows no cache that cores share
  // (virtual machines): both would then run at half speed, for many regions. Such a worker may use every core but that one.
  void make_room() {
    const int mine = sched_getcpu();
    for (size_t i = 0; i < places.size(); i++) {
      if (places[i].at.load(std::memory_order_relaxed) != mine || places[i].kept_off == mine) continue;
      cpu_set_t cores;
      if (sched_getaffinity(0, sizeof cores, &cores) != 0 || CPU_COUNT(&cores) < 2) return;
      CPU_CLR(mine, &cores);
      if (pthread_setaffinity_np(workers[i].native_handle(), sizeof cores, &cores) == 0) places[i].kept_off = mine;
    }
  }

  void start(int count) {
    places = std::vector<Place>(size_t(count - 1));
    for (int worker = 1; worker < count; worker++) workers.emplace_back([this, worker] { loop(worker); });
  }

  void end() {
    stop.store(true, std::memory_order_seq_cst);
    ring();
    for (auto& worker : workers) worker.join();
  }

  void region(int tasks, Task f, void* c) {
    done.store(0, std::memory_order_relaxed);
    task = f; context = c;
    const uint64_t number = (word.load(std::memory_order_relaxed) >> 32) + 1;
    word.store(number << 32 | uint64_t(tasks) << 16, std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst) > 0) { make_room(); ring(); }
    work(0);
    for (int round = 1; done.load(std::memory_order_acquire) < tasks; round++) {
      pause();
      if (round % 4096 == 0) sched_yield();  // whoever holds the last task may be waiting for this core
    }
  }
};

// Never freed after a fork: its threads exist in the parent only.
Pool* pool = nullptr;
int wanted = 1;
std::mutex changing;
thread_local bool inside = false;

void forget() { pool = nullptr; new (&changing) std::mutex; }

Pool* current() {
  static const int once = pthread_atfork(nullptr, nullptr, forget);
  (void)once;
  if (!pool) { pool = new Pool; pool->start(wanted); }
  return pool;
}

}  // namespace

int threads() { return wanted; }

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(changing);
  count = count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : count;
  if (count == wanted) return;
  if (pool) {
    std::lock_guard<std::mutex> idle(pool->busy);
    pool->end();
    pool = nullptr;  // not deleted: another thread may be about to try its mutex; a few hundred bytes a change
  }
  wanted = count;
}

void run(int tasks, Task task, void* context) {
  Pool* here = nullptr;
  if (tasks > 1 && wanted > 1 && !inside) {
    std::lock_guard<std::mutex> lock(changing);
    here = current();
  }
  std::unique_lock<std::mutex> mine;
  if (here) mine = std::unique_lock<std::mutex>(here->busy, std::try_to_lock);
  if (!mine.owns_lock()) {
    for (int i = 0; i < tasks; i++) task(context, i, 0);
    return;
  }
  inside = true;
  for (int first = 0; first < tasks; first += MAX_TASKS) {
    struct Part { Task task; void* context; int first; } part{task, context, first};
    const int count = tasks - first < MAX_TASKS ? tasks - first : MAX_TASKS;
    here->region(count, [](void* p, int i, int worker) { auto& q = *static_cast<Part*>(p); q.task(q.context, q.first + i, worker); }, &part);
  }
  inside = false;
}

}  // namespace lilliput
