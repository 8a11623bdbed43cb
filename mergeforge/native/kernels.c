/* Kernels for merging on a CPU. Each takes a few thousand elements, which stay in the L1 cache, through all steps of a
   computation at once. Inputs in files are read in steps that stay in the L2 cache.

   Plain C behind ctypes (bindings.py lists the functions and their arguments). Compiled without contraction to fused
   multiply-adds, so that the results equal torch's bit for bit; where torch fuses, fmaf() is written out. On x86-64
   there is one version per vector width, chosen when the library is loaded. */

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && !defined(__FMA__)
#error "without FMA instructions fmaf() is a slow function call: torch is faster"
#else
#define EVERY_WIDTH
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files hold little-endian numbers"
#endif

/* The SHA-256 of this file, so that a library compiled from another version is not loaded. */
const char kernels_source[65] = SOURCE;

#define INLINE static inline __attribute__((always_inline))

enum { BF16, F16, F32 };
enum { CHUNK = 2048, PRODUCT_CHUNK = 512 };
typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
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

INLINE uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }

INLINE int64_t min_of(int64_t left, int64_t right) { return left < right ? left : right; }

/* ---- Conversions between float32 and the stored dtypes ---- */

INLINE float of_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* The exponents of float16 start at 2^-112 of float32's; the multiplication also handles subnormal numbers. */
INLINE float of_f16(uint16_t half) {
    float value = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(value) | infinite | (uint32_t)(half & 0x8000) << 16);
}

/* Round to nearest, ties to even; every NaN becomes the one that torch writes. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0xffff : rounded;
}

/* As processors do it: a NaN keeps its upper bits. Subnormal numbers are rounded by adding 0.5, whose last bit has the
   value of theirs. */
INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t nonfinite = bits > 0x7f800000 ? 0x7e00 | (bits >> 13 & 0x3ff) : 0x7c00;
    return sign | (bits >= 0x47800000 ? nonfinite : bits < 0x38800000 ? subnormal : normal);
}

INLINE float round_to(float value, int64_t dtype) {
    return dtype == F32 ? value : dtype == F16 ? of_f16(to_f16(value)) : of_bf16(to_bf16(value));
}

INLINE int64_t itemsize(int64_t dtype) { return dtype == F32 ? 4 : 2; }

INLINE float load_f32(const void *data, int64_t dtype, int64_t index) {
    if (dtype == F32) return ((const float *)data)[index];
    uint16_t half = ((const uint16_t *)data)[index];
    return dtype == BF16 ? of_bf16(half) : of_f16(half);
}

/* Write `count` values at element `index` of `out`, rounded to `dtype`. */
INLINE void store(const float *values, int64_t count, int64_t dtype, void *out, int64_t index) {
    if (dtype == F32)
        memcpy((float *)out + index, values, count * sizeof(float));
    else if (dtype == F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[index + i] = to_f16(values[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[index + i] = to_bf16(values[i]);
}

/* ---- Loading: each function has a version per dtype, so that the compiler sees a constant in the loop ---- */

static const float ZEROS[CHUNK];

INLINE void load_sub_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = load_f32(data, dtype, start + i) - base[i];
}

/* `count` elements from element `start` on, minus the base. */
INLINE void load_sub(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float *out) {
    if (dtype == BF16)
        load_sub_as(data, BF16, start, count, base, out);
    else if (dtype == F16)
        load_sub_as(data, F16, start, count, base, out);
    else
        load_sub_as(data, F32, start, count, base, out);
}

INLINE void load_sub_doubles_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base,
                                double *out) {
    for (int64_t i = 0; i < count; i++) out[i] = load_f32(data, dtype, start + i) - base[i];
}

/* The same as doubles (subtracted in float32). */
INLINE void load_sub_doubles(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base,
                             double *out) {
    if (dtype == BF16)
        load_sub_doubles_as(data, BF16, start, count, base, out);
    else if (dtype == F16)
        load_sub_doubles_as(data, F16, start, count, base, out);
    else
        load_sub_doubles_as(data, F32, start, count, base, out);
}

INLINE void axpy_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float factor,
                    int64_t fused, float *total) {
    if (fused)
        for (int64_t i = 0; i < count; i++)
            total[i] = fmaf(load_f32(data, dtype, start + i) - base[i], factor, total[i]);
    else
        for (int64_t i = 0; i < count; i++) total[i] += (load_f32(data, dtype, start + i) - base[i]) * factor;
}

/* Add `factor` times (elements minus the base) to the total; `fused`: products are not rounded before they are added. */
INLINE void axpy(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float factor,
                 int64_t fused, float *total) {
    if (dtype == BF16)
        axpy_as(data, BF16, start, count, base, factor, fused, total);
    else if (dtype == F16)
        axpy_as(data, F16, start, count, base, factor, fused, total);
    else
        axpy_as(data, F32, start, count, base, factor, fused, total);
}

