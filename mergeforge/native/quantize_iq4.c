/* IQ4_NL and IQ4_XS: 16 unevenly spaced levels. Blocks of 32, or of 256 in 8 groups with 6-bit scales.

   Bytes of an IQ4_NL block: d (half precision), 16 with two 4-bit levels each. Of an IQ4_XS block: d, 2 with the upper
   two bits of the scales, 4 with their lower four bits, 128 with two 4-bit levels each. ggml finds the nearest level by
   bisection (best_index_int8). Here the level is the number of midpoints that are not above the element. That is the
   same number, because the midpoints are exact in float32. */

#include "quantize.h"
#include "quantize_bits.h"
#include "quantize_search.h"

enum { GROUP = 32 };
enum { OFFSETS = 7 }; /* the element of the largest magnitude is tried at -127 - 7 to -127 + 7 */

/* BELOW(midpoint above, index, value) for every value but the highest, from high to low. */
#define EACH_VALUE(BELOW)                                                                                     \
    BELOW(101.0f, 14, 89) BELOW(79.0f, 13, 69) BELOW(61.0f, 12, 53) BELOW(45.5f, 11, 38) BELOW(31.5f, 10, 25) \
    BELOW(19.0f, 9, 13) BELOW(7.0f, 8, 1) BELOW(-4.5f, 7, -10) BELOW(-16.0f, 6, -22) BELOW(-28.5f, 5, -35)    \
    BELOW(-42.0f, 4, -49) BELOW(-57.0f, 3, -65) BELOW(-74.0f, 2, -83) BELOW(-93.5f, 1, -104) BELOW(-115.5f, 0, -127)

INLINE float nearest_value(float v) {
    float nearest = 113;
#define BELOW(midpoint, index, value) nearest = v < midpoint ? (float)value : nearest;
    EACH_VALUE(BELOW)
#undef BELOW
    return nearest;
}

INLINE int32_t nearest_index(float v) {
    int32_t nearest = 15; /* of NaN too, as ggml's */
#define BELOW(midpoint, index, value) nearest = v < midpoint ? index : nearest;
    EACH_VALUE(BELOW)
#undef BELOW
    return nearest;
}

/* The two values that each element can get in the search. The inverse scales that are tried reach from -120 to -134 /
   absmax, while neighboring midpoints of one sign differ by 23 % or more. So an element crosses at most one of them,
   and one comparison finds its value. */
struct value_pair {
    lanes lower[GROUP], upper[GROUP];
};

INLINE void find_values(const lanes *restrict x, const float *restrict absmax, struct value_pair *restrict pair) {
    lanes least, most;
    EACH_LANE(g) {
        least[g] = (OFFSETS - 127) / absmax[g];
        most[g] = (-OFFSETS - 127) / absmax[g];
    }
    for (int i = 0; i < GROUP; i++) EACH_LANE(g) {
        float near = least[g] * x[i][g], far = most[g] * x[i][g];
        pair->lower[i][g] = nearest_value(near < far ? near : far);
        pair->upper[i][g] = nearest_value(near < far ? far : near);
    }
}

/* The sums of weight * value * x and of weight * value * value. */
INLINE void add_values(const lanes *restrict x, const lanes *restrict w, const struct value_pair *restrict pair,
                       const float *restrict inverse, float *restrict sum_qx, float *restrict sum_q2) {
    EACH_LANE(g) sum_qx[g] = sum_q2[g] = 0;
    EACH_LANE_OF_ROWS(i, GROUP, g) {
        float qx = sum_qx[g], q2 = sum_q2[g], twice = 2 * inverse[g];
        EACH_ROW(k) {
            float lower = pair->lower[i + k][g], upper = pair->upper[i + k][g];
            float q = twice * x[i + k][g] >= lower + upper ? upper : lower; /* compared with the midpoint */
            float product = w[i + k][g] * q;
            qx += product * x[i + k][g];
            q2 += product * q;
        }
        sum_qx[g] = qx;
        sum_q2[g] = q2;
    }
}

/* The same sums with the nearest of all values. */
INLINE void add_nearest_values(const lanes *restrict x, const lanes *restrict w, const float *restrict inverse,
                               float *restrict sum_qx, float *restrict sum_q2) {
    EACH_LANE(g) sum_qx[g] = sum_q2[g] = 0;
    for (int i = 0; i < GROUP; i++) EACH_LANE(g) {
        float q = nearest_value(inverse[g] * x[i][g]), product = w[i][g] * q;
        sum_qx[g] += product * x[i][g];
        sum_q2[g] += product * q;
    }
}

