// One source for several instruction sets. A file of vector code that defines KERNELS as its own name and includes this
// one is compiled once per level, in a namespace of its own; the level is chosen when an op is called.
//
// Each function names its target: a compiler flag for the whole file would also apply to inline functions of the
// standard library, which the linker may share with code that must run anywhere.

#include "level.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define LEVEL avx512
#define LANES 16
#define KERNEL static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define KERNEL_MEMBER inline __attribute__((always_inline, target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define ENTRY static __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#include KERNELS
#undef LEVEL
#undef LANES
#undef KERNEL
#undef KERNEL_MEMBER
#undef ENTRY

#define LEVEL avx2
#define LANES 8
#define KERNEL static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL_MEMBER inline __attribute__((always_inline, target("avx2,fma")))
#define ENTRY static __attribute__((target("avx2,fma")))
#include KERNELS
#undef LEVEL
#undef LANES
#undef KERNEL
#undef KERNEL_MEMBER
#undef ENTRY

// `name` of the level in use.
#define AT_LEVEL(name)                                               \
    (motab::level() == motab::AVX512 ? motab::avx512::name           \
     : motab::level() == motab::AVX2 ? motab::avx2::name             \
                                     : motab::baseline::name)
#else
#define AT_LEVEL(name) motab::baseline::name
#endif

#define LEVEL baseline
#define LANES 4  // SSE2 and NEON have 128 bits
#define KERNEL static inline __attribute__((always_inline))
#define KERNEL_MEMBER inline __attribute__((always_inline))
#define ENTRY static
#include KERNELS
#undef LEVEL
#undef LANES
#undef KERNEL
#undef KERNEL_MEMBER
#undef ENTRY
