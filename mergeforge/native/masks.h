/* Which elements of an input are kept: at random (dare), by magnitude (ties, breadcrumbs), by rank (della). */

#ifndef MERGEFORGE_MASKS_H
#define MERGEFORGE_MASKS_H

#include <stdlib.h>

#include "floats.h"

/* A random mask (methods/random_mask.py): the keys of the upper and lower random bytes. An element is kept if its
   sixteen random bits are below the limit; a limit of 65536 keeps all. */
struct random_mask {
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
    uint32_t first = (uint32_t)(element >> 2);
    for (uint32_t i = 0; i < (uint32_t)(count + 6) / 4; i++) words[i] = lowbias32((first + i) * 0x9e3779b9, keys);
    return (const uint8_t *)words + (element & 3);
}

/* 1 for each of `count` elements that the mask keeps, 0 for the others. */
INLINE void draw_mask(const struct random_mask *mask, int64_t element, int64_t count, float *kept) {
    uint32_t high_words[CHUNK / 4 + 1], low_words[CHUNK / 4 + 1];
    const uint8_t *high = random_bytes(mask->upper, element, count, high_words);
    if (mask->limit & 255) {
        const uint8_t *low = random_bytes(mask->lower, element, count, low_words);
        for (int64_t i = 0; i < count; i++) kept[i] = (uint32_t)(high[i] << 8 | low[i]) < mask->limit;
    } else {
        for (int64_t i = 0; i < count; i++) kept[i] = high[i] < mask->limit >> 8;
    }
}

/* The elements that are kept by magnitude (methods/keep.py): those that reach `lower` but not `upper`. Of the magnitudes
   equal to a threshold, the first `ties` count as reaching it; they are counted from the first element of the tensor. */
struct threshold {
    int64_t bits, ties, ties_left;
};
struct magnitude_range {
    struct threshold lower, upper;
};
enum { NO_MAGNITUDE = 0x7fffffff }; /* bits that no magnitude exceeds */
enum { ALL_TIES = 0x7fffffff };     /* as `ties`: all of them */

/* The bits that magnitudes of these values must have at least to reach the threshold; -1 if some of those that are equal
   to it reach it and some do not. */
INLINE int32_t reached_from(struct threshold *threshold, const float *values, int64_t count) {
    int32_t equal = 0, bits = (int32_t)threshold->bits;
    if (threshold->ties == ALL_TIES) return bits;
    if (!threshold->ties_left) return bits + 1;
    for (int64_t i = 0; i < count; i++) equal += (int32_t)magnitude(values[i]) == bits;
    if (equal > threshold->ties_left) return -1;
    threshold->ties_left -= equal;
    return bits;
}

/* Zero the values whose magnitudes have bits below `low`, or of `high` at least. */
INLINE void zero_outside(int32_t low, int32_t high, int64_t count, float *values) {
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)magnitude(values[i]);
        values[i] = ((bits >= low) & (bits < high)) ? values[i] : 0;
    }
}

/* Whether a magnitude reaches a threshold, whose ties are counted off one by one. */
INLINE int reaches(struct threshold *threshold, int32_t bits) {
    if (bits != threshold->bits || threshold->ties == ALL_TIES) return bits >= threshold->bits;
    return threshold->ties_left > 0 && threshold->ties_left--;
}

/* Zero the values outside the range; `is_first`: they start with the tensor's first element. */
INLINE void trim_range(struct magnitude_range *range, int is_first, int64_t count, float *values) {
    if (is_first) range->lower.ties_left = range->lower.ties, range->upper.ties_left = range->upper.ties;
    struct magnitude_range before = *range;
    int32_t low = reached_from(&range->lower, values, count), high = NO_MAGNITUDE;
    if (range->upper.bits < NO_MAGNITUDE) high = reached_from(&range->upper, values, count);
    if (low >= 0 && high >= 0) {
        if (high < NO_MAGNITUDE)
            zero_outside(low, high, count, values);
        else
            for (int64_t i = 0; i < count; i++) values[i] = (int32_t)magnitude(values[i]) >= low ? values[i] : 0;
        return;
    }
    *range = before;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits = (int32_t)magnitude(values[i]);
        int is_kept = reaches(&range->lower, bits);
        if (range->upper.bits < NO_MAGNITUDE) is_kept &= !reaches(&range->upper, bits);
        values[i] = is_kept ? values[i] : 0;
    }
}

/* A mask by rank: an element is kept if a random draw is below a limit that grows with the rank of its magnitude in its
   row (equal magnitudes are ordered by position).

   Elements of similar magnitude share a bucket, which tells nearly enough about their ranks: most draws are far from
   their limits, and little has to be sorted. */
struct rank_mask {
    struct random_mask mask;          /* its limit says only whether all elements are kept */
    uint32_t density[2], epsilon[2]; /* float64 numbers: the mean of a row's limits, and the distance to its ends */
};

/* The limits of a row: 65536 * (lowest + step * rank). */
struct rank_limits {
    float lowest, step;
};

