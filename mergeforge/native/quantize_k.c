/* Q2_K to Q6_K: blocks of 256 in 8 groups of 32 or 16 groups of 16, each with an integer scale and, for Q2_K, Q4_K and
   Q5_K, an integer minimum.

   LANES blocks are taken at a time: first the groups are fitted, then the blocks' scales and minima get their levels,
   one block per lane, at last the elements get theirs for the rounded scales. */

#include "quantize.h"
#include "quantize_bits.h"
#include "quantize_search.h"

enum { BLOCK = 256 };
enum { MOST_GROUPS = 16 }; /* of a block */

/* The fits of the groups of LANES blocks, in the order of the rows. */
struct group_fits {
    float scale[MOST_GROUPS * LANES], minimum[MOST_GROUPS * LANES];
    float inverse[MOST_GROUPS * LANES], offset[MOST_GROUPS * LANES]; /* for the elements' levels */
    float weight[MOST_GROUPS * LANES];                               /* sums of the weights with importance */
};

/* Weights of LANES groups with importance: importance * sqrt(sigma2 + x * x), and their sums. sigma2 is `factor` times
   the block's mean square. `start`: position of the first group in the rows; `squares`: of the blocks from there on. */
INLINE void weigh(const lanes *restrict x_t, const float *restrict squares, float factor,
                  const float *restrict importance, int64_t columns, int64_t start, int size, lanes *restrict w,
                  float *restrict total) {
    lanes sigma2;
    transpose_importance(importance, columns, start, size, w);
    EACH_LANE(g) sigma2[g] = squares[g * size / BLOCK] * (factor / BLOCK);
    apply_importance(x_t, sigma2, size, w);
    EACH_LANE(g) total[g] = 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) total[g] += w[i][g];
}

/* The values of the blocks' groups, times `sign`, one block per lane. */
INLINE void transpose_blocks(const float *restrict value, int groups, float sign, lanes *restrict value_t) {
    for (int g = 0; g < groups; g++) EACH_LANE(b) value_t[g][b] = sign * value[b * groups + g];
}

/* The levels of a block's elements for its groups' rounded scales and minima, counted from 0. Scales and minima are
   first copied to all elements: one long loop is faster than one per group. */
INLINE void divide_by_steps(const float *restrict x, int size, const float *restrict step, const float *restrict low,
                            int bottom, int top, uint8_t *restrict level) {
    float step_of[BLOCK], low_of[BLOCK];
    for (int g = 0; g < BLOCK / size; g++)
        for (int i = 0; i < size; i++) {
            step_of[g * size + i] = step[g];
            low_of[g * size + i] = low ? low[g] : 0;
        }
    for (int i = 0; i < BLOCK; i++)
        level[i] = (uint8_t)(clamp_int(nearest_int((x[i] + low_of[i]) / step_of[i]), bottom, top) - bottom);
}

INLINE int any_zero(const float *values, int count) {
    int zeros = 0;
    for (int i = 0; i < count; i++) zeros |= values[i] == 0;
    return zeros;
}

/* ---- Scales and minima: Q2_K, Q4_K, Q5_K ---- */

struct block_scales {
    lanes step, min_step, level[MOST_GROUPS], min_level[MOST_GROUPS];
};

/* Fit the groups of `count` blocks from position `start` of the rows on. */
INLINE void fit_scale_mins(const float *restrict x, int64_t count, const float *restrict importance, int64_t columns,
                           int64_t start, int size, float factor, const struct scale_min_search *search,
                           struct group_fits *restrict fits) {
    lanes x_t[MOST_ROWS], w[MOST_ROWS], squares, mean = {0};
    int64_t groups = count * BLOCK / size;
    if (importance) sums_of_squares(x, count, BLOCK, squares);
    for (int64_t first = 0; first < groups; first += LANES) {
        struct scale_min_fit fit;
        transpose_groups(x + first * size, groups - first, size, x_t);
        if (importance) {
            weigh(x_t, squares + first * size / BLOCK, factor, importance, columns, start + first * size, size, w,
                  fits->weight + first);
        } else { /* |x| for Q2_K; for the others the root of the mean square is added */
            if (size == 32) {
                EACH_LANE(g) mean[g] = 0;
                for (int i = 0; i < size; i++) EACH_LANE(g) mean[g] += x_t[i][g] * x_t[i][g];
                EACH_LANE(g) mean[g] = sqrtf(mean[g] / 32);
            }
            for (int i = 0; i < size; i++) EACH_LANE(g) w[i][g] = mean[g] + fabsf(x_t[i][g]);
        }
        fit_scale_min(x_t, w, size, search, &fit);
        memcpy(fits->scale + first, fit.scale, sizeof fit.scale);
        memcpy(fits->minimum + first, fit.minimum, sizeof fit.minimum);
        memcpy(fits->inverse + first, fit.inverse, sizeof fit.inverse);
        memcpy(fits->offset + first, fit.offset, sizeof fit.offset);
    }
}

