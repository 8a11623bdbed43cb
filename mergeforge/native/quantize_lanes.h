/* LANES groups of elements at a time, transposed: row i of a buffer holds element i of every group.

   So a loop over the groups is vectorized, while the sums of each group are added in C's order, as ggml adds them. */

#ifndef MERGEFORGE_QUANTIZE_LANES_H
#define MERGEFORGE_QUANTIZE_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "floats.h"
#include "widths.h"

enum { LANES = 32 };     /* two AVX-512 vectors, which hide each other's latencies; 32 rows are 4 KiB */
enum { VECTOR = 16 };    /* the lanes of an AVX-512 vector */
enum { UNROLLED = 8 };   /* rows that a loop with sums takes at once: meanwhile the sums stay in registers */
enum { MOST_ROWS = 32 }; /* elements of a group */

typedef float lanes[LANES] __attribute__((aligned(64)));

#define EACH_LANE(g) for (int g = 0; g < LANES; g++)

/* Every lane for every UNROLLED rows. One loop per vector: compilers address its rows by one register. */
#define EACH_LANE_OF_ROWS(i, size, g)                       \
    for (int i = 0; i < size; i += UNROLLED)                \
        for (int first_ = 0; first_ < LANES; first_ += VECTOR) \
            for (int g = first_; g < first_ + VECTOR; g++)

#if defined(__clang__)
#define EACH_ROW(k) _Pragma("clang loop unroll(full)") for (int k = 0; k < UNROLLED; k++)
#else
#define EACH_ROW(k) _Pragma("GCC unroll 8") for (int k = 0; k < UNROLLED; k++)
#endif

#define ROUNDING_MAGIC 12582912.0f /* 1.5 * 2^23: added to a float, leaves the nearest integer in the low bits */
#define GROUP_MAX_EPS 1e-15f /* ggml's name and value; a group whose largest magnitude is below it counts as zero */

/* The nearest integer, halves to even. Equals ggml's nearest_int() outside of +-2^22 too, where that is wrong. */
INLINE int32_t nearest_int(float value) {
    return (int32_t)(bits_of(value + ROUNDING_MAGIC) & 0x7fffff) - 0x400000;
}

INLINE int32_t clamp_int(int32_t value, int32_t low, int32_t high) {
    value = value < high ? value : high;
    return value > low ? value : low;
}

/* Write a value in half precision; returns the rounded value. */
INLINE float store_half(uint8_t *out, float value) {
    uint16_t half = to_f16(value);
    memcpy(out, &half, sizeof half);
    return of_f16(half);
}

typedef float four __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(left, right, ...) __builtin_shufflevector(left, right, __VA_ARGS__)
#else
typedef int32_t four_indices __attribute__((vector_size(16)));
#define SHUFFLE(left, right, ...) __builtin_shuffle(left, right, (four_indices){__VA_ARGS__})
#endif

/* Transpose LANES groups of `size` elements, four by four, because compilers do not vectorize a transposition. */
INLINE void transpose(const float *const *restrict group, int size, lanes *restrict x_t) {
    for (int g = 0; g < LANES; g += 4)
        for (int i = 0; i < size; i += 4) {
            four a, b, c, d;
            memcpy(&a, group[g] + i, sizeof a);
            memcpy(&b, group[g + 1] + i, sizeof b);
            memcpy(&c, group[g + 2] + i, sizeof c);
            memcpy(&d, group[g + 3] + i, sizeof d);
            four ab_low = SHUFFLE(a, b, 0, 4, 1, 5), ab_high = SHUFFLE(a, b, 2, 6, 3, 7);
            four cd_low = SHUFFLE(c, d, 0, 4, 1, 5), cd_high = SHUFFLE(c, d, 2, 6, 3, 7);
            a = SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
            b = SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
            c = SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
            d = SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
            memcpy(&x_t[i][g], &a, sizeof a);
            memcpy(&x_t[i + 1][g], &b, sizeof b);
            memcpy(&x_t[i + 2][g], &c, sizeof c);
            memcpy(&x_t[i + 3][g], &d, sizeof d);
        }
}

/* Transpose up to LANES groups of `size` elements; the lanes beyond them are zero. */
INLINE void transpose_groups(const float *restrict x, int64_t groups, int size, lanes *restrict x_t) {
    const float *group[LANES];
    EACH_LANE(g) group[g] = g < groups ? x + g * size : ZEROS;
    transpose(group, size, x_t);
}

/* The importance of LANES groups from position `start` of the rows on. */
INLINE void transpose_importance(const float *restrict importance, int64_t columns, int64_t start, int size,
                                 lanes *restrict w) {
    const float *group[LANES];
    int64_t column = start % columns;
    EACH_LANE(g) {
        group[g] = importance + column;
        column = column + size < columns ? column + size : 0;
    }
    transpose(group, size, w);
}

/* The sum of x * x of each of `count` (up to LANES) vectors of `size` elements, in order; of the lanes beyond them, any
   value. Eight at a time, because more vectors may fall into the same set of the L1 cache. */
INLINE void sums_of_squares(const float *restrict x, int64_t count, int64_t size, float *restrict total) {
    for (int64_t first = 0; first < LANES; first += 8) {
        const float *vector[8];
        float sum[8] = {0};
        for (int k = 0; k < 8; k++) vector[k] = x + min_of(first + k, count - 1) * size;
        if (first < count)
            for (int64_t i = 0; i < size; i++)
                for (int k = 0; k < 8; k++) sum[k] += vector[k][i] * vector[k][i];
        memcpy(total + first, sum, sizeof sum);
    }
}

/* Turn importance into weights: importance * sqrt(sigma2 + x * x). */
INLINE void apply_importance(const lanes *restrict x, const float *restrict sigma2, int size, lanes *restrict w) {
    for (int i = 0; i < size; i++) EACH_LANE(g) w[i][g] *= sqrtf(sigma2[g] + x[i][g] * x[i][g]);
}

INLINE void multiply(const lanes *left, const lanes *right, int size, lanes *restrict product) {
    for (int i = 0; i < size; i++) EACH_LANE(g) product[i][g] = left[i][g] * right[i][g];
}

/* The first element of the largest magnitude of each group, with its sign; zero for a group of zeros. */
INLINE void signed_absmax(const lanes *restrict x, int size, float *restrict absmax) {
    EACH_LANE(g) absmax[g] = 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        absmax[g] = fabsf(x[i][g]) > fabsf(absmax[g]) ? x[i][g] : absmax[g];
    }
}

#endif