INLINE struct rank_limits limits_of_row(const struct rank_mask *mask, int64_t columns) {
    double density, epsilon;
    memcpy(&density, mask->density, sizeof density);
    memcpy(&epsilon, mask->epsilon, sizeof epsilon);
    if (columns < 2) return (struct rank_limits){(float)density, 0};
    return (struct rank_limits){(float)(density - epsilon), (float)(2 * epsilon / (double)(columns - 1))};
}

/* Buffers for rank masks of rows with so many columns. */
struct rank_buffers {
    int64_t buckets;
    uint64_t *members;                 /* per bucket: the number of round elements, and of others << 32 */
    uint64_t *sorted;                  /* per element: bits and position of a bucket's elements that are not round */
    uint32_t *ranks, *sure, *possible; /* per bucket: its lowest rank; the limits of that rank and of its highest one */
    uint32_t *before;                  /* per element: how many round elements precede it in its bucket */
    uint16_t *bucket, *draws;          /* per element */
};
enum { DROPPED, KEPT, UNSURE };
enum { OCTAVES = 24 }; /* below the largest of a row; smaller magnitudes share the first bucket with the zeros */

INLINE int64_t bucket_count(int64_t columns) {
    return columns / 2 < 64 ? 64 : columns / 2 < 1 << 16 ? columns / 2 : 1 << 16;
}

/* The size of all buffers together. */
INLINE int64_t rank_buffers_nbytes(int64_t columns) { return bucket_count(columns) * 20 + columns * 16; }

/* Divide `memory`, aligned to eight bytes, into the buffers. */
INLINE struct rank_buffers make_rank_buffers(char *memory, int64_t columns) {
    struct rank_buffers buffers = {.buckets = bucket_count(columns)};
    buffers.members = (uint64_t *)(void *)memory;
    buffers.sorted = buffers.members + buffers.buckets;
    buffers.ranks = (uint32_t *)(void *)(buffers.sorted + columns);
    buffers.sure = buffers.ranks + buffers.buckets;
    buffers.possible = buffers.sure + buffers.buckets;
    buffers.before = buffers.possible + buffers.buckets;
    buffers.bucket = (uint16_t *)(void *)(buffers.before + columns);
    buffers.draws = buffers.bucket + columns;
    return buffers;
}

/* Bytes that hold a bit for each element of a row. */
INLINE int64_t rank_row_nbytes(int64_t columns) { return (columns + 7) / 8; }

/* Eight marks, each 0 or 1, as the bits of a byte, and the other way round. */
INLINE void pack_marks(const uint8_t *marks, int64_t count, uint8_t *bits) {
    for (int64_t i = 0; i < count; i += 8) {
        uint64_t eight = 0;
        memcpy(&eight, marks + i, (size_t)min_of(8, count - i));
        bits[i / 8] = (uint8_t)(eight * 0x0102040810204080 >> 56);
    }
}

INLINE void unpack_marks(const uint8_t *bits, int64_t count, uint8_t *marks) {
    for (int64_t i = 0; i < count; i++) marks[i] = bits[i / 8] >> i % 8 & 1;
}

/* Whether a magnitude is the smallest of its bucket, as most are that were 16-bit numbers. */
INLINE int is_round(uint32_t bits, uint16_t bucket, int shift) {
    return !(bucket ? bits & ((1u << shift) - 1) : bits);
}

/* A draw below this limit keeps an element of the rank. */
INLINE uint32_t limit_of(struct rank_limits limits, uint32_t rank) {
    float limit = ((float)(int32_t)rank * limits.step + limits.lowest) * KEEP_ALL;
    int32_t whole = (int32_t)limit;
    return (uint32_t)(whole + ((float)whole < limit));
}

/* Put the elements of a row into buckets: those whose bits differ only in the last `shift` bits; returns `shift`. */
INLINE int fill_buckets(const struct rank_buffers *buffers, const float *row, int64_t columns) {
    uint16_t *restrict bucket = buffers->bucket;
    uint32_t max_bits = 0, min_bits = UINT32_MAX; /* min_bits: the smallest except zero, minus one */
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        max_bits = bits > max_bits ? bits : max_bits;
        min_bits = bits - 1 < min_bits ? bits - 1 : min_bits;
    }
    min_bits = max_bits > OCTAVES << 23 && min_bits < max_bits - (OCTAVES << 23) ? max_bits - (OCTAVES << 23)
                                                                                 : min_bits + 1;
    int shift = 0;
    while (max_bits && (max_bits >> shift) - (min_bits >> shift) + 1 >= buffers->buckets) shift++;
    for (int64_t i = 0; i < columns; i++) {
        uint32_t bits = magnitude(row[i]);
        bucket[i] = (uint16_t)(bits < min_bits || bits == 0 ? 0 : (bits >> shift) - (min_bits >> shift) + 1);
    }
    return shift;
}

