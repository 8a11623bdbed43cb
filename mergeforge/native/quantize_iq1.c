/* IQ1_S and IQ1_M: three values, -1, 0 and 1, all shifted by 1/8 up or down, on a grid of eight. Groups of 32 with one
   shift, or of 16 with one for each half; 3-bit scales.

   Sorted values are split into three runs at any two places; sums up to each place give the scale and error of every
   split. ggml compares one after another with the best so far, and rounding matters. Here they are computed a vector at
   a time, and only those near the best are compared in its order. */

#include "quantize.h"
#include "quantize_grid.h"

#include <float.h>

enum { BLOCK = 256, PLACES = 33 }; /* of a group of 32 */

#define SHIFT 0.125f

static const float shifted[2][3] = {{-1 + SHIFT, SHIFT, 1 + SHIFT}, {-1 - SHIFT, -SHIFT, 1 - SHIFT}};

/* Sums up to each place; beyond the last one NaN, which is no better than anything. */
typedef float sums[PLACES + STEP];

struct split {
    int first, second; /* places; below 0: none */
    int shifts;        /* which shift the group, or each half, has */
    float scale, score;
};

/* STEP splits with the same first place, each with up to four shifts: sums of weight * x * value and of weight *
   value^2. */
struct split_vector {
    int first, second; /* of the first split */
    floats qx[4], q2[4];
};

/* The largest qx^2 / q2 so far, in each lane. */
struct largest_ratio {
    floats qx2, q2;
};

/* The elements in ascending order; equal ones keep theirs, as in the C library that ggml is compiled with. */
INLINE void sort(const float *restrict x, int size, int *restrict order) {
    int rank[32] = {0};
    for (int j = 0; j < size; j++)
        for (int i = 0; i < size; i++) rank[i] += (x[j] < x[i]) | ((x[j] == x[i]) & (j < i));
    for (int i = 0; i < size; i++) order[i] = i; /* NaN leaves places */
    for (int i = 0; i < size; i++) order[rank[i]] = i;
}

INLINE void keep_better(float qx, float q2, int first, int second, int shifts, struct split *restrict best) {
    if (!(q2 > 0 && qx * qx > best->score * q2)) return;
    best->scale = qx / q2;
    best->score = best->scale * qx;
    best->first = first, best->second = second, best->shifts = shifts;
}

INLINE void raise_ratio(const floats *restrict qx, const floats *restrict q2, struct largest_ratio *restrict largest) {
    floats qx2 = *qx * *qx;
    integers larger = qx2 * largest->q2 > largest->qx2 * *q2;
    largest->qx2 = (floats)(((integers)qx2 & larger) | ((integers)largest->qx2 & ~larger));
    largest->q2 = (floats)(((integers)*q2 & larger) | ((integers)largest->q2 & ~larger));
}

/* The ratio from which on splits are compared one by one: 0.999 of the largest, because a comparison is wrong by less
   than 2^-21 and at most 1122 splits follow each other. Below all of them if sums underflow or overflow: q2 is between
   total / 64 and 1.3 * total. */
INLINE float lowest_ratio(const struct largest_ratio *restrict largest, int shift_count, float total) {
    float ratio = 0;
    for (int shifts = 0; shifts < shift_count; shifts++)
        for (int g = 0; g < STEP; g++) {
            float other = largest[shifts].qx2[g] / largest[shifts].q2[g];
            ratio = other > ratio ? other : ratio;
        }
    int exact = ratio > 1e-15f && ratio < 1e15f && total > 1e-15f && total < 1e15f;
    return exact ? 0.999f * ratio : -INFINITY;
}

/* Whether any split of a vector has at least this ratio. */
INLINE int any_above(const struct split_vector *restrict vector, int shift_count, float lowest) {
    integers above = {0};
    uint64_t words[4];
    for (int shifts = 0; shifts < shift_count; shifts++)
        above |= vector->qx[shifts] * vector->qx[shifts] >= vector->q2[shifts] * lowest;
    memcpy(words, &above, sizeof words);
    return (words[0] | words[1] | words[2] | words[3]) != 0;
}