/* Levels of values that are not negative: value * top / largest. */
INLINE void divide_by_largest(const lanes *restrict value, int groups, int top, float *restrict step,
                              lanes *restrict level) {
    lanes largest, inverse;
    EACH_LANE(b) largest[b] = 0;
    for (int g = 0; g < groups; g++) EACH_LANE(b) largest[b] = value[g][b] > largest[b] ? value[g][b] : largest[b];
    EACH_LANE(b) {
        inverse[b] = largest[b] > 0 ? (float)top / largest[b] : 0;
        step[b] = largest[b] / (float)top;
    }
    for (int g = 0; g < groups; g++) EACH_LANE(b) {
        level[g][b] = (float)(nearest_int(inverse[b] * value[g][b]) & 0xff);
    }
}

INLINE void fit_blocks(const struct group_fits *restrict fits, int groups, int top, int weighted,
                       struct block_scales *restrict scales) {
    lanes scale[MOST_GROUPS], low[MOST_GROUPS], weight[MOST_GROUPS];
    transpose_blocks(fits->scale, groups, 1, scale);
    transpose_blocks(fits->minimum, groups, -1, low);
    if (weighted) {
        transpose_blocks(fits->weight, groups, 1, weight);
        fit_block_scales(scale, weight, groups, top, scales->step, scales->level);
        fit_block_scales(low, weight, groups, top, scales->min_step, scales->min_level);
    } else {
        divide_by_largest(scale, groups, top, scales->step, scales->level);
        divide_by_largest(low, groups, top, scales->min_step, scales->min_level);
    }
}

/* The elements' levels in block `b` for rounded scales; in groups whose scale is 0, those of the fit. */
INLINE void requantize(const float *restrict x, const struct group_fits *restrict fits, int64_t b, int size,
                       const float *restrict step, const float *restrict low, int top, int guarded,
                       uint8_t *restrict level) {
    int groups = BLOCK / size;
    divide_by_steps(x, size, step, low, 0, top, level);
    if (!any_zero(step, groups)) return;
    for (int i = 0; i < BLOCK; i++) {
        int64_t g = b * groups + i / size;
        if (step[i / size] == 0)
            level[i] = (uint8_t)scale_min_level(x[i], fits->inverse[g], fits->offset[g], top, guarded);
    }
}

/* Q2_K, 84 bytes: 16 with a scale and a minimum each, 64 with four levels each, d and dmin (half precision).
   `b`: the lane of the block. */
INLINE void store_q2_k(const float *restrict x, const struct group_fits *restrict fits,
                       const struct block_scales *restrict scales, int64_t b, int guarded, uint8_t *restrict out) {
    uint8_t level[BLOCK];
    float step[16], low[16];
    float d = store_half(out + 80, scales->step[b]), dmin = store_half(out + 82, scales->min_step[b]);
    for (int g = 0; g < 16; g++) {
        int32_t packed = ((int32_t)scales->level[g][b] | (int32_t)scales->min_level[g][b] << 4) & 0xff;
        out[g] = (uint8_t)packed;
        step[g] = d * (float)(packed & 15);
        low[g] = dmin * (float)(packed >> 4);
    }
    requantize(x, fits, b, 16, step, low, 3, guarded, level);
    pack_2bit(level, 0, out + 16);
    pack_2bit(level + 128, 0, out + 48);
}