/* Compute the limits that decide for all elements of a bucket. */
INLINE void rank_buckets(struct rank_limits limits, const struct rank_buffers *buffers, const float *row,
                         int64_t columns, int shift) {
    uint64_t *restrict members = buffers->members;
    uint32_t *restrict before = buffers->before;
    const uint16_t *bucket = buffers->bucket;
    memset(members, 0, (size_t)buffers->buckets * sizeof *members);
    for (int64_t i = 0; i < columns; i++) {
        uint64_t *own = members + bucket[i];
        before[i] = (uint32_t)*own;
        *own += is_round(magnitude(row[i]), bucket[i], shift) ? 1 : (uint64_t)1 << 32;
    }
    uint32_t *restrict ranks = buffers->ranks, *restrict sure = buffers->sure, *restrict possible = buffers->possible;
    uint32_t rank = 0;
    for (int64_t k = 0; k < buffers->buckets; k++) {
        ranks[k] = rank;
        rank += (uint32_t)members[k] + (uint32_t)(members[k] >> 32);
        possible[k] = rank - 1;
    }
    for (int64_t k = 0; k < buffers->buckets; k++) {
        sure[k] = limit_of(limits, ranks[k]);
        possible[k] = limit_of(limits, possible[k]);
    }
}

INLINE void decide(struct rank_limits limits, const struct rank_buffers *buffers, int64_t index, uint32_t rank,
                   uint8_t *kept) {
    if (kept[index] == UNSURE) kept[index] = buffers->draws[index] < limit_of(limits, rank);
}

static inline int compare_uint64(const void *first, const void *second) {
    uint64_t left = *(const uint64_t *)first, right = *(const uint64_t *)second;
    return (left > right) - (left < right);
}

/* Decide for the elements of a bucket that are not round. */
INLINE void sort_bucket(struct rank_limits limits, const struct rank_buffers *buffers, uint16_t number,
                        const float *row, int64_t columns, int shift, uint8_t *kept) {
    uint8_t marks[CHUNK];
    uint32_t rank = buffers->ranks[number] + (uint32_t)buffers->members[number];
    int64_t sorted_count = 0;
    for (int64_t start = 0; start < columns; start += CHUNK) {
        int64_t count = min_of(CHUNK, columns - start);
        const uint16_t *bucket = buffers->bucket + start;
        for (int64_t i = 0; i < count; i++)
            marks[i] = bucket[i] == number && !is_round(magnitude(row[start + i]), number, shift);
        memset(marks + count, 0, (size_t)(CHUNK - count));
        for (int64_t i = 0; i < count; i += 8) {
            uint64_t eight;
            memcpy(&eight, marks + i, sizeof eight);
            for (; eight; eight &= eight - 1) {
                uint64_t index = (uint64_t)(start + i + __builtin_ctzll(eight) / 8);
                buffers->sorted[sorted_count++] = (uint64_t)magnitude(row[index]) << 32 | index;
            }
        }
    }
    qsort(buffers->sorted, (size_t)sorted_count, sizeof *buffers->sorted, compare_uint64);
    for (int64_t i = 0; i < sorted_count; i++)
        decide(limits, buffers, (int64_t)(buffers->sorted[i] & UINT32_MAX), rank + (uint32_t)i, kept);
}

/* Write to `kept` which elements of a row are kept. `element`: the index of the first one in its tensor. */
INLINE void rank_row(const struct rank_mask *mask, const struct rank_buffers *buffers, int64_t element,
                     const float *row, int64_t columns, uint8_t *kept) {
    uint32_t high_words[CHUNK / 4 + 1], low_words[CHUNK / 4 + 1];
    uint8_t choice[CHUNK];
    int shift = fill_buckets(buffers, row, columns);
    struct rank_limits limits = limits_of_row(mask, columns);
    rank_buckets(limits, buffers, row, columns, shift);
    for (int64_t start = 0; start < columns; start += CHUNK) {
        int64_t count = min_of(CHUNK, columns - start);
        const uint8_t *high = random_bytes(mask->mask.upper, element + start, count, high_words);
        const uint8_t *low = random_bytes(mask->mask.lower, element + start, count, low_words);
        const uint32_t *sure = buffers->sure, *possible = buffers->possible;
        const uint16_t *bucket = buffers->bucket + start;
        uint16_t *draws = buffers->draws + start;
        for (int64_t i = 0; i < count; i++) {
            uint32_t draw = (uint32_t)(high[i] << 8 | low[i]);
            choice[i] = (uint8_t)((draw < possible[bucket[i]]) * UNSURE - (draw < sure[bucket[i]]));
        }
        for (int64_t i = 0; i < count; i++) draws[i] = (uint16_t)(high[i] << 8 | low[i]);
        memcpy(kept + start, choice, (size_t)count);
    }
    for (int64_t start = 0; start < columns; start += 8) {
        uint64_t eight = 0;
        memcpy(&eight, kept + start, (size_t)min_of(8, columns - start));
        for (eight &= 0x0101010101010101 * UNSURE; eight; eight &= eight - 1) {
            int64_t index = start + __builtin_ctzll(eight) / 8;
            uint16_t bucket = buffers->bucket[index];
            if (is_round(magnitude(row[index]), bucket, shift))
                decide(limits, buffers, index, buffers->ranks[bucket] + buffers->before[index], kept);
            else if (kept[index] == UNSURE)
                sort_bucket(limits, buffers, bucket, row, columns, shift, kept);
        }
    }
}

#endif