/* ---- Inputs in memory or in files, chunk by chunk ---- */

/* Where the elements of a tensor are: in memory at address `start`, or in a file at byte `start`. */
struct input {
    int64_t file; /* file descriptor; -1: memory */
    int64_t start;
    int64_t dtype;
};

static int read_file(int64_t file, char *out, int64_t nbytes, int64_t offset) {
    while (nbytes > 0) {
        ssize_t count = pread((int)file, out, (size_t)nbytes, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return 0;
        out += count, offset += count, nbytes -= count;
    }
    return 1;
}

/* Set input_ptrs to the address of element `start` of every input. `count` elements of inputs in files are read into
   `read_buffer`, which has room for `read_elems` of each. Returns 0, or 1 + the number of an input that could not be
   read. */
static int64_t read_inputs(const struct input *inputs, int64_t input_count, int64_t start, int64_t count,
                           int64_t read_elems, char *read_buffer, const void **input_ptrs) {
    for (int64_t k = 0; k < input_count; k++) {
        int64_t size = itemsize(inputs[k].dtype), address = inputs[k].start + start * size;
        if (inputs[k].file < 0) {
            input_ptrs[k] = (const void *)(intptr_t)address;
            continue;
        }
        if (!read_file(inputs[k].file, read_buffer, count * size, address)) return k + 1;
        input_ptrs[k] = read_buffer;
        read_buffer += read_elems * sizeof(float);
    }
    return 0;
}

/* Iterates over the elements of inputs, a chunk at a time, and reads them in larger steps. */
struct chunk_iter {
    const struct input *inputs;
    int64_t input_count, length, chunk;
    int64_t read_elems;      /* the most elements that are read at a time */
    char *read_buffer;       /* where they are read to */
    const void **input_ptrs; /* the address of the step's first element in each input */
    int64_t step_start, step_count; /* the step: its first element, and how many there are */
    int64_t start, count;           /* the chunk, relative to the step */
    int64_t failed;                 /* the result of read_inputs() */
};

INLINE struct chunk_iter iterate(const struct input *inputs, int64_t input_count, int64_t length, int64_t chunk,
                                 int64_t read_elems, char *read_buffer, const void **input_ptrs) {
    struct chunk_iter iter = {.inputs = inputs,
                              .input_count = input_count,
                              .length = length,
                              .chunk = chunk,
                              .read_elems = read_elems,
                              .read_buffer = read_buffer,
                              .input_ptrs = input_ptrs};
    return iter;
}

/* Move to the next chunk; 0 at the end or after a read error. */
INLINE int next_chunk(struct chunk_iter *iter) {
    iter->start += iter->count;
    if (iter->start == iter->step_count) {
        iter->step_start += iter->step_count;
        if (iter->step_start >= iter->length) return 0;
        iter->step_count = min_of(iter->read_elems, iter->length - iter->step_start);
        iter->failed = read_inputs(iter->inputs, iter->input_count, iter->step_start, iter->step_count,
                                   iter->read_elems, iter->read_buffer, iter->input_ptrs);
        if (iter->failed) return 0;
        iter->start = 0;
    }
    iter->count = min_of(iter->chunk, iter->step_count - iter->start);
    return 1;
}

/* The chunk of input `k`, minus the base. */
INLINE void load_chunk(const struct chunk_iter *iter, int64_t k, const float *base, float *out) {
    load_sub(iter->input_ptrs[k], iter->inputs[k].dtype, iter->start, iter->count, base, out);
}

/* ---- Masks ---- */

/* A random mask (methods/_random_mask.py): the keys of the upper and lower random bytes. An element is kept if its
   sixteen random bits are below the limit; a limit of 65536 keeps all. */
struct mask {
    uint32_t upper[2], lower[2], limit;
};
enum { KEEP_ALL = 1 << 16 };

/* The lowbias32 hash (https://nullprogram.com/blog/2018/07/31/), keyed. */
INLINE uint32_t lowbias32(uint32_t bits, const uint32_t *keys) {
    bits ^= keys[0];
    bits = (bits ^ bits >> 16) * 0x7feb352d;
    bits = (bits ^ bits >> 15 ^ keys[1]) * 0x846ca68b;
    return bits ^ bits >> 16;
}

/* A random byte for each of `count` elements, in `words`; `element`: the index of the first one in its tensor. */
INLINE const uint8_t *random_bytes(const uint32_t *keys, int64_t element, int64_t count, uint32_t *words) {
    for (int64_t i = 0; i < (count + 6) / 4; i++)
        words[i] = lowbias32((uint32_t)((element >> 2) + i) * 0x9e3779b9, keys);
    return (const uint8_t *)words + (element & 3);
}

/* 1 for each of `count` elements that the mask keeps, 0 for the others. */
INLINE void draw_mask(const struct mask *mask, int64_t element, int64_t count, float *kept) {
    uint32_t high_words[CHUNK / 4 + 1], low_words[CHUNK / 4 + 1];
    const uint8_t *high = random_bytes(mask->upper, element, count, high_words);
    if (mask->limit & 255) {
        const uint8_t *low = random_bytes(mask->lower, element, count, low_words);
        for (int64_t i = 0; i < count; i++) kept[i] = (uint32_t)(high[i] << 8 | low[i]) < mask->limit;
    } else {
        for (int64_t i = 0; i < count; i++) kept[i] = high[i] < mask->limit >> 8;
    }
}

/* The elements that a method keeps by magnitude (methods/_magnitude_range.py): those above `lower` but not above
   `upper`. Of the magnitudes equal to a threshold, the first `ties` count as above; they are counted from the first
   element of the tensor. */
struct threshold {
    int64_t bits, ties, ties_left;
};
struct magnitude_range {
    struct threshold lower, upper;
};
enum { NO_MAGNITUDE = 0x7fffffff }; /* bits that no magnitude exceeds */

/* 1 for each value above the threshold. */
INLINE void mark_above(struct threshold *threshold, const float *values, int64_t count, uint8_t *above) {
    int32_t equal = 0, bits = (int32_t)threshold->bits;
    for (int64_t i = 0; i < count; i++) equal += (int32_t)magnitude(values[i]) == bits;
    int all = equal <= threshold->ties_left;
    for (int64_t i = 0; i < count; i++) above[i] = (int32_t)magnitude(values[i]) >= bits + !all;
    for (int64_t i = 0; !all && threshold->ties_left > 0; i++)
        if ((int32_t)magnitude(values[i]) == bits) above[i] = 1, threshold->ties_left--;
    if (all) threshold->ties_left -= equal;
}

/* Set the values outside the range to zero; `is_first`: the values start with the tensor's first element. */
INLINE void trim_range(struct magnitude_range *range, int is_first, int64_t count, float *values) {
    uint8_t kept[CHUNK], too_large[CHUNK];
    if (is_first) range->lower.ties_left = range->lower.ties, range->upper.ties_left = range->upper.ties;
    mark_above(&range->lower, values, count, kept);
    if (range->upper.bits < NO_MAGNITUDE) {
        mark_above(&range->upper, values, count, too_large);
        for (int64_t i = 0; i < count; i++) kept[i] &= !too_large[i];
    }
    for (int64_t i = 0; i < count; i++) values[i] = kept[i] ? values[i] : 0;
}

/* ---- Reductions ---- */

/* A weighted sum: base + scale * (sum of factor * (input - base)) / divisor. `fused`: products are added unrounded. */
struct reduction {
    int64_t inputs;
    int64_t has_base; /* a base follows the inputs */
    int64_t fused;
    int64_t is_nearswap; /* instead: (1 - w) * first + w * second input, w = nearswap_t / |first - second|, at most 1 */
    int64_t element;     /* the index of element 0 in its tensor */
    const float *factors;
    const struct mask *masks;       /* one random mask per input, or none: keep all */
    struct magnitude_range *ranges; /* the same by magnitude; if the lower bits are negative, keep all */
    const float *weights;           /* per input: sum with sign consensus; or none */
    float *const *products;         /* buffers for that: one chunk per input */
    int64_t normalize;              /* for sign_consensus() */
    float divisor, scale, nearswap_t;
};

INLINE int keeps_all(const struct reduction *args, int64_t k) {
    return args->ranges ? args->ranges[k].lower.bits < 0 : !args->masks || args->masks[k].limit == KEEP_ALL;
}

/* Set the values of input `k` that its mask or range drops to zero; `index`: the index of the first value. */
INLINE void apply_mask(const struct reduction *args, int64_t k, int64_t index, int64_t count, float *values) {
    float kept[CHUNK];
    if (args->ranges)
        trim_range(args->ranges + k, args->element + index == 0, count, values);
    else {
        draw_mask(args->masks + k, args->element + index, count, kept);
        for (int64_t i = 0; i < count; i++) values[i] *= kept[i];
    }
}

/* nearswap (mergekit's method) of two inputs into `total`; returns the values of the first one. */
INLINE const float *nearswap(const struct chunk_iter *iter, float t, float *base, float *total) {
    load_chunk(iter, 0, ZEROS, base);
    load_chunk(iter, 1, ZEROS, total);
    for (int64_t i = 0; i < iter->count; i++) {
        float distance = fabsf(base[i] - total[i]);
        float weight = 1 / (distance < 1e-6f ? 1e-6f : distance) * t;
        weight = weight > 1 ? 1 : weight;
        total[i] = (1 - weight) * base[i] + weight * total[i];
    }
    return base;
}

/* The sign of the sum of all inputs (zero counts as plus), for `count` elements from `start` on. */
INLINE void elect_sign(float *const *inputs, int64_t input_count, int64_t start, int64_t count, float *sign) {
    for (int64_t i = 0; i < count; i++) sign[i] = -0.0f;
    for (int64_t k = 0; k < input_count; k++) {
        const float *input = inputs[k] + start;
        for (int64_t i = 0; i < count; i++) sign[i] += input[i];
    }
    for (int64_t i = 0; i < count; i++) sign[i] = sign[i] >= 0 ? 1 : -1;
}

/* TIES: `scale` times the sum of the products that have the elected sign; with `normalize`, divided by the sum of their
   weights. `count` products of each input, from element `start` on. */
INLINE void sign_consensus(float *const *products, int64_t input_count, const float *weights, int64_t normalize,
                           float scale, int64_t start, int64_t count, float *total) {
    float sign[CHUNK], divisor[CHUNK];
    elect_sign(products, input_count, start, count, sign);
    for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
    for (int64_t k = 0; k < input_count; k++) {
        const float *product = products[k] + start, weight = weights[k];
        for (int64_t i = 0; i < count; i++) {
            float value = product[i] * sign[i];
            float agrees = value > 0;
            total[i] += value < 0 ? 0 : value;
            divisor[i] += agrees * weight;
        }
    }
    if (normalize)
        for (int64_t i = 0; i < count; i++) total[i] /= divisor[i] == 0 ? 1 : divisor[i];
    for (int64_t i = 0; i < count; i++) total[i] *= sign[i] * scale;
}

/* The chunk of input `k` minus the base, masked. */
INLINE void load_masked(const struct reduction *args, const struct chunk_iter *iter, int64_t k, const float *base,
                        float *out) {
    load_chunk(iter, k, base, out);
    if (!keeps_all(args, k)) apply_mask(args, k, iter->step_start + iter->start, iter->count, out);
}

INLINE void sum_chunk(const struct reduction *args, const struct chunk_iter *iter, const float *base, float *total) {
    float masked[CHUNK];
    int64_t start = iter->start, count = iter->count;
    for (int64_t i = 0; i < count; i++) total[i] = -0.0f; /* the neutral element: -0.0 + x is x for every x */
    for (int64_t k = 0; k < args->inputs; k++) {
        float factor = args->factors[k];
        if (keeps_all(args, k))
            axpy(iter->input_ptrs[k], iter->inputs[k].dtype, start, count, base, factor, args->fused, total);
        else {
            load_masked(args, iter, k, base, masked);
            axpy(masked, F32, 0, count, ZEROS, factor, args->fused, total);
        }
    }
    if (args->divisor != 1)
        for (int64_t i = 0; i < count; i++) total[i] /= args->divisor;
    if (args->scale != 1)
        for (int64_t i = 0; i < count; i++) total[i] *= args->scale;
}

INLINE void sign_consensus_chunk(const struct reduction *args, const struct chunk_iter *iter, const float *base,
                                 float *total) {
    for (int64_t k = 0; k < args->inputs; k++) {
        float *product = args->products[k], factor = args->factors[k];
        load_masked(args, iter, k, base, product);
        for (int64_t i = 0; i < iter->count; i++) product[i] *= factor;
    }
    sign_consensus(args->products, args->inputs, args->weights, args->normalize, args->scale, 0, iter->count, total);
}

/* One chunk (at most CHUNK elements) of the reduction, into `total`. Returns the chunk of the base, or zeros. */
INLINE const float *reduce_chunk(const struct reduction *args, const struct chunk_iter *iter, float *base,
                                 float *total) {
    if (args->is_nearswap) return nearswap(iter, args->nearswap_t, base, total);
    const float *subtracted = ZEROS;
    if (args->has_base) {
        load_chunk(iter, args->inputs, ZEROS, base);
        subtracted = base;
    }
    if (args->weights)
        sign_consensus_chunk(args, iter, subtracted, total);
    else
        sum_chunk(args, iter, subtracted, total);
    if (args->has_base)
        for (int64_t i = 0; i < iter->count; i++) total[i] += base[i];
    return subtracted;
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

/* `length` elements of a reduction, rounded to `dtype`. `max_bits`: the bits of the largest magnitude before rounding.
   `changes`: for measure_change(), or none. Returns the result of read_inputs(), as all functions with its arguments
   do. */
EVERY_WIDTH int64_t weighted_sum(const struct input *inputs, const struct reduction *args, int64_t length,
                                 int64_t dtype, void *out, uint32_t *max_bits, double *changes, int64_t read_elems,
                                 char *read_buffer, const void **input_ptrs) {
    float base[CHUNK], total[CHUNK];
    uint32_t largest = 0;
    struct chunk_iter iter =
        iterate(inputs, args->inputs + args->has_base, length, CHUNK, read_elems, read_buffer, input_ptrs);
    while (next_chunk(&iter)) {
        const float *before = reduce_chunk(args, &iter, base, total);
        if (changes) measure_change(before, total, iter.count, dtype, changes);
        for (int64_t i = 0; i < iter.count; i++) {
            uint32_t bits = magnitude(total[i]);
            largest = bits > largest ? bits : largest;
        }
        store(total, iter.count, dtype, out, iter.step_start + iter.start);
    }
    *max_bits = largest;
    return iter.failed;
}

/* One input, minus the base if there is one. `inputs`: the input, the base. */
EVERY_WIDTH int64_t difference(const struct input *inputs, int64_t has_base, int64_t length, float *out,
                               int64_t read_elems, char *read_buffer, const void **input_ptrs) {
    float base[CHUNK];
    struct chunk_iter iter = iterate(inputs, 1 + has_base, length, CHUNK, read_elems, read_buffer, input_ptrs);
    while (next_chunk(&iter)) {
        if (has_base) load_chunk(&iter, 1, ZEROS, base);
        load_chunk(&iter, 0, has_base ? base : ZEROS, out + iter.step_start + iter.start);
    }
    return iter.failed;
}

/* ---- Statistics ---- */

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

INLINE double sum_of(const float *values, int64_t count) {
    Doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Floats vector;
            memcpy(&vector, values + i + part * LANES, sizeof vector);
            total[part] += __builtin_convertvector(vector, Doubles);
        }
    total[0] += total[1] + (total[2] + total[3]);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[0][lane];
    for (; i < count; i++) sum += values[i];
    return sum;
}

/* Add to `norms`, for each input, its L1 norm and that of the elements that its mask or range keeps. */
EVERY_WIDTH int64_t l1_norms(const struct input *inputs, const struct reduction *args, int64_t length, double *norms,
                             int64_t read_elems, char *read_buffer, const void **input_ptrs) {
    float base[CHUNK], values[CHUNK];
    struct chunk_iter iter =
        iterate(inputs, args->inputs + args->has_base, length, CHUNK, read_elems, read_buffer, input_ptrs);
    while (next_chunk(&iter)) {
        if (args->has_base) load_chunk(&iter, args->inputs, ZEROS, base);
        for (int64_t k = 0; k < args->inputs; k++) {
            load_chunk(&iter, k, args->has_base ? base : ZEROS, values);
            for (int64_t i = 0; i < iter.count; i++) values[i] = fabsf(values[i]);
            double norm = sum_of(values, iter.count);
            norms[2 * k] += norm;
            if (!keeps_all(args, k)) {
                apply_mask(args, k, iter.step_start + iter.start, iter.count, values);
                norm = sum_of(values, iter.count);
            }
            norms[2 * k + 1] += norm;
        }
    }
    return iter.failed;
}

/* Add to `sums` the inner products of every input (minus the base) with itself and the inputs that follow it.
   `doubles`: a buffer of PRODUCT_CHUNK values per input. */
EVERY_WIDTH int64_t inner_products(const struct input *inputs, int64_t input_count, int64_t has_base, int64_t length,
                                   double *doubles, double *sums, int64_t read_elems, char *read_buffer,
                                   const void **input_ptrs) {
    float base[PRODUCT_CHUNK];
    struct chunk_iter iter =
        iterate(inputs, input_count + has_base, length, PRODUCT_CHUNK, read_elems, read_buffer, input_ptrs);
    while (next_chunk(&iter)) {
        int64_t pair = 0;
        if (has_base) load_chunk(&iter, input_count, ZEROS, base);
        for (int64_t k = 0; k < input_count; k++)
            load_sub_doubles(input_ptrs[k], inputs[k].dtype, iter.start, iter.count, has_base ? base : ZEROS,
                             doubles + k * PRODUCT_CHUNK);
        for (int64_t k = 0; k < input_count; k++)
            for (int64_t other = k; other < input_count; other++)
                sums[pair++] += dot(doubles + k * PRODUCT_CHUNK, doubles + other * PRODUCT_CHUNK, iter.count);
    }
    return iter.failed;
}

/* Add to `above` how many of `count` (at most CHUNK) magnitudes have bits of at least `high`. The bits of those in
   [low, high), minus `low`, go to `inside`; returns their number. They are few: zeros are skipped eight at a time. */
INLINE int64_t split_chunk(const float *values, int64_t count, int32_t low, int32_t high, int32_t *inside,
                           int64_t *above) {
    uint8_t marks[CHUNK];
    int64_t inside_count = 0;
    int32_t above_count = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = magnitude(values[i]);
        above_count += bits >= high;
        marks[i] = (bits >= low) & (bits < high);
    }
    memset(marks + count, 0, CHUNK - count);
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t eight;
        memcpy(&eight, marks + i, sizeof eight);
        for (; eight; eight &= eight - 1)
            inside[inside_count++] = magnitude(values[i + __builtin_ctzll(eight) / 8]) - low;
    }
    *above += above_count;
    return inside_count;
}

