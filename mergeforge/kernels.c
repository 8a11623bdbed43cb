/* Kernels for merging on a CPU: each takes some thousand numbers, which stay in the first cache, through everything.

   Plain C behind ctypes (native.py says what the functions are given). Compiled without contraction to fused
   multiply-adds, so that the numbers are torch's, bit for bit; where torch fuses, fmaf() stands here. On x86-64
   there is a version for every width of vectors, chosen when the library is loaded. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && !defined(__FMA__)
#error "fmaf() would be a slow function: torch does better"
#else
#define EVERY_WIDTH
#endif
/* The digest of this file, so that nobody loads what was compiled from another one. */
const char kernels_source[65] = SOURCE;

#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
enum { CHUNK = 2048, PRODUCT_CHUNK = 512 };
typedef double Doubles __attribute__((vector_size(64)));
enum { LANES = sizeof(Doubles) / sizeof(double) };

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float of_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* Exponents of float16 begin at 2^-112 of a float32's; subnormal numbers come out right by the product, too. */
INLINE float of_f16(uint16_t half) {
    float value = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(value) | infinite | (uint32_t)(half & 0x8000) << 16);
}

INLINE float number(const void *place, int64_t kind, int64_t at) {
    if (kind == F32) return ((const float *)place)[at];
    uint16_t half = ((const uint16_t *)place)[at];
    return kind == BF16 ? of_bf16(half) : of_f16(half);
}

/* A statement for each number of the chunk: one loop for each kind, so that the compiler knows it. */
#define EACH(statement)                                                                                                \
    if (kind == BF16) {                                                                                                \
        enum { KIND = BF16 };                                                                                          \
        for (int64_t i = 0; i < count; i++) statement;                                                                 \
    } else if (kind == F16) {                                                                                          \
        enum { KIND = F16 };                                                                                           \
        for (int64_t i = 0; i < count; i++) statement;                                                                 \
    } else {                                                                                                           \
        enum { KIND = F32 };                                                                                           \
        for (int64_t i = 0; i < count; i++) statement;                                                                 \
    }

/* `count` numbers from number `start` on, each less another one. */
INLINE void take(const void *place, int64_t kind, int64_t start, int64_t count, const float *less, float *into) {
    EACH(into[i] = number(place, KIND, start + i) - less[i])
}

INLINE void take_doubles(const void *place, int64_t kind, int64_t start, int64_t count, const float *less,
                         double *into) {
    EACH(into[i] = number(place, KIND, start + i) - less[i])
}

/* Adds `factor` times these numbers to the total; `fused`: products are not rounded before. */
INLINE void add(const void *place, int64_t kind, int64_t start, int64_t count, const float *less, float factor,
                int64_t fused, float *total) {
    if (fused) {
        EACH(total[i] = fmaf(number(place, KIND, start + i) - less[i], factor, total[i]))
    } else {
        EACH(total[i] += (number(place, KIND, start + i) - less[i]) * factor)
    }
}

static const float ZEROS[CHUNK];

/* The base's numbers, or zeros: a number less zero is the number. */
INLINE const float *base_of(const void *const *places, const int64_t *kinds, int64_t inputs, int64_t based,
                            int64_t start, int64_t count, float *into) {
    if (!based) return ZEROS;
    take(places[inputs], kinds[inputs], start, count, ZEROS, into);
    return into;
}

INLINE int64_t smaller(int64_t one, int64_t two) { return one < two ? one : two; }

/* base + scale * (sum of factor * (input - base)) / divisor; `fused`: products are added unrounded. */
EVERY_WIDTH void weighted_sum(const void *const *places, const int64_t *kinds, int64_t inputs, int64_t based,
                              const float *factors, int64_t fused, float divisor, float scale, int64_t length,
                              float *out) {
    float base[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = smaller(CHUNK, length - start);
        const float *less = base_of(places, kinds, inputs, based, start, count, base);
        float *total = out + start;
        for (int64_t i = 0; i < count; i++) total[i] = -0.0f; /* what changes no number that is added to it */
        for (int64_t at = 0; at < inputs; at++)
            add(places[at], kinds[at], start, count, less, factors[at], fused, total);
        if (divisor != 1)
            for (int64_t i = 0; i < count; i++) total[i] /= divisor;
        if (scale != 1)
            for (int64_t i = 0; i < count; i++) total[i] *= scale;
        if (based)
            for (int64_t i = 0; i < count; i++) total[i] += base[i];
    }
}

/* One input, less the base if it is `based`. places: the input, the base. */
EVERY_WIDTH void difference(const void *const *places, const int64_t *kinds, int64_t based, int64_t length,
                            float *out) {
    float base[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = smaller(CHUNK, length - start);
        const float *less = base_of(places, kinds, 1, based, start, count, base);
        take(places[0], kinds[0], start, count, less, out + start);
    }
}

INLINE double dot(const double *one, const double *two, int64_t count) {
    Doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t at = 0;
    for (; at + 4 * LANES <= count; at += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Doubles left, right;
            memcpy(&left, one + at + part * LANES, sizeof left);
            memcpy(&right, two + at + part * LANES, sizeof right);
            total[part] += left * right;
        }
    total[0] += total[1] + (total[2] + total[3]);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[0][lane];
    for (; at < count; at++) sum += one[at] * two[at];
    return sum;
}

/* Adds to `sums` the inner products of every input (less the base) with itself and those that follow it.
   `room`: PRODUCT_CHUNK doubles for each input. */
EVERY_WIDTH void inner_products(const void *const *places, const int64_t *kinds, int64_t inputs, int64_t based,
                                int64_t length, double *room, double *sums) {
    float base[PRODUCT_CHUNK];
    for (int64_t start = 0; start < length; start += PRODUCT_CHUNK) {
        int64_t count = smaller(PRODUCT_CHUNK, length - start), pair = 0;
        const float *less = base_of(places, kinds, inputs, based, start, count, base);
        for (int64_t at = 0; at < inputs; at++)
            take_doubles(places[at], kinds[at], start, count, less, room + at * PRODUCT_CHUNK);
        for (int64_t at = 0; at < inputs; at++)
            for (int64_t other = at; other < inputs; other++)
                sums[pair++] += dot(room + at * PRODUCT_CHUNK, room + other * PRODUCT_CHUNK, count);
    }
}