/* The best split as ggml finds it, which takes one after another. */
INLINE void find_best(const struct split_vector *restrict vector, int vectors, int shift_count, float lowest,
                      struct split *restrict best) {
    for (int v = 0; v < vectors; v++) {
        const struct split_vector *own = vector + v;
        if (!any_above(own, shift_count, lowest)) continue;
        for (int g = 0; g < STEP; g++)
            for (int shifts = 0; shifts < shift_count; shifts++) {
                float qx = own->qx[shifts][g], q2 = own->q2[shifts][g];
                if (qx * qx >= lowest * q2) keep_better(qx, q2, own->first, own->second + g, shifts, best);
            }
    }
}

/* ---- Splits of IQ1_S ---- */

INLINE void find_split(const float *restrict x, const float *restrict w, struct split *restrict best) {
    struct split_vector vector[85];
    struct largest_ratio largest[2] = {{{0}, {0}}, {{0}, {0}}};
    int vectors = 0;
    for (int shift = 0; shift < 2; shift++) largest[shift].q2 += 1;
    for (int first = 0; first <= 32; first++)
        for (int second = first; second <= 32; second += STEP) {
            struct split_vector *own = vector + vectors++;
            floats x2, w2;
            own->first = first, own->second = second;
            memcpy(&x2, x + second, sizeof x2);
            memcpy(&w2, w + second, sizeof w2);
            for (int shift = 0; shift < 2; shift++) {
                const float *value = shifted[shift];
                own->qx[shift] = x[first] * value[0] + (x2 - x[first]) * value[1] + (x[32] - x2) * value[2];
                own->q2[shift] = w[first] * value[0] * value[0] + (w2 - w[first]) * value[1] * value[1] +
                                 (w[32] - w2) * value[2] * value[2];
                raise_ratio(own->qx + shift, own->q2 + shift, largest + shift);
            }
        }
    find_best(vector, vectors, 2, lowest_ratio(largest, 2, w[32]), best);
}

/* ---- Splits of IQ1_M ---- */

/* Of one half: the sums for each shift, as ggml simplifies them. */
INLINE void add_half_splits(const float *restrict x, const float *restrict w, int first, int second,
                            floats *restrict qx, floats *restrict q2) {
    floats x2, w2;
    memcpy(&x2, x + second, sizeof x2);
    memcpy(&w2, w + second, sizeof w2);
    for (int shift = 0; shift < 2; shift++) {
        const float *value = shifted[shift];
        float low = value[0] * value[0] - value[1] * value[1], high = value[1] * value[1] - value[2] * value[2];
        qx[shift] = x[16] * value[2] - (x[first] + x2);
        q2[shift] = w[16] * value[2] * value[2] + w[first] * low + w2 * high;
    }
}

/* Shifts 0 to 3: up and up, up and down, down and up, down and down. */
INLINE void find_half_split(const sums *restrict x, const sums *restrict w, struct split *restrict best) {
    struct split_vector vector[27];
    struct largest_ratio largest[4] = {{{0}, {0}}, {{0}, {0}}, {{0}, {0}}, {{0}, {0}}};
    int vectors = 0;
    for (int shifts = 0; shifts < 4; shifts++) largest[shifts].q2 += 1;
    for (int first = 0; first <= 16; first++)
        for (int second = first; second <= 16; second += STEP) {
            struct split_vector *own = vector + vectors++;
            floats qx[2][2], q2[2][2];
            own->first = first, own->second = second;
            for (int half = 0; half < 2; half++) add_half_splits(x[half], w[half], first, second, qx[half], q2[half]);
            for (int shifts = 0; shifts < 4; shifts++) {
                own->qx[shifts] = qx[0][shifts / 2] + qx[1][shifts % 2];
                own->q2[shifts] = q2[0][shifts / 2] + q2[1][shifts % 2];
                raise_ratio(own->qx + shifts, own->q2 + shifts, largest + shifts);
            }
        }
    find_best(vector, vectors, 4, lowest_ratio(largest, 4, w[0][16] + w[1][16]), best);
}

/* ---- Groups ---- */

struct group_1bit {
    float scale;
    int shifts;
    uint16_t point[4];
};

/* The shift of a part of eight: of IQ1_M, each half has its own. */
INLINE int shift_of(int shifts, int size, int part) { return size == 32 ? shifts : part ? shifts % 2 : shifts / 2; }

