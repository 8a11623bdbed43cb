/* float32 numbers as bits, and conversions between float32 and the stored dtypes. */

#ifndef MERGEFORGE_FLOATS_H
#define MERGEFORGE_FLOATS_H

#include <stdint.h>
#include <string.h>

#include "widths.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files hold little-endian numbers"
#endif

enum dtype { BF16, F16, F32 };
/* Elements that kernels take through all steps at once, so that they stay in the L1 cache. What is summed up goes by
   CHUNK, because the last bits of a sum depend on it; everything else by SMALL_CHUNK, which is faster. */
enum { CHUNK = 2048, SMALL_CHUNK = 512 };
enum { VALUES_STRIDE = CHUNK + 16 }; /* from the values of one input to those of the next; no power of two, for the cache */

static const float ZEROS[CHUNK] __attribute__((unused));

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

/* The bits of the absolute value: they order as the magnitudes do. */
INLINE uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffff; }

INLINE int64_t min_of(int64_t left, int64_t right) { return left < right ? left : right; }

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
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0xffff : rounded);
}

/* As processors do it: a NaN keeps its upper bits. Subnormal numbers are rounded by adding 0.5, whose last bit has the
   value of theirs. */
INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
    uint32_t nonfinite = bits > 0x7f800000 ? 0x7e00 | (bits >> 13 & 0x3ff) : 0x7c00;
    return (uint16_t)(sign | (bits >= 0x47800000 ? nonfinite : bits < 0x38800000 ? subnormal : normal));
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
        memcpy((float *)out + index, values, (size_t)count * sizeof(float));
    else if (dtype == F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[index + i] = to_f16(values[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)out)[index + i] = to_bf16(values[i]);
}

#endif