INLINE void quantize_2bit(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                          uint8_t *restrict out) {
    const struct scale_min_search unweighted = {3, -0.5f, 0.1f, 15, 1, 0}, weighted = IMPORTANCE_SEARCH(3);
    struct group_fits fits;
    struct block_scales scales;
    memset(&fits, 0, sizeof fits);
    for (int64_t first = 0; first < blocks; first += LANES) {
        int64_t count = min_of(LANES, blocks - first);
        fit_scale_mins(x + first * BLOCK, count, importance, columns, first * BLOCK, 16, 1,
                       importance ? &weighted : &unweighted, &fits);
        fit_blocks(&fits, 16, 15, importance != 0, &scales);
        for (int64_t b = 0; b < count; b++)
            store_q2_k(x + (first + b) * BLOCK, &fits, &scales, b, importance != 0, out + (first + b) * 84);
    }
}

QUANTIZER(quantize_q2_k, quantize_2bit(x, importance, columns, blocks, out))

/* Q4_K, 144 bytes, and Q5_K, 176 bytes: d and dmin (half precision), 12 with the scales and minima (6 bits each), for
   Q5_K 32 with the levels' fifth bits, 128 with two 4-bit levels each. With importance, levels of the scales above 63
   are cut off only for Q5_K. */
INLINE void store_q45_k(const float *restrict x, const struct group_fits *restrict fits,
                        const struct block_scales *restrict scales, int64_t b, int bits, int guarded,
                        uint8_t *restrict out) {
    int32_t ls[8], lm[8], highest = guarded && bits == 4 ? 255 : 63;
    uint8_t level[BLOCK];
    float step[8], low[8];
    float d = store_half(out, scales->step[b]), dmin = store_half(out + 2, scales->min_step[b]);
    for (int g = 0; g < 8; g++) {
        ls[g] = clamp_int((int32_t)scales->level[g][b], 0, highest);
        lm[g] = clamp_int((int32_t)scales->min_level[g][b], 0, highest);
        step[g] = d * (float)ls[g];
        low[g] = dmin * (float)lm[g];
    }
    requantize(x, fits, b, 32, step, low, (1 << bits) - 1, guarded, level);
    for (int g = 0; g < 4; g++) {
        out[4 + g] = (uint8_t)(ls[g] | ls[g + 4] >> 4 << 6);
        out[8 + g] = (uint8_t)(lm[g] | lm[g + 4] >> 4 << 6);
        out[12 + g] = (uint8_t)((ls[g + 4] & 15) | (lm[g + 4] & 15) << 4);
    }
    if (bits == 5) pack_1bit(level, 4, out + 16);
    for (int k = 0; k < 4; k++) pack_4bit(level + 64 * k, 32, out + (bits == 4 ? 16 : 48) + 32 * k);
}

INLINE void quantize_4bit(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                          int bits, uint8_t *restrict out) {
    const struct scale_min_search four = {15, -1, 0.1f, 20, 0, 0}, five = {31, -0.5f, 0.1f, 15, 0, 0};
    const struct scale_min_search weighted = IMPORTANCE_SEARCH((1 << bits) - 1);
    int64_t nbytes = bits == 4 ? 144 : 176;
    struct group_fits fits;
    struct block_scales scales;
    memset(&fits, 0, sizeof fits);
    for (int64_t first = 0; first < blocks; first += LANES) {
        int64_t count = min_of(LANES, blocks - first);
        fit_scale_mins(x + first * BLOCK, count, importance, columns, first * BLOCK, 32, 2,
                       importance ? &weighted : bits == 4 ? &four : &five, &fits);
        fit_blocks(&fits, 8, 63, importance != 0, &scales);
        for (int64_t b = 0; b < count; b++)
            store_q45_k(x + (first + b) * BLOCK, &fits, &scales, b, bits, importance != 0, out + (first + b) * nbytes);
    }
}

QUANTIZER(quantize_q4_k, quantize_4bit(x, importance, columns, blocks, 4, out))
QUANTIZER(quantize_q5_k, quantize_4bit(x, importance, columns, blocks, 5, out))

