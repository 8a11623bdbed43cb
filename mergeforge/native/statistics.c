/* Statistics of whole tensors: inner products, and magnitudes counted by their bits. */

#include "reductions.h"
#include "variance.h"

typedef double Doubles __attribute__((vector_size(64)));
enum { LANES = sizeof(Doubles) / sizeof(double) };

INLINE void load_doubles_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base,
                            double *out) {
    for (int64_t i = 0; i < count; i++) out[i] = load_f32(data, dtype, start + i) - base[i];
}

/* The chunk of input `k` minus the base (subtracted in float32). */
INLINE void load_doubles(const struct chunks *chunks, int64_t k, const float *base, double *out) {
#define LOAD(constant) \
    load_doubles_as(chunks->inputs->step[k], constant, chunks->start, chunks->count, base, out)
    FOR_DTYPE(chunks->inputs->tensors[k].dtype, LOAD);
#undef LOAD
}

INLINE double dot(const double *left, const double *right, int64_t count) {
    Doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Doubles a, b;
            memcpy(&a, left + i + part * LANES, sizeof a);
            memcpy(&b, right + i + part * LANES, sizeof b);
            total[part] += a * b;
        }
    total[0] += total[1] + (total[2] + total[3]);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[0][lane];
    for (; i < count; i++) sum += left[i] * right[i];
    return sum;
}

INLINE int64_t inner_products_body(const struct inputs *inputs, double *values, double *sums) {
    float buffer[CHUNK];
    struct chunks chunks = chunks_of(inputs, PRODUCT_CHUNK);
    while (next_chunk(&chunks)) {
        int64_t pair = 0;
        const float *base = load_base(&chunks, buffer);
        for (int64_t k = 0; k < inputs->count; k++) load_doubles(&chunks, k, base, values + k * PRODUCT_CHUNK);
        for (int64_t k = 0; k < inputs->count; k++)
            for (int64_t other = k; other < inputs->count; other++)
                sums[pair++] += dot(values + k * PRODUCT_CHUNK, values + other * PRODUCT_CHUNK, chunks.count);
    }
    return chunks.failed;
}

EVERY_WIDTH(int64_t, inner_products, (const struct inputs *inputs, double *values, double *sums),
            (inputs, values, sums))

/* Count `count` (at most SMALL_CHUNK) magnitudes. Those inside the interval are few: zeros are skipped eight at a time. */
INLINE void count_chunk(const float *values, int64_t count, struct magnitude_count *counts) {
    uint8_t marks[SMALL_CHUNK];
    int32_t low = counts->low, high = counts->high, guess = counts->guess, above = 0, equal = 0, nonzero = 0;
    int32_t *inside = counts->inside + counts->count;
    if (counts->input == VARIANCE)
        for (int64_t i = 0; i < count; i++) nonzero += values[i] != 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)magnitude(values[i]);
        above += bits >= high;
        equal += bits == guess;
        marks[i] = (uint8_t)((bits >= low) & (bits < high) & (bits != guess));
    }
    memset(marks + count, 0, (size_t)(SMALL_CHUNK - count));
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t eight;
        memcpy(&eight, marks + i, sizeof eight);
        for (; eight; eight &= eight - 1)
            *inside++ = (int32_t)magnitude(values[i + __builtin_ctzll(eight) / 8]) - low;
    }
    counts->count = inside - counts->inside;
    counts->above += above;
    counts->equal += equal;
    counts->nonzero += nonzero;
}

/* The chunk's variance over all inputs. `values`: CHUNK values of each input, and of the result, which is returned. */
INLINE const float *chunk_variance(const struct chunks *chunks, const float *base, float *values) {
    int64_t inputs = chunks->inputs->count;
    float *variance = values + inputs * VALUES_STRIDE;
    for (int64_t k = 0; k < inputs; k++) load_chunk(chunks, k, base, values + k * VALUES_STRIDE);
    variance_of(values, inputs, chunks->count, variance);
    return variance;
}

INLINE int64_t count_magnitudes_body(const struct inputs *inputs, struct magnitude_count *counts, int64_t count,
                                     float *values, int64_t *done) {
    float buffer[SMALL_CHUNK];
    struct chunks chunks = chunks_of(inputs, SMALL_CHUNK);
    *done = 0;
    while (next_chunk(&chunks)) {
        for (int64_t k = 0; k < count; k++)
            if (counts[k].count + chunks.count > counts[k].capacity) return 0;
        const float *base = load_base(&chunks, buffer), *loaded = NULL;
        for (int64_t k = 0; k < count; k++) {
            if (!loaded || counts[k].input != counts[k - 1].input) {
                if (counts[k].input == VARIANCE)
                    loaded = chunk_variance(&chunks, base, values);
                else
                    load_chunk(&chunks, counts[k].input, base, values), loaded = values;
            }
            count_chunk(loaded, chunks.count, counts + k);
        }
        *done += chunks.count;
    }
    return chunks.failed;
}

EVERY_WIDTH(int64_t, count_magnitudes,
            (const struct inputs *inputs, struct magnitude_count *counts, int64_t count, float *values, int64_t *done),
            (inputs, counts, count, values, done))

INLINE int64_t variances_body(const struct inputs *inputs, float *values, float *out) {
    float buffer[CHUNK];
    struct chunks chunks = chunks_of(inputs, CHUNK);
    while (next_chunk(&chunks))
        memcpy(out + chunks.step_start + chunks.start,
               chunk_variance(&chunks, load_base(&chunks, buffer), values), (size_t)chunks.count * sizeof *out);
    return chunks.failed;
}

EVERY_WIDTH(int64_t, variances, (const struct inputs *inputs, float *values, float *out), (inputs, values, out))
