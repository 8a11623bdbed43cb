/* Reductions: merges that take each element through all steps at once: widen to float32, subtract the base, drop what is
   not kept, weight, elect a sign, add up, round. */

#include "reductions.h"

#include <math.h>

#include "variance.h"

enum { UNROLLED = 4 }; /* the most inputs for which loops over them are unrolled */

INLINE void axpy_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float factor,
                    int fused, float *total) {
    if (fused)
        for (int64_t i = 0; i < count; i++)
            total[i] = fmaf(load_f32(data, dtype, start + i) - base[i], factor, total[i]);
    else
        for (int64_t i = 0; i < count; i++) total[i] += (load_f32(data, dtype, start + i) - base[i]) * factor;
}

/* Add `factor` times (elements minus the base) to the total; `fused`: products are not rounded before they are added. */
INLINE void axpy(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float factor,
                 int fused, float *total) {
#define AXPY(constant) axpy_as(data, constant, start, count, base, factor, fused, total)
    FOR_DTYPE(dtype, AXPY);
#undef AXPY
}

INLINE int keeps_all(const struct reduction *reduction, int64_t k) {
    if (reduction->keep == KEEP_RANDOM) return reduction->masks[k].limit == KEEP_ALL;
    if (reduction->keep == KEEP_RANKS) return reduction->ranks[k].mask.limit == KEEP_ALL;
    if (reduction->keep == KEEP_MAGNITUDES) return reduction->ranges[k].lower.bits < 0;
    return reduction->keep == KEEP_WHOLE;
}

/* The index in its tensor of the chunk's first element. */
INLINE int64_t chunk_element(const struct reduction *reduction, const struct chunks *chunks) {
    return reduction->element + chunks->step_start + chunks->start;
}

INLINE void rank_step_body(const struct reduction *reduction, const struct chunks *chunks) {
    float base[CHUNK];
    const struct inputs *inputs = chunks->inputs;
    for (int64_t k = 0; k < inputs->count; k++) {
        if (keeps_all(reduction, k)) continue;
        for (int64_t first = 0; first < chunks->step_count; first += reduction->row_length) {
            int64_t columns = min_of(reduction->row_length, chunks->step_count - first);
            int64_t element = reduction->element + chunks->step_start + first, row = element / reduction->row_length;
            uint8_t *kept = reduction->kept + k * inputs->read_elems + first, *bits = NULL;
            if (row < reduction->rank_bits_rows)
                bits = reduction->rank_bits +
                       (k * reduction->rank_bits_rows + row) * rank_row_nbytes(reduction->row_length);
            if (bits && reduction->reads_rank_bits) {
                unpack_marks(bits, columns, kept);
                continue;
            }
            struct chunks part = *chunks;
            for (int64_t start = 0; start < columns; start += CHUNK) {
                part.start = first + start, part.count = min_of(CHUNK, columns - start);
                load_chunk(&part, k, load_base(&part, base), reduction->row + start);
            }
            rank_row(reduction->ranks + k, &reduction->buffers, element, reduction->row, columns, kept);
            if (bits) pack_marks(kept, columns, bits);
        }
    }
}

/* Not inlined into each kernel, which would take long to compile. */
EVERY_WIDTH(void, rank_step, (const struct reduction *reduction, const struct chunks *chunks),
            (reduction, chunks))

/* Move to the next chunk, and decide by rank for a new step. */
INLINE int next_kept_chunk(const struct reduction *reduction, struct chunks *chunks) {
    if (!next_chunk(chunks)) return 0;
    if (reduction->keep == KEEP_RANKS && starts_step(chunks)) rank_step(reduction, chunks);
    return 1;
}

/* Zero what is not kept of the chunk's `values` of input `k`: magnitudes or signed values. */
INLINE void drop(const struct reduction *reduction, const struct chunks *chunks, int64_t k, float *values) {
    int64_t element = chunk_element(reduction, chunks), count = chunks->count;
    if (reduction->keep == KEEP_RANDOM) {
        float kept[CHUNK];
        draw_mask(reduction->masks + k, element, count, kept);
        for (int64_t i = 0; i < count; i++) values[i] *= kept[i];
    } else if (reduction->keep == KEEP_RANKS) {
        const uint8_t *kept = reduction->kept + k * chunks->inputs->read_elems + chunks->start;
        for (int64_t i = 0; i < count; i++) values[i] *= kept[i];
    } else {
        trim_range(reduction->ranges + k, element == 0, count, values);
    }
}