/* ---- Scales alone: Q3_K, Q6_K ---- */

/* Fit the groups of `count` blocks from position `start` of the rows on, with levels -top to top - 1. The weights are
   the importance itself; with `squares`, the blocks' sums of squares, they are those of weigh(). */
INLINE void fit_scales(const float *restrict x, int64_t count, const float *restrict importance, int64_t columns,
                       int64_t start, int top, const float *restrict squares, struct group_fits *restrict fits) {
    lanes x_t[16], w[16], wx[16];
    for (int64_t first = 0; first < count * 16; first += LANES) {
        struct scale_fit fit;
        transpose_groups(x + first * 16, count * 16 - first, 16, x_t);
        if (squares)
            weigh(x_t, squares + first / 16, 2, importance, columns, start + first * 16, 16, w, fits->weight + first);
        else if (importance)
            transpose_importance(importance, columns, start + first * 16, 16, w);
        else
            multiply(x_t, x_t, 16, w);
        multiply(x_t, w, 16, wx);
        fit_scale(x_t, w, wx, 16, top, &fit);
        memcpy(fits->scale + first, fit.scale, sizeof fit.scale);
        memcpy(fits->inverse + first, fit.inverse, sizeof fit.inverse);
    }
}

/* Q3_K without importance: levels of the elements, steps and levels of the scales, counted from 0. */
INLINE void refine_blocks(const float *restrict x, int64_t count, uint8_t *restrict level, float *restrict step,
                          lanes *restrict scale_level_t) {
    float scale[16 * LANES] = {0};
    lanes x_t[16], level_t[16], scale_t[16], absmax;
    for (int64_t first = 0; first < count * 16; first += LANES) {
        transpose_groups(x + first * 16, count * 16 - first, 16, x_t);
        refine_scale(x_t, 16, 4, scale + first, level_t);
        EACH_LANE(g) for (int i = 0; i < 16; i++) level[(first + g) * 16 + i] = (uint8_t)level_t[i][g];
    }
    transpose_blocks(scale, 16, 1, scale_t);
    signed_absmax(scale_t, 16, absmax);
    for (int g = 0; g < 16; g++) EACH_LANE(b) {
        int32_t l = clamp_int(nearest_int(-32 / absmax[b] * scale_t[g][b]), -32, 31) + 32;
        scale_level_t[g][b] = absmax[b] != 0 ? (float)l : 0;
    }
    EACH_LANE(b) step[b] = absmax[b] != 0 ? 1 / (-32 / absmax[b]) : 0;
}

/* Q3_K with importance: the groups' scales are fitted as their elements are. */
INLINE void fit_weighted_blocks(const float *restrict x, int64_t count, const float *restrict importance,
                                int64_t columns, int64_t start, struct group_fits *restrict fits,
                                float *restrict step, lanes *restrict scale_level_t) {
    struct scale_fit fit;
    lanes squares, scale_t[16], w[16], wx[16];
    sums_of_squares(x, count, BLOCK, squares);
    fit_scales(x, count, importance, columns, start, 4, squares, fits);
    transpose_blocks(fits->scale, 16, 1, scale_t);
    transpose_blocks(fits->weight, 16, 1, w);
    multiply(scale_t, w, 16, wx);
    fit_scale(scale_t, w, wx, 16, 32, &fit);
    for (int g = 0; g < 16; g++) EACH_LANE(b) {
        scale_level_t[g][b] = (float)scale_level(scale_t[g][b], fit.inverse[b], 32);
    }
    memcpy(step, fit.scale, sizeof fit.scale);
}

/* Q3_K, 110 bytes: 32 with the levels' third bits, 64 with their lower two bits, 12 with the scales (6 bits each), d
   (half precision). In groups whose rounded scale is 0, the elements get the fit's level, or with `fit_level`, that.
   `b`: the lane of the block. */
