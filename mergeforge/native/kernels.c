/* Kernels for merging on a CPU: each takes some thousand numbers, which stay in the first cache, through everything.
   What lies in files is read in steps that stay in the second cache.

   Plain C behind ctypes (native.py says what the functions are given). Compiled without contraction to fused
   multiply-adds, so that the numbers are torch's, bit for bit; where torch fuses, fmaf() stands here. On x86-64
   there is a version for every width of vectors, chosen when the library is loaded. */

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define EVERY_WIDTH __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && !defined(__FMA__)
#error "fmaf() would be a slow function: torch does better"
#else
#define EVERY_WIDTH
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files hold numbers with their lowest byte first"
#endif

/* The digest of this file, so that nobody loads what was compiled from another one. */
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

INLINE float of_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

/* Exponents of float16 begin at 2^-112 of a float32's; subnormal numbers come out right by the product, too. */
INLINE float of_f16(uint16_t half) {
    float value = float_of((uint32_t)(half & 0x7fff) << 13) * 0x1p112f;
    uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    return float_of(bits_of(value) | infinite | (uint32_t)(half & 0x8000) << 16);
}

/* Rounded to the nearest, ties to the even one; every NaN is the one that torch writes. */
INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0xffff : rounded;
}

/* As processors do it: a NaN keeps its first bits. Subnormal numbers are rounded by adding 0.5, whose last bit is
   theirs. */
INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t tiny = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t odd = bits > 0x7f800000 ? 0x7e00 | (bits >> 13 & 0x3ff) : 0x7c00;
    return sign | (bits >= 0x47800000 ? odd : bits < 0x38800000 ? tiny : normal);
}

INLINE float number(const void *place, int64_t kind, int64_t at) {
    if (kind == F32) return ((const float *)place)[at];
    uint16_t half = ((const uint16_t *)place)[at];
    return kind == BF16 ? of_bf16(half) : of_f16(half);
}

/* A random mask (methods/random_mask.py): the keys of upper and lower bytes; numbers are kept whose sixteen bits are
   below the limit, and at 65536 all. */
struct mask {
    uint32_t upper[2], lower[2], limit;
};
enum { EVERYTHING = 1 << 16 };

INLINE uint32_t mixed(uint32_t bits, const uint32_t *keys) {
    bits ^= keys[0];
    bits = (bits ^ bits >> 16) * 0x7feb352d;
    bits = (bits ^ bits >> 15 ^ keys[1]) * 0x846ca68b;
    return bits ^ bits >> 16;
}

/* A random byte for each of `count` numbers, in `words`; `element`: the first one's place in its tensor. */
INLINE const uint8_t *random_bytes(const uint32_t *keys, int64_t element, int64_t count, uint32_t *words) {
    for (int64_t i = 0; i < (count + 6) / 4; i++) words[i] = mixed((uint32_t)((element >> 2) + i) * 0x9e3779b9, keys);
    return (const uint8_t *)words + (element & 3);
}

