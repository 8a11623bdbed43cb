/* Q1_0, Q2_0, TQ1_0 and TQ2_0: a scale in half precision and one or two bits, or a ternary digit, for each element.

   They ignore the importance, as ggml does. */

#include "quantize.h"
#include "quantize_bits.h"
#include "quantize_lanes.h"

/* The largest magnitude of `size` elements: in integers, because compilers do not vectorize a maximum of floats. */
INLINE float largest_magnitude(const float *restrict x, int size) {
    uint32_t largest = 0;
    for (int i = 0; i < size; i++) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
    return float_of(largest);
}

/* The nearest of -1, 0 and 1, plus 1; halves away from zero. */
INLINE uint8_t ternary(float x, float inverse) {
    float value = inverse * x;
    return (uint8_t)(1 + (value >= 0.5f) - (value <= -0.5f));
}

/* The ternary digits of `size` elements for the largest magnitude, which is returned. Where its inverse is infinite,
   every digit is `tiny`: what ggml's conversion to integers gives on x86-64. */
INLINE float ternary_digits(const float *restrict x, int size, uint8_t tiny, uint8_t *restrict digit) {
    float d = largest_magnitude(x, size), inverse = d > 0 ? 1 / d : 0;
    for (int i = 0; i < size; i++) digit[i] = ternary(x[i], inverse);
    if (magnitude(inverse) == 0x7f800000) memset(digit, tiny, (size_t)size);
    return d;
}

/* Q1_0, 18 bytes for 128 elements: d, the mean magnitude, and one bit each, set unless the element is negative. */
INLINE void store_q1_0(const float *restrict x, uint8_t *restrict out) {
    uint8_t bit[128];
    float sum = 0;
    for (int i = 0; i < 128; i++) sum += fabsf(x[i]);
    store_half(out, sum / 128);
    for (int i = 0; i < 128; i++) bit[i] = x[i] >= 0;
    for (int i = 0; i < 16; i++) out[2 + i] = gather_bits(bit + 8 * i, 0);
}

/* Q2_0, 18 bytes for 64 elements: d, the largest magnitude, and two bits each. */
INLINE void store_q2_0(const float *restrict x, uint8_t *restrict out) {
    uint8_t digit[64];
    store_half(out, ternary_digits(x, 64, 0, digit));
    for (int i = 0; i < 16; i++)
        out[2 + i] = (uint8_t)(digit[4 * i] | digit[4 * i + 1] << 2 | digit[4 * i + 2] << 4 | digit[4 * i + 3] << 6);
}

/* TQ2_0, 66 bytes for 256 elements: 64 with two bits each, d. */
INLINE void store_tq2_0(const float *restrict x, uint8_t *restrict out) {
    uint8_t digit[256];
    store_half(out + 64, ternary_digits(x, 256, 1, digit));
    pack_2bit(digit, 0, out);
    pack_2bit(digit + 128, 0, out + 32);
}

/* `count` bytes with five digits each, `count` elements apart, the first one most significant. Of five digits, the
   number is scaled from 243 to 256, so that they are read by multiplying with 3. */
INLINE void pack_ternary(const uint8_t *restrict digit, int count, int digits, uint8_t *restrict out) {
    for (int i = 0; i < count; i++) {
        int number = 0;
        for (int k = 0; k < 5; k++) number = 3 * number + (k < digits ? digit[i + k * count] : 0);
        out[i] = (uint8_t)((number * 256 + 242) / 243);
    }
}

/* TQ1_0, 54 bytes for 256 elements: 32 and 16 with five digits each, 4 with four digits each, d. */
INLINE void store_tq1_0(const float *restrict x, uint8_t *restrict out) {
    uint8_t digit[256];
    store_half(out + 52, ternary_digits(x, 256, 1, digit));
    pack_ternary(digit, 32, 5, out);
    pack_ternary(digit + 160, 16, 5, out + 32);
    pack_ternary(digit + 240, 4, 4, out + 48);
}

#define EACH_BLOCK(store, size, nbytes) \
    for (int64_t b = 0; b < blocks; b++) store(x + b * (size), out + b * (nbytes))

QUANTIZER(quantize_q1_0, EACH_BLOCK(store_q1_0, 128, 18))
QUANTIZER(quantize_q2_0, EACH_BLOCK(store_q2_0, 64, 18))
QUANTIZER(quantize_tq1_0, EACH_BLOCK(store_tq1_0, 256, 54))
QUANTIZER(quantize_tq2_0, EACH_BLOCK(store_tq2_0, 256, 66))