INLINE void store_q3_k(const float *restrict x, float block_step, const lanes *restrict scale_level_t, int64_t b,
                       const float *restrict inverse, const uint8_t *restrict fit_level, uint8_t *restrict out) {
    uint8_t level[BLOCK];
    int32_t l[16];
    float d = store_half(out + 108, block_step), step[16];
    for (int g = 0; g < 16; g++) {
        l[g] = (int32_t)scale_level_t[g][b];
        step[g] = d * (float)(l[g] - 32);
    }
    divide_by_steps(x, 16, step, 0, -4, 3, level);
    if (any_zero(step, 16))
        for (int i = 0; i < BLOCK; i++)
            if (step[i / 16] == 0) level[i] = fit_level ? fit_level[i] : (uint8_t)scale_level(x[i], inverse[i / 16], 4);
    for (int g = 0; g < 8; g++) out[96 + g] = (uint8_t)((l[g] & 15) | (l[g + 8] & 15) << 4);
    for (int g = 0; g < 4; g++)
        out[104 + g] = (uint8_t)(l[g] >> 4 | l[g + 4] >> 4 << 2 | l[g + 8] >> 4 << 4 | l[g + 12] >> 4 << 6);
    pack_1bit(level, 2, out);
    pack_2bit(level, 0, out + 32);
    pack_2bit(level + 128, 0, out + 64);
}

INLINE void quantize_3bit(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                          uint8_t *restrict out) {
    lanes step, scale_level_t[16];
    struct group_fits fits;
    uint8_t level[LANES][BLOCK];
    memset(&fits, 0, sizeof fits);
    for (int64_t first = 0; first < blocks; first += LANES) {
        int64_t count = min_of(LANES, blocks - first), start = first * BLOCK;
        if (importance)
            fit_weighted_blocks(x + start, count, importance, columns, start, &fits, step, scale_level_t);
        else
            refine_blocks(x + start, count, level[0], step, scale_level_t);
        for (int64_t b = 0; b < count; b++)
            store_q3_k(x + start + b * BLOCK, step[b], scale_level_t, b, fits.inverse + 16 * b,
                       importance ? 0 : level[b], out + (first + b) * 110);
    }
}

QUANTIZER(quantize_q3_k, quantize_3bit(x, importance, columns, blocks, out))

/* Q6_K, 210 bytes: 128 with the levels' lower four bits, 64 with their upper two bits, 16 signed scales, d (half
   precision). A block of zeros has only bytes of zero. */
INLINE void store_q6_k(const float *restrict x, const float *restrict scale, const float *restrict inverse,
                       uint8_t *restrict out) {
    uint8_t level[BLOCK];
    float absmax = 0;
    for (int g = 0; g < 16; g++) absmax = fabsf(scale[g]) > fabsf(absmax) ? scale[g] : absmax;
    if (fabsf(absmax) < GROUP_MAX_EPS) {
        memset(out, 0, 210);
        return;
    }
    float inverse_step = -128 / absmax, d = store_half(out + 208, 1 / inverse_step), step[16];
    for (int g = 0; g < 16; g++) {
        int32_t l = nearest_int(inverse_step * scale[g]);
        l = l < 127 ? l : 127;
        out[192 + g] = (uint8_t)l;
        step[g] = d * (float)l;
    }
    divide_by_steps(x, 16, step, 0, -32, 31, level);
    if (any_zero(step, 16))
        for (int i = 0; i < BLOCK; i++)
            if (step[i / 16] == 0) level[i] = (uint8_t)scale_level(x[i], inverse[i / 16], 32);
    for (int half = 0; half < 2; half++) {
        pack_4bit(level + 128 * half, 64, out + 64 * half);
        pack_2bit(level + 128 * half, 4, out + 128 + 32 * half);
    }
}

INLINE void quantize_6bit(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                          uint8_t *restrict out) {
    struct group_fits fits;
    for (int64_t first = 0; first < blocks; first += LANES) {
        int64_t count = min_of(LANES, blocks - first);
        fit_scales(x + first * BLOCK, count, importance, columns, first * BLOCK, 32, 0, &fits);
        for (int64_t b = 0; b < count; b++)
            store_q6_k(x + (first + b) * BLOCK, fits.scale + 16 * b, fits.inverse + 16 * b, out + (first + b) * 210);
    }
}

QUANTIZER(quantize_q6_k, quantize_6bit(x, importance, columns, blocks, out))