/* 1 for each of `count` numbers that is kept, 0 for others. */
INLINE void draw(const struct mask *mask, int64_t element, int64_t count, float *kept) {
    uint32_t words[CHUNK / 4 + 1], others[CHUNK / 4 + 1];
    const uint8_t *high = random_bytes(mask->upper, element, count, words);
    if (mask->limit & 255) {
        const uint8_t *low = random_bytes(mask->lower, element, count, others);
        for (int64_t i = 0; i < count; i++) kept[i] = (uint32_t)(high[i] << 8 | low[i]) < mask->limit;
    } else {
        for (int64_t i = 0; i < count; i++) kept[i] = high[i] < mask->limit >> 8;
    }
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

INLINE int64_t smaller(int64_t one, int64_t two) { return one < two ? one : two; }

/* Where a tensor's numbers are: in memory from `place` on, or in a file, from byte `place` on. */
struct input {
    int64_t file; /* its descriptor; -1: memory */
    int64_t place;
    int64_t kind;
};

INLINE int64_t size_of(int64_t kind) { return kind == F32 ? 4 : 2; }

static int read_all(int64_t file, char *into, int64_t nbytes, int64_t offset) {
    while (nbytes > 0) {
        ssize_t count = pread((int)file, into, (size_t)nbytes, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return 0;
        into += count, offset += count, nbytes -= count;
    }
    return 1;
}

/* The place in memory of number `start` of every input: `count` numbers of those in files are read into `room`, which
   has place for `step` of each. 0, or 1 + the number of an input that could not be read. */
static int64_t fetch(const struct input *inputs, int64_t parts, int64_t start, int64_t count, int64_t step, char *room,
                     const void **places) {
    for (int64_t at = 0; at < parts; at++) {
        int64_t size = size_of(inputs[at].kind), from = inputs[at].place + start * size;
        if (inputs[at].file < 0) {
            places[at] = (const void *)(intptr_t)from;
            continue;
        }
        if (!read_all(inputs[at].file, room, count * size, from)) return at + 1;
        places[at] = room;
        room += step * sizeof(float);
    }
    return 0;
}

/* Goes through the numbers of inputs, a chunk at a time, and reads them in steps. */
struct walk {
    const struct input *inputs;
    int64_t parts, length, chunk;
    int64_t step;        /* for fetch(): the most numbers that are read at a time, */
    char *room;          /* where to, */
    const void **places; /* and where they are */
    int64_t first, here;  /* the step's first number, and how many they are */
    int64_t start, count; /* the chunk's in it */
    int64_t failed;       /* fetch()'s answer */
};

/* Of the arguments that all have who walk. */
#define OVER(many, size)                                                                                               \
    {.inputs = inputs, .parts = (many), .length = length, .chunk = (size), .step = step, .room = room, .places = places}

/* Whether there is another chunk. */
INLINE int next(struct walk *walk) {
    walk->start += walk->count;
    if (walk->start == walk->here) {
        walk->first += walk->here;
        if (walk->first >= walk->length) return 0;
        walk->here = smaller(walk->step, walk->length - walk->first);
        walk->failed =
            fetch(walk->inputs, walk->parts, walk->first, walk->here, walk->step, walk->room, walk->places);
        if (walk->failed) return 0;
        walk->start = 0;
    }
    walk->count = smaller(walk->chunk, walk->here - walk->start);
    return 1;
}

/* What a method keeps of a tensor by magnitude (methods/bands.py): what reaches `low`, but not what reaches `high`. Of
   the magnitudes that are equal to an edge the first ones do; they are counted off from the tensor's first number on. */
struct edge {
    int64_t bits, ties, left;
};
struct band {
    struct edge low, high;
};
enum { NO_MAGNITUDE = 0x7fffffff }; /* bits that none exceeds */

/* 1 for each number that reaches the edge. */
INLINE void reach(struct edge *edge, const float *numbers, int64_t count, uint8_t *reached) {
    int32_t equal = 0, bits = (int32_t)edge->bits;
    for (int64_t i = 0; i < count; i++) equal += (int32_t)magnitude(numbers[i]) == bits;
    int all = equal <= edge->left;
    for (int64_t i = 0; i < count; i++) reached[i] = (int32_t)magnitude(numbers[i]) >= bits + !all;
    for (int64_t i = 0; !all && edge->left > 0; i++)
        if ((int32_t)magnitude(numbers[i]) == bits) reached[i] = 1, edge->left--;
    if (all) edge->left -= equal;
}

/* Zero instead of what the band leaves out; `begins`: with the tensor's first number. */
INLINE void trim(struct band *band, int begins, int64_t count, float *numbers) {
    uint8_t outer[CHUNK], inner[CHUNK];
    if (begins) band->low.left = band->low.ties, band->high.left = band->high.ties;
    reach(&band->low, numbers, count, outer);
    if (band->high.bits < NO_MAGNITUDE) {
        reach(&band->high, numbers, count, inner);
        for (int64_t i = 0; i < count; i++) outer[i] &= !inner[i];
    }
    for (int64_t i = 0; i < count; i++) numbers[i] = outer[i] ? numbers[i] : 0;
}

/* A weighted sum: base + scale * (sum of factor * (input - base)) / divisor. `fused`: products are added unrounded. */
struct sum {
    int64_t inputs;
    int64_t based; /* whether a base comes after the inputs */
    int64_t fused;
    int64_t swaps; /* instead: (1 - w) * first + w * second input, w = near / |first - second| and at most 1 */
    int64_t element; /* the place of number 0 in its tensor */
    const float *factors;
    const struct mask *masks; /* what is kept of each input, or none: all */
    struct band *bands;       /* the same, by magnitude; where `low` has bits below zero, all */
    const float *weights;     /* of each input, for what elect() makes instead of a sum, or none */
    float *const *products;   /* room for that: a chunk of each input */
    int64_t normalize;        /* for elect() */
    float divisor, scale, near;
};

INLINE int keeps_all(const struct sum *sum, int64_t at) {
    return sum->bands ? sum->bands[at].low.bits < 0 : !sum->masks || sum->masks[at].limit == EVERYTHING;
}

/* Zero instead of those numbers of an input that are not kept; `first`: the first one's number. */
INLINE void keep(const struct sum *sum, int64_t at, int64_t first, int64_t count, float *numbers) {
    float kept[CHUNK];
    if (sum->bands)
        trim(sum->bands + at, sum->element + first == 0, count, numbers);
    else {
        draw(sum->masks + at, sum->element + first, count, kept);
        for (int64_t i = 0; i < count; i++) numbers[i] *= kept[i];
    }
}

/* nearswap's sum; the first input's numbers. */
INLINE const float *swap(const struct walk *at, float near, float *base, float *total) {
    take(at->places[0], at->inputs[0].kind, at->start, at->count, ZEROS, base);
    take(at->places[1], at->inputs[1].kind, at->start, at->count, ZEROS, total);
    for (int64_t i = 0; i < at->count; i++) {
        float distance = fabsf(base[i] - total[i]);
        float share = 1 / (distance < 1e-6f ? 1e-6f : distance) * near;
        share = share > 1 ? 1 : share;
        total[i] = (1 - share) * base[i] + share * total[i];
    }
    return base;
}

/* The sign of the sum of all inputs (zero: plus), of `count` numbers from `start` on. */
INLINE void elect_signs(float *const *inputs, int64_t many, int64_t start, int64_t count, float *sign) {
    for (int64_t i = 0; i < count; i++) sign[i] = -0.0f;
    for (int64_t at = 0; at < many; at++) {
        const float *one = inputs[at] + start;
        for (int64_t i = 0; i < count; i++) sign[i] += one[i];
    }
    for (int64_t i = 0; i < count; i++) sign[i] = sign[i] >= 0 ? 1 : -1;
}

/* TIES' election: `scale` times the sum of those products that have the elected sign, by `normalize` divided by the
   weights of these. `count` products of each input, from number `start` on. */
INLINE void elect(float *const *products, int64_t inputs, const float *weights, int64_t normalize, float scale,
                  int64_t start, int64_t count, float *total) {
    float sign[CHUNK], divisor[CHUNK];
    elect_signs(products, inputs, start, count, sign);
    for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
    for (int64_t at = 0; at < inputs; at++) {
        const float *product = products[at] + start, weight = weights[at];
        for (int64_t i = 0; i < count; i++) {
            float one = product[i] * sign[i];
            float agrees = one > 0;
            total[i] += one < 0 ? 0 : one;
            divisor[i] += agrees * weight;
        }
    }
    if (normalize)
        for (int64_t i = 0; i < count; i++) total[i] /= divisor[i] == 0 ? 1 : divisor[i];
    for (int64_t i = 0; i < count; i++) total[i] *= sign[i] * scale;
}

/* What is kept of a chunk of an input. */
INLINE void take_kept(const struct sum *sum, const struct walk *walk, int64_t at, const float *less, float *into) {
    take(walk->places[at], walk->inputs[at].kind, walk->start, walk->count, less, into);
    if (!keeps_all(sum, at)) keep(sum, at, walk->first + walk->start, walk->count, into);
}

/* A weighted sum. */
INLINE void add_all(const struct sum *sum, const struct walk *walk, const float *less, float *total) {
    float kept[CHUNK];
    int64_t start = walk->start, count = walk->count;
    for (int64_t i = 0; i < count; i++) total[i] = -0.0f; /* what changes no number that is added to it */
    for (int64_t at = 0; at < sum->inputs; at++) {
        float factor = sum->factors[at];
        if (keeps_all(sum, at))
            add(walk->places[at], walk->inputs[at].kind, start, count, less, factor, sum->fused, total);
        else {
            take_kept(sum, walk, at, less, kept);
            add(kept, F32, 0, count, ZEROS, factor, sum->fused, total);
        }
    }
    if (sum->divisor != 1)
        for (int64_t i = 0; i < count; i++) total[i] /= sum->divisor;
    if (sum->scale != 1)
        for (int64_t i = 0; i < count; i++) total[i] *= sum->scale;
}

/* A sum of what is elected. */
INLINE void add_elected(const struct sum *sum, const struct walk *walk, const float *less, float *total) {
    for (int64_t at = 0; at < sum->inputs; at++) {
        float *product = sum->products[at], factor = sum->factors[at];
        take_kept(sum, walk, at, less, product);
        for (int64_t i = 0; i < walk->count; i++) product[i] *= factor;
    }
    elect(sum->products, sum->inputs, sum->weights, sum->normalize, sum->scale, 0, walk->count, total);
}

/* A chunk (at most CHUNK numbers) of the sum, and of the base, or zeros: a number less zero is the number. */
INLINE const float *add_up(const struct sum *sum, const struct walk *at, float *base, float *total) {
    if (sum->swaps) return swap(at, sum->near, base, total);
    const float *less = ZEROS;
    if (sum->based) {
        take(at->places[sum->inputs], at->inputs[sum->inputs].kind, at->start, at->count, ZEROS, base);
        less = base;
    }
    if (sum->weights)
        add_elected(sum, at, less, total);
    else
        add_all(sum, at, less, total);
    if (sum->based)
        for (int64_t i = 0; i < at->count; i++) total[i] += base[i];
    return less;
}

INLINE void put(const float *from, int64_t count, int64_t kind, void *into, int64_t at) {
    if (kind == F32)
        memcpy((float *)into + at, from, count * sizeof(float));
    else if (kind == F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)into)[at + i] = to_f16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)into)[at + i] = to_bf16(from[i]);
}

