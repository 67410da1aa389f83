// Checksums of blocks on their way to and from a disk (dist/arena.py), and the copy out of or into an aligned buffer in the same pass.
#pragma once
#include <cstdint>

#include "isa.h"

namespace lilliput {

struct PagesKernels {
  // Sum over the pages (4096 bytes) of `count` bytes of (2 * page + 1) times the sum of its words, mod 2^64; what is missing of the last page counts as
  // zeros. into: where the bytes are copied, or null.
  uint64_t (*sum)(const char* from, char* into, long count);
};
LILLIPUT_DISPATCH(PagesKernels, pages)

}  // namespace lilliput