/* The same for any number of values; `inside` has room for all of them. */
EVERY_WIDTH int64_t split(const float *values, int64_t count, int32_t low, int32_t high, int32_t *inside,
                          int64_t *above) {
    int64_t inside_count = 0;
    for (int64_t start = 0; start < count; start += CHUNK)
        inside_count +=
            split_chunk(values + start, min_of(CHUNK, count - start), low, high, inside + inside_count, above);
    return inside_count;
}

/* The same for inputs minus the base, each once or more often, in the order of the inputs. */
struct magnitude_count {
    int64_t input;
    int32_t low, high;
    int32_t *inside;
    int64_t count, above;
};

EVERY_WIDTH int64_t split_inputs(const struct input *inputs, int64_t input_count, int64_t has_base, int64_t length,
                                 struct magnitude_count *counts, int64_t range_count, int64_t read_elems,
                                 char *read_buffer, const void **input_ptrs) {
    float base[CHUNK], values[CHUNK];
    struct chunk_iter iter =
        iterate(inputs, input_count + has_base, length, CHUNK, read_elems, read_buffer, input_ptrs);
    while (next_chunk(&iter)) {
        if (has_base) load_chunk(&iter, input_count, ZEROS, base);
        for (int64_t k = 0; k < range_count; k++) {
            struct magnitude_count *range = counts + k;
            if (!k || range->input != range[-1].input)
                load_chunk(&iter, range->input, has_base ? base : ZEROS, values);
            range->count += split_chunk(values, iter.count, range->low, range->high, range->inside + range->count,
                                        &range->above);
        }
    }
    return iter.failed;
}