INLINE float rounded(float value, int64_t kind) {
    return kind == F32 ? value : kind == F16 ? of_f16(to_f16(value)) : of_bf16(to_bf16(value));
}

/* What a sum makes of the base, adding to `found`: squares of the base and of the changes, the largest change (kept,
   not added), how many numbers change, and how many of these do not once they are rounded to `kind`. */
INLINE void compare(const float *before, const float *after, int64_t count, int64_t kind, double *found) {
    for (int64_t i = 0; i < count; i++) {
        float change = after[i] - before[i];
        int moves = change != 0;
        found[0] += (double)before[i] * before[i];
        found[1] += (double)change * change;
        found[2] = fabsf(change) > found[2] ? fabsf(change) : found[2];
        found[3] += moves;
        found[4] += moves && rounded(after[i], kind) == rounded(before[i], kind);
    }
}

/* `length` numbers of a sum, rounded to `kind`. `most`: the bits of the largest magnitude, before that. `found`: for
   compare(), or none. `step`, `room`, `places`: for fetch(), whose answer is returned. */
EVERY_WIDTH int64_t weighted_sum(const struct input *inputs, const struct sum *sum, int64_t length, int64_t kind,
                                 void *out, uint32_t *most, double *found, int64_t step, char *room,
                                 const void **places) {
    float base[CHUNK], total[CHUNK];
    uint32_t largest = 0;
    struct walk at = OVER(sum->inputs + sum->based, CHUNK);
    while (next(&at)) {
        const float *before = add_up(sum, &at, base, total);
        if (found) compare(before, total, at.count, kind, found);
        for (int64_t i = 0; i < at.count; i++) {
            uint32_t bits = magnitude(total[i]);
            largest = bits > largest ? bits : largest;
        }
        put(total, at.count, kind, out, at.first + at.start);
    }
    *most = largest;
    return at.failed;
}

