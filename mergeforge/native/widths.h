/* One compiled version of a kernel per vector width, chosen when the library is loaded.

   The body of a kernel is an always-inline function `NAME_body`. EVERY_WIDTH(type, NAME, (parameters), (arguments))
   defines NAME: on x86-64 the body is compiled for AVX-512, for AVX2 with FMA and for the baseline, and NAME calls the
   version that the processor supports. It needs no ifunc, so it works with gcc and clang, glibc, musl and macOS alike.
   Every version gives the same bytes. */

#ifndef MERGEFORGE_WIDTHS_H
#define MERGEFORGE_WIDTHS_H

#define INLINE static inline __attribute__((always_inline))

enum vector_width { BASELINE, AVX2, AVX512 };

/* The vector width that kernels use; set by detect_vector_width(), lowered by tests. */
extern enum vector_width vector_width;

void detect_vector_width(void);

#if defined(__x86_64__)
#define TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")))
#define TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt")))
#define EVERY_WIDTH(type, name, parameters, arguments)                                   \
    TARGET_AVX512 static type name##_avx512 parameters { return name##_body arguments; } \
    TARGET_AVX2 static type name##_avx2 parameters { return name##_body arguments; }     \
    static type name##_baseline parameters { return name##_body arguments; }             \
    type name parameters {                                                               \
        if (vector_width == AVX512) return name##_avx512 arguments;                      \
        if (vector_width == AVX2) return name##_avx2 arguments;                          \
        return name##_baseline arguments;                                                \
    }
#else
#define EVERY_WIDTH(type, name, parameters, arguments) \
    type name parameters { return name##_body arguments; }
#endif

#endif