INLINE void add_sums(const float *restrict x, const float *restrict w, const int *restrict order, int size,
                     sums *restrict sum_of_x, sums *restrict sum_of_w) {
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < PLACES + STEP; i++) sum_of_x[half][i] = sum_of_w[half][i] = NAN;
        sum_of_x[half][0] = sum_of_w[half][0] = 0;
    }
    for (int j = 0; j < size; j++) {
        int i = order[j], half = size == 16 && i >= 8;
        sum_of_x[half][j + 1] = sum_of_x[half][j] + w[i] * x[i];
        sum_of_w[half][j + 1] = sum_of_w[half][j] + w[i];
        sum_of_x[!half][j + 1] = sum_of_x[!half][j];
        sum_of_w[!half][j + 1] = sum_of_w[!half][j];
    }
}

/* Replace levels that are no point by the nearest neighbor. */
INLINE int32_t move_to_grid(const float *restrict x, const float *restrict w, float scale, float lowest, int32_t code,
                            int *restrict on_grid) {
    const struct grid_place *place = place_of(&iq1_grid, (uint32_t)code);
    if (!place->count) return code;
    *on_grid = 0;
    return nearest_neighbor(&iq1_grid, place, x, w, scale, 1, lowest);
}

/* The scale of points; with none, the one of the split. */
INLINE float scale_of_points(const float *restrict x, const float *restrict w, int size, int shifts,
                             const int32_t *restrict code, float scale) {
    float qx = 0, q2 = 0;
    for (int i = 0; i < size; i++) {
        float q = shifted[shift_of(shifts, size, i / 8)][code[i / 8] >> 2 * (i % 8) & 3];
        qx += w[i] * q * x[i];
        q2 += w[i] * q * q;
    }
    return qx > 0 && q2 > 0 ? qx / q2 : scale;
}

/* The levels of the split, as codes of the parts. A negative scale turns them and the shifts around. */
INLINE void take_levels(struct split *restrict split, const int *restrict order, int size, int32_t *restrict code) {
    int turned = split->scale < 0;
    for (int k = 0; k < size / 8; k++) code[k] = 0;
    for (int j = 0; j < size; j++) {
        int level = (j >= split->first) + (j >= split->second);
        code[order[j] / 8] |= (turned ? 2 - level : level) << 2 * (order[j] % 8);
    }
    if (!turned) return;
    split->scale = -split->scale;
    split->shifts = (size == 32 ? 1 : 3) - split->shifts;
}

INLINE void fit_group(const float *restrict x, const float *restrict w, int size, float smallest,
                      struct group_1bit *restrict group) {
    float largest = fabsf(x[0]);
    sums sum_of_x[2], sum_of_w[2];
    int order[32], on_grid = 1;
    int32_t code[4];
    memset(group, 0, sizeof *group);
    for (int i = 1; i < size; i++) largest = largest > fabsf(x[i]) ? largest : fabsf(x[i]);
    if (largest < smallest) return;
    struct split split = {-1, -1, 0, largest, -FLT_MAX};
    sort(x, size, order);
    add_sums(x, w, order, size, sum_of_x, sum_of_w);
    if (size == 32)
        find_split(sum_of_x[0], sum_of_w[0], &split);
    else
        find_half_split(sum_of_x, sum_of_w, &split);
    if (split.first < 0) return;
    take_levels(&split, order, size, code);
    for (int k = 0; k < size / 8; k++)
        code[k] = move_to_grid(x + 8 * k, w + 8 * k, split.scale, shifted[shift_of(split.shifts, size, k)][0],
                               code[k], &on_grid);
    group->scale = on_grid ? split.scale : scale_of_points(x, w, size, split.shifts, code, split.scale);
    group->shifts = split.shifts;
    for (int k = 0; k < size / 8; k++) group->point[k] = place_of(&iq1_grid, (uint32_t)code[k])->point;
}

/* The weights of a block; sigma2 is twice its mean square. */
INLINE void weigh(const float *restrict x, const float *restrict importance, float *restrict w) {
    float squares = 0;
    for (int i = 0; i < BLOCK; i++) squares += x[i] * x[i];
    float sigma2 = 2 * squares / BLOCK;
    for (int i = 0; i < BLOCK; i++) w[i] = importance ? importance[i] * sqrtf(sigma2 + x[i] * x[i]) : x[i] * x[i];
}

INLINE float largest_scale(const struct group_1bit *restrict group, int groups) {
    float largest = 0;
    for (int g = 0; g < groups; g++) largest = largest > group[g].scale ? largest : group[g].scale;
    return largest;
}

