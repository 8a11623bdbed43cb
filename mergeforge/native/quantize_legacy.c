/* Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 with one scale; the _1 types also have a minimum.

   Bytes of a block: d and, for _1, the minimum (half precision); for 5 bits, 4 bytes with the fifth bits; 16 bytes with
   two 4-bit levels each, or 32 signed bytes (Q8_0). With an importance vector ggml searches for the scale, except for
   Q8_0's. Without one it takes the scale from the block's range or largest element. */

#include "quantize.h"
#include "quantize_bits.h"
#include "quantize_search.h"

enum { BLOCK = 32 };

INLINE int64_t nbytes_of(int bits, int with_min) { return (with_min ? 4 : 2) + (bits == 5 ? 20 : 16); }

INLINE void store_block(float d, float minimum, const uint8_t *restrict level, int bits, int with_min,
                        uint8_t *restrict out) {
    store_half(out, d);
    out += 2;
    if (with_min) {
        store_half(out, minimum);
        out += 2;
    }
    if (bits == 5) {
        for (int k = 0; k < 4; k++) out[k] = gather_bits(level + 8 * k, 4);
        out += 4;
    }
    pack_4bit(level, 16, out);
}

/* ---- Without importance ---- */

/* The bits of the largest magnitude. As integers, because a maximum of floats is not vectorized. */
INLINE uint32_t largest_magnitude(const float *x) {
    int32_t largest = 0;
    for (int i = 0; i < BLOCK; i++) {
        int32_t bits = (int32_t)magnitude(x[i]);
        largest = bits > largest ? bits : largest;
    }
    return (uint32_t)largest;
}

/* The first element of the largest magnitude, with its sign. */
INLINE float first_absmax(const float *x) {
    uint32_t largest = largest_magnitude(x);
    if (largest == 0) return 0;
    int i = 0;
    while (magnitude(x[i]) != largest) i++;
    return x[i];
}

/* A float's bits as an integer that orders as the floats do, except that -0 is below 0; its own inverse. */
INLINE int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

/* The smallest element (the first one if it is zero) and the largest. */
INLINE float min_max(const float *restrict x, float *restrict high) {
    int32_t lowest = INT32_MAX, highest = INT32_MIN;
    for (int i = 0; i < BLOCK; i++) {
        int32_t key = ordered((int32_t)bits_of(x[i]));
        lowest = key < lowest ? key : lowest;
        highest = key > highest ? key : highest;
    }
    *high = float_of((uint32_t)ordered(highest));
    float low = float_of((uint32_t)ordered(lowest));
    for (int i = 0; low == 0 && i < BLOCK; i++)
        if (x[i] == 0) return x[i];
    return low;
}

INLINE void truncate_levels(const float *restrict x, float low, float d, float shift, int top,
                            uint8_t *restrict level) {
    float inverse = d != 0 ? 1 / d : 0;
    if (!(fabsf(inverse) < INFINITY && fabsf(d) < INFINITY)) { /* what C's conversion of infinity and NaN gives */
        memset(level, 0, BLOCK);
        return;
    }
    for (int i = 0; i < BLOCK; i++) {
        int32_t q = (int32_t)((x[i] - low) * inverse + shift);
        level[i] = (uint8_t)(q < top ? q : top);
    }
}

INLINE void quantize_range(const float *restrict x, int bits, int with_min, uint8_t *restrict out) {
    int top = (1 << bits) - 1, half = 1 << (bits - 1);
    uint8_t level[BLOCK];
    float d, low = 0, high;
    if (with_min) {
        low = min_max(x, &high);
        d = (high - low) / (float)top;
        truncate_levels(x, low, d, 0.5f, top, level);
    } else {
        d = first_absmax(x) / (float)-half;
        truncate_levels(x, 0, d, (float)half + 0.5f, top, level);
    }
    store_block(d, low, level, bits, with_min, out);
}

/* ---- With importance ---- */