/* What is kept of the chunk of input `k`. */
INLINE void load_kept(const struct reduction *reduction, const struct chunks *chunks, int64_t k, const float *base,
                      float *out) {
    load_chunk(chunks, k, base, out);
    if (!keeps_all(reduction, k)) drop(reduction, chunks, k, out);
}

/* What is kept of all inputs, by the variance over them, in reduction->values. */
INLINE void load_varying(const struct reduction *reduction, const struct chunks *chunks, const float *base) {
    float variance[CHUNK];
    int64_t inputs = chunks->inputs->count;
    for (int64_t k = 0; k < inputs; k++) load_chunk(chunks, k, base, reduction->values + k * VALUES_STRIDE);
    variance_of(reduction->values, inputs, chunks->count, variance);
    trim_range(reduction->ranges, chunk_element(reduction, chunks) == 0, chunks->count, variance);
    for (int64_t k = 0; k < inputs; k++) {
        float *values = reduction->values + k * VALUES_STRIDE;
        for (int64_t i = 0; i < chunks->count; i++) values[i] = variance[i] != 0 ? values[i] : 0;
    }
}

/* What is kept of all inputs, in reduction->values. */
INLINE void load_all_kept(const struct reduction *reduction, const struct chunks *chunks, const float *base) {
    if (reduction->keep == KEEP_VARIANCE)
        load_varying(reduction, chunks, base);
    else
        for (int64_t k = 0; k < chunks->inputs->count; k++)
            load_kept(reduction, chunks, k, base, reduction->values + k * VALUES_STRIDE);
}

INLINE void sum_chunk(const struct reduction *reduction, const struct chunks *chunks, const float *base, float *total) {
    float kept[SMALL_CHUNK];
    int64_t count = chunks->count;
    for (int64_t i = 0; i < count; i++) total[i] = -0.0f; /* the neutral element: -0.0 + x is x for every x */
    for (int64_t k = 0; k < chunks->inputs->count; k++) {
        float factor = reduction->factors[k];
        if (keeps_all(reduction, k))
            axpy(chunks->inputs->step[k], chunks->inputs->tensors[k].dtype, chunks->start, count, base, factor,
                 reduction->fused, total);
        else {
            load_kept(reduction, chunks, k, base, kept);
            axpy(kept, F32, 0, count, ZEROS, factor, reduction->fused, total);
        }
    }
    if (reduction->divisor != 1)
        for (int64_t i = 0; i < count; i++) total[i] /= reduction->divisor;
    if (reduction->scale != 1)
        for (int64_t i = 0; i < count; i++) total[i] *= reduction->scale;
}

/* TIES: `scale` times the sum of the products that have the elected sign (that of the sum of all; zero counts as plus);
   with `normalize`, divided by the sum of their weights. `inputs`: a constant, so that the compiler unrolls the loops over
   them and keeps sums in registers. */
INLINE void consensus_sum_of(const struct reduction *reduction, int64_t inputs, int64_t count, float *restrict total) {
    const float *restrict values = reduction->values;
    float factors[UNROLLED], weights[UNROLLED], scale = reduction->scale;
    for (int64_t k = 0; k < inputs; k++) factors[k] = reduction->factors[k], weights[k] = reduction->weights[k];
    int normalize = reduction->normalize;
    for (int64_t i = 0; i < count; i++) {
        float elected = -0.0f, sum = 0, divisor = 0;
        for (int64_t k = 0; k < inputs; k++) elected += values[k * VALUES_STRIDE + i] * factors[k];
        float sign = elected >= 0 ? 1 : -1;
        for (int64_t k = 0; k < inputs; k++) {
            float agreeing = values[k * VALUES_STRIDE + i] * factors[k] * sign;
            sum += agreeing < 0 ? 0 : agreeing;
            divisor += agreeing > 0 ? weights[k] : 0;
        }
        divisor = !normalize || divisor == 0 ? 1 : divisor;
        total[i] = sum / divisor * (sign * scale);
    }
}