/* One input, less the base if it is `based`. inputs: the input, the base. */
EVERY_WIDTH int64_t difference(const struct input *inputs, int64_t based, int64_t length, float *out, int64_t step,
                               char *room, const void **places) {
    float base[CHUNK];
    struct walk at = OVER(1 + based, CHUNK);
    while (next(&at)) {
        if (based) take(places[1], inputs[1].kind, at.start, at.count, ZEROS, base);
        take(places[0], inputs[0].kind, at.start, at.count, based ? base : ZEROS, out + at.first + at.start);
    }
    return at.failed;
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

INLINE double total_of(const float *numbers, int64_t count) {
    Doubles total[4] = {{0}, {0}, {0}, {0}};
    int64_t at = 0;
    for (; at + 4 * LANES <= count; at += 4 * LANES)
        for (int part = 0; part < 4; part++) {
            Floats some;
            memcpy(&some, numbers + at + part * LANES, sizeof some);
            total[part] += __builtin_convertvector(some, Doubles);
        }
    total[0] += total[1] + (total[2] + total[3]);
    double sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += total[0][lane];
    for (; at < count; at++) sum += numbers[at];
    return sum;
}

/* Adds to `sums` for each input of a sum its magnitudes, and those that are kept. */
EVERY_WIDTH int64_t masses(const struct input *inputs, const struct sum *sum, int64_t length, double *sums,
                           int64_t step, char *room, const void **places) {
    float base[CHUNK], one[CHUNK];
    struct walk walk = OVER(sum->inputs + sum->based, CHUNK);
    while (next(&walk)) {
        int64_t start = walk.start, count = walk.count;
        if (sum->based) take(places[sum->inputs], inputs[sum->inputs].kind, start, count, ZEROS, base);
        for (int64_t at = 0; at < sum->inputs; at++) {
            take(places[at], inputs[at].kind, start, count, sum->based ? base : ZEROS, one);
            for (int64_t i = 0; i < count; i++) one[i] = fabsf(one[i]);
            double all = total_of(one, count);
            sums[2 * at] += all;
            if (!keeps_all(sum, at)) {
                keep(sum, at, walk.first + start, count, one);
                all = total_of(one, count);
            }
            sums[2 * at + 1] += all;
        }
    }
    return walk.failed;
}

/* Adds to `sums` the inner products of every input (less the base) with itself and those that follow it.
   `doubles`: PRODUCT_CHUNK of them for each input. */
EVERY_WIDTH int64_t inner_products(const struct input *inputs, int64_t count, int64_t based, int64_t length,
                                   double *doubles, double *sums, int64_t step, char *room, const void **places) {
    float base[PRODUCT_CHUNK];
    struct walk walk = OVER(count + based, PRODUCT_CHUNK);
    while (next(&walk)) {
        int64_t pair = 0;
        if (based) take(places[count], inputs[count].kind, walk.start, walk.count, ZEROS, base);
        for (int64_t at = 0; at < count; at++)
            take_doubles(places[at], inputs[at].kind, walk.start, walk.count, based ? base : ZEROS,
                         doubles + at * PRODUCT_CHUNK);
        for (int64_t at = 0; at < count; at++)
            for (int64_t other = at; other < count; other++)
                sums[pair++] += dot(doubles + at * PRODUCT_CHUNK, doubles + other * PRODUCT_CHUNK, walk.count);
    }
    return walk.failed;
}

/* How many of `count` (at most CHUNK) magnitudes have bits of `high` at least is added to `beyond`. The bits of those
   in [low, high), less `low`, go into `inside`; their number is returned. Few are: eight at a time are passed over. */
INLINE int64_t split_chunk(const float *numbers, int64_t count, int32_t low, int32_t high, int32_t *inside,
                           int64_t *beyond) {
    uint8_t marks[CHUNK];
    int64_t found = 0;
    int32_t more = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = magnitude(numbers[i]);
        more += bits >= high;
        marks[i] = (bits >= low) & (bits < high);
    }
    memset(marks + count, 0, CHUNK - count);
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t eight;
        memcpy(&eight, marks + i, sizeof eight);
        for (; eight; eight &= eight - 1) inside[found++] = magnitude(numbers[i + __builtin_ctzll(eight) / 8]) - low;
    }
    *beyond += more;
    return found;
}

