// Which instruction set to use: asked once from the CPU and the operating system, changed only by set_level (tests, LILLIPUT_ISA).
#include <atomic>

#include "isa.h"

namespace lilliput {

Level best_level() {
#if defined(LILLIPUT_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return avx512 ? AVX512 : avx2 ? AVX2 : SCALAR;
#else
  return SCALAR;
#endif
}

static std::atomic<int> chosen{-1};

Level level() {
  int at = chosen.load(std::memory_order_relaxed);
  if (at < 0) chosen.store(at = best_level(), std::memory_order_relaxed);
  return Level(at);
}

bool set_level(int to) {
  if (to < SCALAR || to > best_level()) return false;
  chosen.store(to, std::memory_order_relaxed);
  return true;
}

}  // namespace lilliput
