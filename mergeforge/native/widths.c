/* The vector width of this processor. */

#include "widths.h"

enum vector_width vector_width = BASELINE;

void detect_vector_width(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
    vector_width = avx512 ? AVX512 : avx2 ? AVX2 : BASELINE;
#endif
}