/* The same of any number of magnitudes; `inside` has room for all. */
EVERY_WIDTH int64_t split(const float *numbers, int64_t count, int32_t low, int32_t high, int32_t *inside,
                          int64_t *beyond) {
    int64_t found = 0;
    for (int64_t start = 0; start < count; start += CHUNK)
        found += split_chunk(numbers + start, smaller(CHUNK, count - start), low, high, inside + found, beyond);
    return found;
}

/* The same of inputs less the base, once or more of each; in the order of the inputs. */
struct range {
    int64_t input;
    int32_t low, high;
    int32_t *inside;
    int64_t found, beyond;
};

EVERY_WIDTH int64_t split_inputs(const struct input *inputs, int64_t parts, int64_t based, int64_t length,
                                 struct range *ranges, int64_t many, int64_t step, char *room, const void **places) {
    float base[CHUNK], one[CHUNK];
    struct walk walk = OVER(parts + based, CHUNK);
    while (next(&walk)) {
        if (based) take(places[parts], inputs[parts].kind, walk.start, walk.count, ZEROS, base);
        for (int64_t at = 0; at < many; at++) {
            struct range *in = ranges + at;
            if (!at || in->input != in[-1].input)
                take(places[in->input], inputs[in->input].kind, walk.start, walk.count, based ? base : ZEROS, one);
            in->found += split_chunk(one, walk.count, in->low, in->high, in->inside + in->found, &in->beyond);
        }
    }
    return walk.failed;
}