/* ---- Methods that torch computes otherwise, on float32 blocks in memory; each returns 0 ---- */

/* arcee_fusion: |other - base| times the shift of its row. */
EVERY_WIDTH int64_t importance(const float *base, const float *other, const float *shifts, int64_t rows,
                               int64_t columns, float *out) {
    for (int64_t row = 0; row < rows; row++, base += columns, other += columns, out += columns)
        for (int64_t i = 0; i < columns; i++) out[i] = fabsf(other[i] - base[i]) * shifts[row];
    return 0;
}

/* arcee_fusion: in `other`, replace every element whose importance is below the threshold by the base's. */
EVERY_WIDTH int64_t important(const float *base, float *other, const float *shifts, int64_t rows, int64_t columns,
                              float threshold) {
    for (int64_t row = 0; row < rows; row++, base += columns, other += columns)
        for (int64_t i = 0; i < columns; i++) {
            float change = other[i] - base[i];
            float kept = fabsf(change) * shifts[row] >= threshold;
            other[i] = change * kept + base[i];
        }
    return 0;
}

/* ties: the sign consensus sum of factor * delta. Overwrites the deltas; the first one becomes the sum. */
EVERY_WIDTH int64_t sign_consensus_sum(float *const *deltas, int64_t input_count, const float *factors,
                                       const float *weights, int64_t normalize, float scale, int64_t length) {
    float total[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = min_of(CHUNK, length - start);
        for (int64_t k = 0; k < input_count; k++) {
            float *delta = deltas[k] + start, factor = factors[k];
            for (int64_t i = 0; i < count; i++) delta[i] *= factor;
        }
        sign_consensus(deltas, input_count, weights, normalize, scale, start, count, total);
        memcpy(deltas[0] + start, total, count * sizeof(float));
    }
    return 0;
}