INLINE int32_t level_of_scale(float inverse, float scale) {
    return clamp_int(nearest_int(0.5f * (inverse * scale - 1)), 0, 7);
}

/* IQ1_S, 50 bytes: d (half precision), 32 with the points' lower eight bits, 8 numbers of 16 bits with the upper three
   bits of four points, a scale and the shift's sign. */
INLINE void store_iq1_s(const float *restrict x, const float *restrict w, uint8_t *restrict out) {
    struct group_1bit group[8];
    for (int g = 0; g < 8; g++) fit_group(x + 32 * g, w + 32 * g, 32, 1e-12f, group + g);
    float largest = largest_scale(group, 8), d = largest / 15, inverse = 1 / d;
    store_half(out, largest != 0 ? d * 1.125f : 0);
    for (int g = 0; g < 8; g++) {
        uint16_t high = 0;
        for (int k = 0; k < 4; k++) {
            out[2 + 4 * g + k] = (uint8_t)group[g].point[k];
            high |= (uint16_t)(group[g].point[k] >> 8 << 3 * k);
        }
        if (largest != 0) high |= (uint16_t)((level_of_scale(inverse, group[g].scale) | group[g].shifts << 3) << 12);
        memcpy(out + 34 + 2 * g, &high, sizeof high);
    }
}

/* The block's scale for IQ1_M, by least squares over all points. */
INLINE float fit_block_scale(const float *restrict x, const float *restrict w,
                             const struct group_1bit *restrict group, const int32_t *restrict level, float d) {
    float qx = 0, q2 = 0;
    for (int i = 0; i < BLOCK; i++) {
        const struct group_1bit *own = group + i / 16;
        int part = i / 8 % 2, code = iq1_grid.points[own->point[part]];
        float q = shifted[shift_of(own->shifts, 16, part)][code >> 2 * (i % 8) & 3] * (float)(2 * level[i / 16] + 1);
        qx += w[i] * q * x[i];
        q2 += w[i] * q * q;
    }
    return q2 > 0 ? qx / q2 : d;
}

/* IQ1_M, 56 bytes: 32 with the points' lower eight bits; 16 with the upper three bits of two points and the signs of
   their shifts; four numbers of 16 bits with four scales and four bits of d (half precision) each. */
INLINE void store_iq1_m(const float *restrict x, const float *restrict w, uint8_t *restrict out) {
    struct group_1bit group[16];
    int32_t level[16];
    memset(out + 48, 0, 8);
    for (int g = 0; g < 16; g++) {
        fit_group(x + 16 * g, w + 16 * g, 16, 1e-7f, group + g);
        out[2 * g] = (uint8_t)group[g].point[0];
        out[2 * g + 1] = (uint8_t)group[g].point[1];
        out[32 + g] = (uint8_t)(group[g].point[0] >> 8 | group[g].point[1] >> 8 << 4);
    }
    float largest = largest_scale(group, 16), d = largest / 15, inverse = 1 / d;
    if (largest == 0) return;
    for (int g = 0; g < 16; g++) {
        level[g] = level_of_scale(inverse, group[g].scale);
        out[32 + g] |= (uint8_t)(group[g].shifts / 2 << 3 | group[g].shifts % 2 << 7);
    }
    uint16_t half = to_f16(fit_block_scale(x, w, group, level, d) * 1.1125f);
    for (int k = 0; k < 4; k++) {
        const int32_t *four = level + 4 * k;
        uint16_t word = (uint16_t)(four[0] | four[1] << 3 | four[2] << 6 | four[3] << 9 | (half >> 4 * k & 15) << 12);
        memcpy(out + 48 + 2 * k, &word, sizeof word);
    }
}

typedef void store_block(const float *x, const float *w, uint8_t *out);

INLINE void quantize(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                     int nbytes, store_block *store, uint8_t *restrict out) {
    for (int64_t b = 0; b < blocks; b++) {
        float w[BLOCK];
        weigh(x + b * BLOCK, importance ? importance + b * BLOCK % columns : 0, w);
        store(x + b * BLOCK, w, out + b * nbytes);
    }
}

QUANTIZER(quantize_iq1_s, quantize(x, importance, columns, blocks, 50, store_iq1_s, out))
QUANTIZER(quantize_iq1_m, quantize(x, importance, columns, blocks, 56, store_iq1_m, out))

int prepare_iq1(void) { return prepare_grid(&iq1_grid); }