/* arcee_fusion: |other - base| times its row's shift. */
EVERY_WIDTH int64_t importance(const float *base, const float *other, const float *shifts, int64_t rows,
                               int64_t columns, float *out) {
    for (int64_t row = 0; row < rows; row++, base += columns, other += columns, out += columns)
        for (int64_t i = 0; i < columns; i++) out[i] = fabsf(other[i] - base[i]) * shifts[row];
    return 0;
}

/* The same where it reaches a threshold: the other's numbers, else the base's, into `other`. */
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

/* TIES' election among factor * delta, which are overwritten: the first by the sum. */
EVERY_WIDTH int64_t agreeing_sum(float *const *deltas, int64_t inputs, const float *factors, const float *weights,
                                 int64_t normalize, float scale, int64_t length) {
    float total[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = smaller(CHUNK, length - start);
        for (int64_t at = 0; at < inputs; at++) {
            float *delta = deltas[at] + start, factor = factors[at];
            for (int64_t i = 0; i < count; i++) delta[i] *= factor;
        }
        elect(deltas, inputs, weights, normalize, scale, start, count, total);
        memcpy(deltas[0] + start, total, count * sizeof(float));
    }
    return 0;
}

/* sce: of each element the variance over the inputs, in float64 and of distances from the first. */
EVERY_WIDTH int64_t variance(const float *const *deltas, int64_t inputs, int64_t length, float *out) {
    double total[CHUNK], squares[CHUNK], count = inputs, share = 1 / (count * count);
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t some = smaller(CHUNK, length - start);
        const float *origin = deltas[0] + start;
        for (int64_t i = 0; i < some; i++) total[i] = squares[i] = 0;
        for (int64_t at = 1; at < inputs; at++) {
            const float *delta = deltas[at] + start;
            for (int64_t i = 0; i < some; i++) {
                double apart = (double)delta[i] - origin[i];
                total[i] += apart;
                squares[i] += apart * apart;
            }
        }
        for (int64_t i = 0; i < some; i++) out[start + i] = (squares[i] * count - total[i] * total[i]) * share;
    }
    return 0;
}

