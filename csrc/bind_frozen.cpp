// Layouts are those of ops/nf4.py and ops/q4.py: what the doubled scales need in fp32 first, then the numbers, then int8.
#include "bind.h"
#include "frozen.h"
#include "pool.h"

using namespace lilliput;

namespace {

constexpr long TASK = 256;  // blocks: at most 64 KiB out

long steps(long blocks) { return (blocks + SECOND - 1) / SECOND; }

}  // namespace

void bind_frozen(nb::module_& m) {
  m.def("nf4_decode", [](Address stored, long blocks, bool doubled, Address out) {
    const float* wide = at<float>(stored);
    const long count = doubled ? steps(blocks) + 1 : blocks;
    const uint8_t* numbers = at<uint8_t>(stored) + 4 * count;
    const auto* q = reinterpret_cast<const int8_t*>(numbers + blocks * (NF4_BLOCK / 2));
    const Nf4Matrix matrix{{doubled ? nullptr : wide, q, wide, doubled ? wide[count - 1] : 0.0f}, numbers};
    parallel_ranges(blocks, TASK, [&](long from, long to) { frozen().nf4(matrix, at<float>(out), from, to); });
  }, Released());
  m.def("q4_decode", [](Address stored, long blocks, bool doubled, Address out) {
    const float* wide = at<float>(stored);  // [steps of scales][mean][steps of offsets][mean]
    const uint16_t* half = at<uint16_t>(stored);
    const long count = steps(blocks) + 1;
    const uint8_t* numbers = at<uint8_t>(stored) + (doubled ? 8 * count : 4 * blocks);
    const auto* q = reinterpret_cast<const int8_t*>(numbers + blocks * (Q4_BLOCK / 2));
    const Q4Matrix matrix{{doubled ? nullptr : half, q, wide, doubled ? wide[count - 1] : 0.0f},
                          {doubled ? nullptr : half + blocks, q + blocks, wide + count, doubled ? wide[2 * count - 1] : 0.0f}, numbers};
    parallel_ranges(blocks, TASK, [&](long from, long to) { frozen().q4(matrix, at<float>(out), from, to); });
  }, Released());
}