/* The same for any number of inputs, in one pass over the chunk for each. */
INLINE void consensus_sum_of_many(const struct reduction *reduction, int64_t inputs, int64_t count, float *total) {
    float sign[SMALL_CHUNK], divisor[SMALL_CHUNK];
    for (int64_t i = 0; i < count; i++) sign[i] = -0.0f;
    for (int64_t k = 0; k < inputs; k++) {
        float *product = reduction->values + k * VALUES_STRIDE, factor = reduction->factors[k];
        for (int64_t i = 0; i < count; i++) product[i] *= factor;
        for (int64_t i = 0; i < count; i++) sign[i] += product[i];
    }
    for (int64_t i = 0; i < count; i++) sign[i] = sign[i] >= 0 ? 1 : -1;
    for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
    for (int64_t k = 0; k < inputs; k++) {
        const float *product = reduction->values + k * VALUES_STRIDE, weight = reduction->weights[k];
        for (int64_t i = 0; i < count; i++) {
            float agreeing = product[i] * sign[i];
            total[i] += agreeing < 0 ? 0 : agreeing;
            divisor[i] += agreeing > 0 ? weight : 0;
        }
    }
    for (int64_t i = 0; reduction->normalize && i < count; i++) total[i] /= divisor[i] == 0 ? 1 : divisor[i];
    for (int64_t i = 0; i < count; i++) total[i] *= sign[i] * reduction->scale;
}

INLINE void consensus_sum_chunk(const struct reduction *reduction, const struct chunks *chunks, const float *base,
                                float *total) {
    load_all_kept(reduction, chunks, base);
    switch (chunks->inputs->count) {
        case 1: consensus_sum_of(reduction, 1, chunks->count, total); break;
        case 2: consensus_sum_of(reduction, 2, chunks->count, total); break;
        case 3: consensus_sum_of(reduction, 3, chunks->count, total); break;
        case UNROLLED: consensus_sum_of(reduction, UNROLLED, chunks->count, total); break;
        default: consensus_sum_of_many(reduction, chunks->inputs->count, chunks->count, total);
    }
}

/* sce: the mean, weighted by the factors, of the values that have the elected sign. */
INLINE void consensus_mean_chunk(const struct reduction *reduction, const struct chunks *chunks, const float *base,
                                 float *total) {
    float sign[SMALL_CHUNK], divisor[SMALL_CHUNK], least = reduction->min_divisor;
    int64_t inputs = chunks->inputs->count, count = chunks->count;
    load_all_kept(reduction, chunks, base);
    for (int64_t i = 0; i < count; i++) sign[i] = -0.0f;
    for (int64_t k = 0; k < inputs; k++)
        for (int64_t i = 0; i < count; i++) sign[i] += reduction->values[k * VALUES_STRIDE + i];
    for (int64_t i = 0; i < count; i++) sign[i] = sign[i] >= 0 ? 1 : -1;
    for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
    for (int64_t k = 0; k < inputs; k++) {
        const float *values = reduction->values + k * VALUES_STRIDE, factor = reduction->factors[k];
        for (int64_t i = 0; i < count; i++) {
            float value = values[i] * sign[i];
            float agrees = value > 0;
            total[i] = fmaf(value < 0 ? 0 : value, factor, total[i]);
            divisor[i] += agrees * factor;
        }
    }
    for (int64_t i = 0; i < count; i++) total[i] = total[i] * sign[i] / (divisor[i] < least ? least : divisor[i]);
}

/* nearswap (mergekit's method) of two inputs into `total`; returns the values of the first one. */
INLINE const float *nearswap_chunk(const struct chunks *chunks, float t, float *first, float *total) {
    load_chunk(chunks, 0, ZEROS, first);
    load_chunk(chunks, 1, ZEROS, total);
    for (int64_t i = 0; i < chunks->count; i++) {
        float distance = fabsf(first[i] - total[i]);
        float weight = 1 / (distance < 1e-6f ? 1e-6f : distance) * t;
        weight = weight > 1 ? 1 : weight;
        total[i] = (1 - weight) * first[i] + weight * total[i];
    }
    return first;
}

/* One chunk of the reduction, into `total`. Returns the chunk of the base, or zeros. */
INLINE const float *reduce_chunk(const struct reduction *reduction, const struct chunks *chunks, float *buffer,
                                 float *total) {
    if (reduction->combine == NEARSWAP) return nearswap_chunk(chunks, reduction->t, buffer, total);
    const float *base = load_base(chunks, buffer);
    if (reduction->combine == SUM)
        sum_chunk(reduction, chunks, base, total);
    else if (reduction->combine == CONSENSUS_SUM)
        consensus_sum_chunk(reduction, chunks, base, total);
    else
        consensus_mean_chunk(reduction, chunks, base, total);
    if (chunks->inputs->has_base)
        for (int64_t i = 0; i < chunks->count; i++) total[i] += base[i];
    return base;
}

/* Add the effect of a reduction on the base to `changes`: squares of the base, squares of the changes, the largest
   change (a maximum, not a sum), elements that change, and those of them that no longer do once rounded to `dtype`. */