/* sce: the variance of each element over the inputs, in float64, of the distances from the first input. */
EVERY_WIDTH int64_t variance(const float *const *deltas, int64_t input_count, int64_t length, float *out) {
    double total[CHUNK], squares[CHUNK], divisor = input_count, factor = 1 / (divisor * divisor);
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = min_of(CHUNK, length - start);
        const float *origin = deltas[0] + start;
        for (int64_t i = 0; i < count; i++) total[i] = squares[i] = 0;
        for (int64_t k = 1; k < input_count; k++) {
            const float *delta = deltas[k] + start;
            for (int64_t i = 0; i < count; i++) {
                double distance = (double)delta[i] - origin[i];
                total[i] += distance;
                squares[i] += distance * distance;
            }
        }
        for (int64_t i = 0; i < count; i++) out[start + i] = (squares[i] * divisor - total[i] * total[i]) * factor;
    }
    return 0;
}

/* sce: the weighted mean of the deltas that have the elected sign, written to the first one. */
EVERY_WIDTH int64_t sign_consensus_mean(float *const *deltas, int64_t input_count, const float *weights,
                                        float min_divisor, int64_t length) {
    float sign[CHUNK], total[CHUNK], divisor[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = min_of(CHUNK, length - start);
        elect_sign(deltas, input_count, start, count, sign);
        for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
        for (int64_t k = 0; k < input_count; k++) {
            const float *delta = deltas[k] + start, weight = weights[k];
            for (int64_t i = 0; i < count; i++) {
                float value = delta[i] * sign[i];
                float agrees = value > 0;
                total[i] = fmaf(value < 0 ? 0 : value, weight, total[i]);
                divisor[i] += agrees * weight;
            }
        }
        float *out = deltas[0] + start;
        for (int64_t i = 0; i < count; i++)
            out[i] = total[i] * sign[i] / (divisor[i] < min_divisor ? min_divisor : divisor[i]);
    }
    return 0;
}

