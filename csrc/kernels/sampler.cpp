#include "sampler.h"

#include "vec.h"

namespace lilliput {
namespace LILLIPUT_ISA { namespace {

// The sum runs in W fp32 chains over stretches of 4096 numbers, which are added in fp64: an error of 1e-7, the same in any batch.
void survey(const float* x, int count, float* largest, int32_t* at, double* total) {
  vf most = set1(-__builtin_inff());
  int i = 0;
  for (; i + W <= count; i += W) most = max(most, load(x + i));
  float top = hmax(most);
  for (; i < count; i++) top = x[i] > top ? x[i] : top;
  int32_t first = 0;
  while (first < count && x[first] != top) first++;
  double sums = 0;
  for (int begin = 0; begin < count; begin += 4096) {
    const int end = begin + 4096 < count ? begin + 4096 : count;
    vf part = zero();
    int k = begin;
    for (; k + W <= end; k += W) part = part + exp(load(x + k) - set1(top)) + (load(x + k) - load(x + k));  // a NaN or infinity anywhere spoils the sum
    float rest = 0;
    for (; k < end; k++) rest += __builtin_expf(x[k] - top) + (x[k] - x[k]);
    sums += double(sum(part)) + double(rest);
  }
  *largest = top;
  *at = first < count ? first : 0;
  *total = double(top) + __builtin_log(sums);
}

void weights(const float* x, int count, float top, float scale, float* to) {
  int i = 0;
  for (; i + W <= count; i += W) store(to + i, exp((load(x + i) - set1(top)) * set1(scale)));
  for (; i < count; i++) to[i] = __builtin_expf((x[i] - top) * scale);
}

}}  // namespace LILLIPUT_ISA

extern const SamplerKernels LILLIPUT_TABLE(sampler) = {LILLIPUT_ISA::survey, LILLIPUT_ISA::weights};

}  // namespace lilliput
