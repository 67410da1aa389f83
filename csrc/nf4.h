// NF4's 16 levels (QLoRA, appendix E) and their look-up, for panels (linear_float.cpp) and for frozen matrices (frozen.cpp).
#pragma once
#include "vec.h"

namespace lilliput {

alignas(64) constexpr float NF4_LEVELS[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
    0.7229568362236023f, 1.0f};

#if defined(__AVX2__) && !defined(__AVX512F__)
namespace LILLIPUT_ISA { namespace {

// Of a table of 16 in two registers: permutevar reads 3 bits of a lane, blendv the sign, to which bit 3 is moved. Higher bits do not matter.
LP_INLINE vf look_up(vf below, vf above, vi n) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, n), _mm256_permutevar8x32_ps(above, n), _mm256_castsi256_ps(_mm256_slli_epi32(n, 28)));
}

}}  // namespace LILLIPUT_ISA
#endif

}  // namespace lilliput