/* sce: the weighted mean of those deltas that have the elected sign, into the first one. */
EVERY_WIDTH int64_t agreeing_mean(float *const *deltas, int64_t inputs, const float *weights, float least,
                                  int64_t length) {
    float sign[CHUNK], total[CHUNK], divisor[CHUNK];
    for (int64_t start = 0; start < length; start += CHUNK) {
        int64_t count = smaller(CHUNK, length - start);
        elect_signs(deltas, inputs, start, count, sign);
        for (int64_t i = 0; i < count; i++) total[i] = divisor[i] = 0;
        for (int64_t at = 0; at < inputs; at++) {
            const float *delta = deltas[at] + start, weight = weights[at];
            for (int64_t i = 0; i < count; i++) {
                float one = delta[i] * sign[i];
                float agrees = one > 0;
                total[i] = fmaf(one < 0 ? 0 : one, weight, total[i]);
                divisor[i] += agrees * weight;
            }
        }
        float *out = deltas[0] + start;
        for (int64_t i = 0; i < count; i++) out[i] = total[i] * sign[i] / (divisor[i] < least ? least : divisor[i]);
    }
    return 0;
}

/* della: how numbers are kept by their ranks in their row (of magnitudes; equal ones by their places) and by a random
   draw, which must be below 65536 * (lowest + step * rank). Numbers of about one magnitude share a bucket, which tells
   nearly enough of their ranks: most draws are far from their limits, and little has to be sorted. */
struct ranking {
    int64_t element; /* the first number's place in its tensor */
    struct mask mask;
    float lowest, step;
    int64_t buckets, room;
    uint64_t *members;                 /* of each bucket: how many are round, and others << 32 */
    uint32_t *ranks, *sure, *possible; /* of each bucket: its lowest rank; the limits of that, and of its highest one */
    uint16_t *bucket, *draws;          /* of each number of a row */
    uint32_t *before;                  /* of each number: how many round ones its bucket has before it */
    uint64_t *sorted;                  /* `room` for a bucket's members that are not round: bits and place of each */
};
enum { DROPPED, KEPT, UNSURE };
enum { OCTAVES = 24 }; /* below the largest of a row; what is smaller shares the first bucket with zeros */

/* Whether a number is the least that its bucket can hold, as most are that come of 16 bits. */
INLINE int is_round(uint32_t bits, uint16_t bucket, int shift) {
    return !(bucket ? bits & ((1u << shift) - 1) : bits);
}

INLINE uint32_t limit_of(const struct ranking *by, uint32_t rank) {
    float limit = ((float)(int32_t)rank * by->step + by->lowest) * EVERYTHING;
    int32_t whole = (int32_t)limit;
    return whole + ((float)whole < limit);
}

/* Puts a row's numbers into buckets: those whose bits are equal but for the last `shift`, which is returned. */
INLINE int fill_buckets(const struct ranking *by, const float *row, int64_t columns) {
    uint16_t *restrict bucket = by->bucket;
    uint32_t most = 0, least = UINT32_MAX; /* the smallest but zero, less one */
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        most = bits > most ? bits : most;
        least = bits - 1 < least ? bits - 1 : least;
    }
    least = most > OCTAVES << 23 && least < most - (OCTAVES << 23) ? most - (OCTAVES << 23) : least + 1;
    int shift = 0;
    while (most && (most >> shift) - (least >> shift) + 1 >= by->buckets) shift++;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        bucket[i] = bits < least || bits == 0 ? 0 : (bits >> shift) - (least >> shift) + 1;
    }
    return shift;
}

