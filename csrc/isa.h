// One kernel source, several instruction sets. Every file of kernels/ is compiled once for each level (see CMakeLists.txt) with
// LILLIPUT_ISA = scalar | avx2 | avx512, inside a namespace of that name, and exports one table of function pointers:
//
//     LILLIPUT_KERNEL_BEGIN ... LILLIPUT_KERNEL_END        // kernels/norm.cpp: the code
//     extern const NormKernels LILLIPUT_TABLE(norm) = {...}; // norm_avx2
//     LILLIPUT_DISPATCH(NormKernels, norm)                 // norm.h: norm() is the table of the chosen level
//
// Trap: no STL and no inline function outside this namespace in kernels/: the linker keeps one copy of an inline function, and
// if that is the AVX-512 one, older machines crash.
#pragma once

#define LILLIPUT_CAT_(a, b) a##_##b
#define LILLIPUT_CAT(a, b) LILLIPUT_CAT_(a, b)
#define LILLIPUT_TABLE(name) LILLIPUT_CAT(name, LILLIPUT_ISA)

#define LILLIPUT_KERNEL_BEGIN namespace lilliput { namespace LILLIPUT_ISA { namespace {
#define LILLIPUT_KERNEL_END }}}

namespace lilliput {

enum Level : int { SCALAR = 0, AVX2 = 1, AVX512 = 2 };  // AVX512 needs F, BW, DQ, VL and VNNI

Level level();          // the chosen one: the best that the machine has, or what set_level asked for
Level best_level();     // what this machine can run
bool set_level(int to); // false when the machine cannot run it

}  // namespace lilliput

#if defined(LILLIPUT_X86)
#define LILLIPUT_DISPATCH(Type, name)                                          \
  extern const Type name##_scalar, name##_avx2, name##_avx512;                 \
  static inline const Type& name() {                                           \
    const Level at = level();                                                  \
    return at == AVX512 ? name##_avx512 : at == AVX2 ? name##_avx2 : name##_scalar; \
  }
#else
#define LILLIPUT_DISPATCH(Type, name) \
  extern const Type name##_scalar;    \
  static inline const Type& name() { return name##_scalar; }
#endif