/* ---- della: masks by rank ---- */

/* An element is kept if a random draw is below 65536 * (lowest + step * rank), where rank is that of its magnitude in
   its row (equal magnitudes are ordered by position). Elements of similar magnitude share a bucket, which tells nearly
   enough about their ranks: most draws are far from their limits, and little has to be sorted. */
struct rank_mask {
    int64_t element; /* the index of the first element in its tensor */
    struct mask mask;
    float lowest, step;
    int64_t buckets, room;
    uint64_t *members;                 /* per bucket: the number of round elements, and of others << 32 */
    uint32_t *ranks, *sure, *possible; /* per bucket: its lowest rank; the limits of that rank and of its highest one */
    uint16_t *bucket, *draws;          /* per element of a row */
    uint32_t *before;                  /* per element: how many round elements precede it in its bucket */
    uint64_t *sorted;                  /* `room` entries for a bucket's elements that are not round: bits and position */
};
enum { DROPPED, KEPT, UNSURE };
enum { OCTAVES = 24 }; /* below the largest of a row; smaller magnitudes share the first bucket with the zeros */

/* Whether a magnitude is the smallest of its bucket, as most are that were 16-bit numbers. */
INLINE int is_round(uint32_t bits, uint16_t bucket, int shift) {
    return !(bucket ? bits & ((1u << shift) - 1) : bits);
}