/* LANES blocks from position `start` of rows on; `mean`: the mean square of each row. */
INLINE void search_blocks(const float *restrict x, int64_t start, int64_t count, const float *restrict mean,
                          int64_t rows, const float *restrict importance, int64_t columns, int bits, int with_min,
                          uint8_t *restrict out) {
    const struct scale_min_search search = IMPORTANCE_SEARCH((1 << bits) - 1);
    int half = 1 << (bits - 1);
    lanes x_t[BLOCK], w[BLOCK], wx[BLOCK], sigma2;
    struct scale_min_fit min_fit;
    struct scale_fit fit;
    transpose_groups(x, count, BLOCK, x_t);
    transpose_importance(importance, columns, start, BLOCK, w);
    EACH_LANE(g) sigma2[g] = mean[min_of((start + BLOCK * g) / columns, rows - 1)];
    apply_importance(x_t, sigma2, BLOCK, w);
    if (with_min) {
        fit_scale_min(x_t, w, BLOCK, &search, &min_fit);
    } else {
        multiply(x_t, w, BLOCK, wx);
        fit_scale(x_t, w, wx, BLOCK, half, &fit);
    }
    for (int64_t b = 0; b < count; b++, x += BLOCK, out += nbytes_of(bits, with_min)) {
        uint8_t level[BLOCK];
        if (with_min) {
            float inverse = min_fit.inverse[b], offset = min_fit.offset[b];
            for (int i = 0; i < BLOCK; i++) level[i] = (uint8_t)scale_min_level(x[i], inverse, offset, search.top, 1);
            store_block(min_fit.scale[b], min_fit.minimum[b], level, bits, with_min, out);
        } else {
            float inverse = fit.inverse[b];
            for (int i = 0; i < BLOCK; i++) level[i] = (uint8_t)scale_level(x[i], inverse, half);
            store_block(fit.scale[b], 0, level, bits, with_min, out);
        }
    }
}

/* LANES rows or fewer. */
INLINE void search_rows(const float *restrict x, int64_t rows, const float *restrict importance, int64_t columns,
                        int bits, int with_min, uint8_t *restrict out) {
    lanes mean;
    sums_of_squares(x, rows, columns, mean);
    EACH_LANE(row) mean[row] /= (float)columns;
    for (int64_t start = 0; start < rows * columns; start += LANES * BLOCK)
        search_blocks(x + start, start, min_of(LANES, (rows * columns - start) / BLOCK), mean, rows, importance,
                      columns, bits, with_min, out + start / BLOCK * nbytes_of(bits, with_min));
}

INLINE void quantize(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                     int bits, int with_min, uint8_t *restrict out) {
    int64_t nbytes = nbytes_of(bits, with_min);
    if (!importance) {
        for (int64_t b = 0; b < blocks; b++) quantize_range(x + b * BLOCK, bits, with_min, out + b * nbytes);
        return;
    }
    int64_t rows = blocks * BLOCK / columns;
    for (int64_t row = 0; row < rows; row += LANES)
        search_rows(x + row * columns, min_of(LANES, rows - row), importance, columns, bits, with_min,
                    out + row * columns / BLOCK * nbytes);
}

QUANTIZER(quantize_q4_0, quantize(x, importance, columns, blocks, 4, 0, out))
QUANTIZER(quantize_q4_1, quantize(x, importance, columns, blocks, 4, 1, out))
QUANTIZER(quantize_q5_0, quantize(x, importance, columns, blocks, 5, 0, out))
QUANTIZER(quantize_q5_1, quantize(x, importance, columns, blocks, 5, 1, out))

/* ---- Q8_0 ---- */

#define BELOW_HALF 0.49999997f /* the float before 0.5: truncating x + it rounds as roundf(), halves away from zero */

INLINE void quantize_bytes(const float *restrict x, uint8_t *restrict out) {
    float d = float_of(largest_magnitude(x)) / 127, inverse = d != 0 ? 1 / d : 0;
    store_half(out, d);
    if (!(inverse < INFINITY && d < INFINITY)) { /* what C's conversion of infinity and NaN gives */
        memset(out + 2, 0, BLOCK);
        return;
    }
    for (int i = 0; i < BLOCK; i++) {
        float value = x[i] * inverse;
        out[2 + i] = (uint8_t)(int32_t)(value + copysignf(BELOW_HALF, value));
    }
}

QUANTIZER(quantize_q8_0, for (int64_t b = 0; b < blocks; b++) quantize_bytes(x + b * BLOCK, out + b * 34))