INLINE void measure_change(const float *before, const float *after, int64_t count, int64_t dtype, double *changes) {
    for (int64_t i = 0; i < count; i++) {
        float change = after[i] - before[i];
        int moves = change != 0;
        changes[0] += (double)before[i] * before[i];
        changes[1] += (double)change * change;
        changes[2] = fabsf(change) > changes[2] ? fabsf(change) : changes[2];
        changes[3] += moves;
        changes[4] += moves && round_to(after[i], dtype) == round_to(before[i], dtype);
    }
}

INLINE int64_t reduce_body(const struct inputs *inputs, const struct reduction *reduction, int64_t dtype, void *out,
                           uint32_t *max_bits, double *changes, int64_t measured) {
    float base[SMALL_CHUNK], total[SMALL_CHUNK];
    uint32_t largest = 0;
    struct chunks chunks = chunks_of(inputs, SMALL_CHUNK);
    while (next_kept_chunk(reduction, &chunks)) {
        int64_t first = chunks.step_start + chunks.start;
        const float *before = reduce_chunk(reduction, &chunks, base, total);
        if (first < measured) measure_change(before, total, min_of(chunks.count, measured - first), dtype, changes);
        for (int64_t i = 0; i < chunks.count; i++) {
            uint32_t bits = magnitude(total[i]);
            largest = bits > largest ? bits : largest;
        }
        store(total, chunks.count, dtype, out, first);
    }
    *max_bits = largest;
    return chunks.failed;
}

EVERY_WIDTH(int64_t, reduce,
            (const struct inputs *inputs, const struct reduction *reduction, int64_t dtype, void *out,
             uint32_t *max_bits, double *changes, int64_t measured),
            (inputs, reduction, dtype, out, max_bits, changes, measured))

INLINE int64_t load_values_body(const struct inputs *inputs, float *out) {
    float base[CHUNK];
    struct chunks chunks = chunks_of(inputs, CHUNK);
    while (next_chunk(&chunks)) load_chunk(&chunks, 0, load_base(&chunks, base), out + chunks.step_start + chunks.start);
    return chunks.failed;
}

EVERY_WIDTH(int64_t, load_values, (const struct inputs *inputs, float *out), (inputs, out))

/* ---- What is kept, in numbers ---- */

typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
enum { LANES = sizeof(Doubles) / sizeof(double) };

/* The sum of the values, or of their squares, in float64. */
INLINE double sum_of(const float *values, int64_t count, int squared) {
    Doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Floats vector;
            memcpy(&vector, values + i + part * LANES, sizeof vector);
            Doubles wide = __builtin_convertvector(vector, Doubles);
            total[part] += squared ? wide * wide : wide;
        }
    total[0] += total[1] + (total[2] + total[3]);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[0][lane];
    for (; i < count; i++) sum += squared ? (double)values[i] * values[i] : values[i];
    return sum;
}

INLINE int64_t l1_norms_body(const struct inputs *inputs, const struct reduction *reduction, double *norms) {
    float buffer[CHUNK], values[CHUNK];
    struct chunks chunks = chunks_of(inputs, CHUNK);
    while (next_kept_chunk(reduction, &chunks)) {
        const float *base = load_base(&chunks, buffer);
        for (int64_t k = 0; k < inputs->count; k++) {
            load_chunk(&chunks, k, base, values);
            for (int64_t i = 0; i < chunks.count; i++) values[i] = fabsf(values[i]);
            double norm = sum_of(values, chunks.count, 0);
            norms[2 * k] += norm;
            if (!keeps_all(reduction, k)) {
                drop(reduction, &chunks, k, values);
                norm = sum_of(values, chunks.count, 0);
            }
            norms[2 * k + 1] += norm;
        }
    }
    return chunks.failed;
}

EVERY_WIDTH(int64_t, l1_norms, (const struct inputs *inputs, const struct reduction *reduction, double *norms),
            (inputs, reduction, norms))

INLINE int64_t kept_squares_body(const struct inputs *inputs, const struct reduction *reduction, double *sums) {
    float buffer[CHUNK];
    struct chunks chunks = chunks_of(inputs, CHUNK);
    while (next_kept_chunk(reduction, &chunks)) {
        load_all_kept(reduction, &chunks, load_base(&chunks, buffer));
        for (int64_t k = 0; k < inputs->count; k++) sums[k] += sum_of(reduction->values + k * VALUES_STRIDE, chunks.count, 1);
    }
    return chunks.failed;
}

EVERY_WIDTH(int64_t, kept_squares, (const struct inputs *inputs, const struct reduction *reduction, double *sums),
            (inputs, reduction, sums))
