/* MXFP4 and NVFP4: 4-bit floats (E2M1) with a scale of 8 bits for 32 or 16 elements. They ignore the importance.

   Bytes of an MXFP4 block: the scale (E8M0), 16 with two elements each. Of an NVFP4 block: four scales (UE4M3), for 16
   elements each, 32 with two elements each. */

#include "quantize.h"
#include "quantize_bits.h"
#include "quantize_lanes.h"

INLINE float largest_magnitude(const float *restrict x, int size) {
    uint32_t largest = 0;
    for (int i = 0; i < size; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
    return float_of(largest);
}

/* `size` elements in 4 bits, where l and l + size / 2 share byte l: the E2M1 number nearest to x / scale; of two, the
   smaller. Zero has no sign. Magnitudes are twice E2M1's, and `scale` is half of the block's. The differences are
   compared after rounding, as ggml does. */
INLINE void store_fp4(const float *restrict x, int size, float scale, uint8_t *restrict out) {
    static const float magnitudes[] = {0, 1, 2, 3, 4, 6, 8, 12};
    float least[32];
    uint32_t nearest[32];
    uint8_t index[32];
    for (int i = 0; i < size; i++) least[i] = fabsf(x[i]), nearest[i] = 0;
    for (uint32_t at = 1; at < 8; at++) {
        float value = magnitudes[at] * scale;
        for (int i = 0; i < size; i++) {
            float difference = fabsf(value - fabsf(x[i]));
            uint32_t closer = -(uint32_t)(difference < least[i]);
            nearest[i] = (at & closer) | (nearest[i] & ~closer);
            least[i] = float_of((bits_of(difference) & closer) | (bits_of(least[i]) & ~closer));
        }
    }
    for (int i = 0; i < size; i++) index[i] = (uint8_t)(nearest[i] + (nearest[i] ? bits_of(x[i]) >> 31 << 3 : 0));
    pack_4bit(index, size / 2, out);
}

/* floor(log2f(x)) of a positive x. log2f() rounds to the next integer n if x is 2^n - j units in its last place and j
   is small: how small depends on the exponent of n. */
INLINE int floor_log2(float x) {
    static const int most[] = {0, 1, 2, 5, 11, 22, 44, 88};
    int shift = x < 0x1p-126f ? 24 : 0;
    uint32_t bits = bits_of(shift ? x * 0x1p24f : x);
    int floored = (int)(bits >> 23) - 127 - shift, next = floored + 1, below = 0x800000 - (int)(bits & 0x7fffff);
    int distance = next > 0 ? next - 1 : -next; /* the float before n has the exponent of this */
    int exponent = distance > 0 ? 31 - __builtin_clz((unsigned)distance) : 0;
    return distance > 0 && below <= most[exponent] ? next : floored;
}

INLINE void store_mxfp4(const float *restrict x, uint8_t *restrict out) {
    float largest = largest_magnitude(x, 32);
    out[0] = largest > 0 ? (uint8_t)(floor_log2(largest) + 125) : 0;
    float half_scale = out[0] < 2 ? float_of(0x200000u << out[0]) : float_of((uint32_t)(out[0] - 1) << 23);
    store_fp4(x, 32, half_scale, out + 1);
}

/* The nearest UE4M3 number, halves up; from 248 on, ggml takes 448. */
INLINE uint8_t to_ue4m3(float x) {
    if (!(x >= 0x1p-6f)) return (uint8_t)min_of((int64_t)(x * 512 + 0.5f), 7);
    uint32_t rounded = ((bits_of(x) + 0x80000) >> 20) - (120 << 3); /* from 2^-6 on, the exponent is 1 or more */
    return (uint8_t)(rounded < 15 << 3 ? rounded : 0x7e);
}

/* Half of a UE4M3 number. */
INLINE float half_of_ue4m3(uint8_t scale) {
    if (scale < 8) return (float)scale * 0x1p-10f;
    return float_of((uint32_t)(scale + (119 << 3)) << 20);
}

INLINE void store_nvfp4(const float *restrict x, uint8_t *restrict out) {
    for (int group = 0; group < 4; group++) {
        out[group] = to_ue4m3(largest_magnitude(x + 16 * group, 16) / 6);
        store_fp4(x + 16 * group, 16, half_of_ue4m3(out[group]), out + 4 + 8 * group);
    }
}

QUANTIZER(quantize_mxfp4, for (int64_t b = 0; b < blocks; b++) store_mxfp4(x + 32 * b, out + 17 * b))
QUANTIZER(quantize_nvfp4, for (int64_t b = 0; b < blocks; b++) store_nvfp4(x + 64 * b, out + 36 * b))