/* A draw below this limit keeps an element of the rank. */
INLINE uint32_t limit_of(const struct rank_mask *args, uint32_t rank) {
    float limit = ((float)(int32_t)rank * args->step + args->lowest) * KEEP_ALL;
    int32_t whole = (int32_t)limit;
    return whole + ((float)whole < limit);
}

/* Put the elements of a row into buckets: those whose bits differ only in the last `shift` bits; returns `shift`. */
INLINE int fill_buckets(const struct rank_mask *args, const float *row, int64_t columns) {
    uint16_t *restrict bucket = args->bucket;
    uint32_t max_bits = 0, min_bits = UINT32_MAX; /* min_bits: the smallest except zero, minus one */
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        max_bits = bits > max_bits ? bits : max_bits;
        min_bits = bits - 1 < min_bits ? bits - 1 : min_bits;
    }
    min_bits = max_bits > OCTAVES << 23 && min_bits < max_bits - (OCTAVES << 23) ? max_bits - (OCTAVES << 23)
                                                                                 : min_bits + 1;
    int shift = 0;
    while (max_bits && (max_bits >> shift) - (min_bits >> shift) + 1 >= args->buckets) shift++;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        bucket[i] = bits < min_bits || bits == 0 ? 0 : (bits >> shift) - (min_bits >> shift) + 1;
    }
    return shift;
}