/* The scale of every group with the smallest weighted error. */
INLINE void fit_values(const lanes *restrict x, const lanes *restrict w, float *restrict scale) {
    struct value_pair pair;
    lanes absmax, best, inverse, qx, q2;
    signed_absmax(x, GROUP, absmax);
    EACH_LANE(g) inverse[g] = 1 / (absmax[g] / 127); /* the only one with this sign */
    add_nearest_values(x, w, inverse, qx, q2);
    EACH_LANE(g) {
        scale[g] = q2[g] > 0 ? qx[g] / q2[g] : 0;
        best[g] = scale[g] * qx[g];
    }
    find_values(x, absmax, &pair);
    for (int offset = -OFFSETS; offset <= OFFSETS; offset++) {
        EACH_LANE(g) inverse[g] = (float)(offset - 127) / absmax[g];
        add_values(x, w, &pair, inverse, qx, q2);
        EACH_LANE(g) {
            float new_scale = qx[g] / q2[g];
            int better = (q2[g] > 0) & (qx[g] * qx[g] > best[g] * q2[g]);
            scale[g] = better ? new_scale : scale[g];
            best[g] = better ? new_scale * qx[g] : best[g];
        }
    }
    EACH_LANE(g) scale[g] = fabsf(absmax[g]) < GROUP_MAX_EPS ? 0 : scale[g];
}

INLINE float inverse_of(float value) { return value != 0 ? 1 / value : 0; }

INLINE void store_levels(const float *restrict x, float inverse, uint8_t *restrict out) {
    uint8_t level[GROUP];
    for (int i = 0; i < GROUP; i++) level[i] = (uint8_t)nearest_index(inverse * x[i]);
    pack_4bit(level, 16, out);
}

INLINE void store_iq4_nl(const float *restrict x, float scale, uint8_t *restrict out) {
    store_half(out, scale);
    store_levels(x, inverse_of(scale), out + 2);
}

INLINE void store_iq4_xs(const float *restrict x, const float *restrict scale, uint8_t *restrict out) {
    float absmax = 0;
    for (int g = 0; g < 8; g++) absmax = fabsf(scale[g]) > fabsf(absmax) ? scale[g] : absmax;
    float d = -absmax / 32;
    store_half(out, d);
    memset(out + 2, 0, 6);
    for (int g = 0; g < 8; g++) {
        int32_t level = clamp_int(nearest_int(inverse_of(d) * scale[g]), -32, 31);
        store_levels(x + GROUP * g, inverse_of(d * (float)level), out + 8 + 16 * g);
        out[2 + g / 4] |= (uint8_t)((level + 32) >> 4 << (2 * (g % 4)));
        out[4 + g / 2] |= (uint8_t)(((level + 32) & 15) << (4 * (g % 2)));
    }
}

INLINE void quantize(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                     int block, uint8_t *restrict out) {
    int64_t groups = block / GROUP, batch = LANES / groups, nbytes = block == GROUP ? 18 : 136;
    for (int64_t first = 0; first < blocks; first += batch) {
        int64_t count = min_of(batch, blocks - first);
        const float *values = x + first * block;
        lanes x_t[GROUP], w[GROUP], scale, squares, sigma2;
        transpose_groups(values, count * groups, GROUP, x_t);
        if (importance) {
            transpose_importance(importance, columns, first * block, GROUP, w);
            sums_of_squares(values, count, block, squares);
            EACH_LANE(g) sigma2[g] = squares[g / groups] * (2.0f / (float)block);
            apply_importance(x_t, sigma2, GROUP, w);
        } else {
            multiply(x_t, x_t, GROUP, w);
        }
        fit_values(x_t, w, scale);
        for (int64_t b = 0; b < count; b++) {
            if (block == GROUP)
                store_iq4_nl(values + b * block, scale[b], out + (first + b) * nbytes);
            else
                store_iq4_xs(values + b * block, scale + b * groups, out + (first + b) * nbytes);
        }
    }
}

QUANTIZER(quantize_iq4_nl, quantize(x, importance, columns, blocks, GROUP, out))
QUANTIZER(quantize_iq4_xs, quantize(x, importance, columns, blocks, 256, out))