/* The limits that decide for all members of a bucket. */
INLINE void rank_buckets(const struct ranking *by, const float *row, int64_t columns, int shift) {
    uint64_t *restrict members = by->members;
    uint32_t *restrict before = by->before;
    const uint16_t *bucket = by->bucket;
    memset(members, 0, by->buckets * sizeof *members);
    for (int64_t i = 0; i < columns; i++) {
        uint64_t *here = members + bucket[i];
        before[i] = *here;
        *here += is_round(magnitude(row[i]), bucket[i], shift) ? 1 : (uint64_t)1 << 32;
    }
    uint32_t *restrict ranks = by->ranks, *restrict sure = by->sure, *restrict possible = by->possible;
    uint32_t rank = 0;
    for (int64_t at = 0; at < by->buckets; at++) {
        ranks[at] = rank;
        rank += (uint32_t)members[at] + (members[at] >> 32);
        possible[at] = rank - 1;
    }
    for (int64_t at = 0; at < by->buckets; at++) {
        sure[at] = limit_of(by, ranks[at]);
        possible[at] = limit_of(by, possible[at]);
    }
}

INLINE void decide(const struct ranking *by, int64_t at, uint32_t rank, uint8_t *kept) {
    if (kept[at] == UNSURE) kept[at] = by->draws[at] < limit_of(by, rank);
}

static int ordered(const void *one, const void *other) {
    uint64_t left = *(const uint64_t *)one, right = *(const uint64_t *)other;
    return (left > right) - (left < right);
}

/* Decides for the members of a bucket that are not round. 0: there is no room for them. */
INLINE int sort_out(const struct ranking *by, uint16_t number, const float *row, int64_t columns, int shift,
                     uint8_t *kept) {
    uint8_t marks[CHUNK];
    uint32_t rank = by->ranks[number] + (uint32_t)by->members[number];
    int64_t found = 0;
    if ((int64_t)(by->members[number] >> 32) > by->room) return 0;
    for (int64_t start = 0; start < columns; start += CHUNK) {
        int64_t count = smaller(CHUNK, columns - start);
        const uint16_t *bucket = by->bucket + start;
        for (int64_t i = 0; i < count; i++)
            marks[i] = bucket[i] == number && !is_round(magnitude(row[start + i]), number, shift);
        memset(marks + count, 0, CHUNK - count);
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t eight;
            memcpy(&eight, marks + i, sizeof eight);
            for (; eight; eight &= eight - 1) {
                uint64_t at = start + i + __builtin_ctzll(eight) / 8;
                by->sorted[found++] = (uint64_t)magnitude(row[at]) << 32 | at;
            }
        }
    }
    qsort(by->sorted, found, sizeof *by->sorted, ordered);
    for (int64_t i = 0; i < found; i++) decide(by, by->sorted[i] & UINT32_MAX, rank + i, kept);
    return 1;
}

/* Which numbers of each row are kept. 1: there was no room. */
EVERY_WIDTH int64_t ranked_mask(const float *numbers, const struct ranking *by, int64_t rows, int64_t columns,
                                uint8_t *kept) {
    uint32_t words[CHUNK / 4 + 1], others[CHUNK / 4 + 1];
    uint8_t choice[CHUNK];
    for (const float *row = numbers; row < numbers + rows * columns; row += columns, kept += columns) {
        int shift = fill_buckets(by, row, columns);
        rank_buckets(by, row, columns, shift);
        for (int64_t start = 0; start < columns; start += CHUNK) {
            int64_t count = smaller(CHUNK, columns - start), element = by->element + (row - numbers) + start;
            const uint8_t *high = random_bytes(by->mask.upper, element, count, words);
            const uint8_t *low = random_bytes(by->mask.lower, element, count, others);
            const uint32_t *sure = by->sure, *possible = by->possible;
            const uint16_t *bucket = by->bucket + start;
            uint16_t *draws = by->draws + start;
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
                int64_t at = start + __builtin_ctzll(eight) / 8;
                uint16_t bucket = by->bucket[at];
                if (is_round(magnitude(row[at]), bucket, shift))
                    decide(by, at, by->ranks[bucket] + by->before[at], kept);
                else if (kept[at] == UNSURE && !sort_out(by, bucket, row, columns, shift, kept))
                    return 1;
            }
        }
    }
    return 0;
}