/* Compute the limits that decide for all elements of a bucket. */
INLINE void rank_buckets(const struct rank_mask *args, const float *row, int64_t columns, int shift) {
    uint64_t *restrict members = args->members;
    uint32_t *restrict before = args->before;
    const uint16_t *bucket = args->bucket;
    memset(members, 0, args->buckets * sizeof *members);
    for (int64_t i = 0; i < columns; i++) {
        uint64_t *own = members + bucket[i];
        before[i] = *own;
        *own += is_round(magnitude(row[i]), bucket[i], shift) ? 1 : (uint64_t)1 << 32;
    }
    uint32_t *restrict ranks = args->ranks, *restrict sure = args->sure, *restrict possible = args->possible;
    uint32_t rank = 0;
    for (int64_t k = 0; k < args->buckets; k++) {
        ranks[k] = rank;
        rank += (uint32_t)members[k] + (members[k] >> 32);
        possible[k] = rank - 1;
    }
    for (int64_t k = 0; k < args->buckets; k++) {
        sure[k] = limit_of(args, ranks[k]);
        possible[k] = limit_of(args, possible[k]);
    }
}

INLINE void decide(const struct rank_mask *args, int64_t index, uint32_t rank, uint8_t *kept) {
    if (kept[index] == UNSURE) kept[index] = args->draws[index] < limit_of(args, rank);
}

static int compare_uint64(const void *first, const void *second) {
    uint64_t left = *(const uint64_t *)first, right = *(const uint64_t *)second;
    return (left > right) - (left < right);
}

/* Decide for the elements of a bucket that are not round. Returns 0 if `sorted` has no room for them. */
INLINE int sort_bucket(const struct rank_mask *args, uint16_t number, const float *row, int64_t columns, int shift,
                       uint8_t *kept) {
    uint8_t marks[CHUNK];
    uint32_t rank = args->ranks[number] + (uint32_t)args->members[number];
    int64_t sorted_count = 0;
    if ((int64_t)(args->members[number] >> 32) > args->room) return 0;
    for (int64_t start = 0; start < columns; start += CHUNK) {
        int64_t count = min_of(CHUNK, columns - start);
        const uint16_t *bucket = args->bucket + start;
        for (int64_t i = 0; i < count; i++)
            marks[i] = bucket[i] == number && !is_round(magnitude(row[start + i]), number, shift);
        memset(marks + count, 0, CHUNK - count);
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t eight;
            memcpy(&eight, marks + i, sizeof eight);
            for (; eight; eight &= eight - 1) {
                uint64_t index = start + i + __builtin_ctzll(eight) / 8;
                args->sorted[sorted_count++] = (uint64_t)magnitude(row[index]) << 32 | index;
            }
        }
    }
    qsort(args->sorted, sorted_count, sizeof *args->sorted, compare_uint64);
    for (int64_t i = 0; i < sorted_count; i++) decide(args, args->sorted[i] & UINT32_MAX, rank + i, kept);
    return 1;
}

/* Write to `kept` which elements of each row are kept. Returns 1 if there was no room to sort a bucket. */
EVERY_WIDTH int64_t ranked_mask(const float *values, const struct rank_mask *args, int64_t rows, int64_t columns,
                                uint8_t *kept) {
    uint32_t high_words[CHUNK / 4 + 1], low_words[CHUNK / 4 + 1];
    uint8_t choice[CHUNK];
    for (const float *row = values; row < values + rows * columns; row += columns, kept += columns) {
        int shift = fill_buckets(args, row, columns);
        rank_buckets(args, row, columns, shift);
        for (int64_t start = 0; start < columns; start += CHUNK) {
            int64_t count = min_of(CHUNK, columns - start), element = args->element + (row - values) + start;
            const uint8_t *high = random_bytes(args->mask.upper, element, count, high_words);
            const uint8_t *low = random_bytes(args->mask.lower, element, count, low_words);
            const uint32_t *sure = args->sure, *possible = args->possible;
            const uint16_t *bucket = args->bucket + start;
            uint16_t *draws = args->draws + start;
            for (int64_t i = 0; i < count; i++) {
                uint32_t draw = high[i] << 8 | low[i];
                choice[i] = (draw < possible[bucket[i]]) * UNSURE - (draw < sure[bucket[i]]);
            }
            for (int64_t i = 0; i < count; i++) draws[i] = high[i] << 8 | low[i];
            memcpy(kept + start, choice, count);
        }
        for (int64_t start = 0; start < columns; start += 8) {
            uint64_t eight = 0;
            if (columns - start >= 8)
                memcpy(&eight, kept + start, 8);
            else
                memcpy(&eight, kept + start, columns - start);
            for (eight &= 0x0101010101010101 * UNSURE; eight; eight &= eight - 1) {
                int64_t index = start + __builtin_ctzll(eight) / 8;
                uint16_t bucket = args->bucket[index];
                if (is_round(magnitude(row[index]), bucket, shift))
                    decide(args, index, args->ranks[bucket] + args->before[index], kept);
                else if (kept[index] == UNSURE && !sort_bucket(args, bucket, row, columns, shift, kept))
                    return 1;
            }
        }
    }
    return 0;
}
