/* Levels of a few bits packed into bytes: eight bytes at a time in one 64-bit word. */

#ifndef MERGEFORGE_QUANTIZE_BITS_H
#define MERGEFORGE_QUANTIZE_BITS_H

#include <stdint.h>
#include <string.h>

#include "widths.h"

#define EVERY_BYTE(value) (0x0101010101010101u * (uint64_t)(value))

INLINE uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

INLINE void store_word(uint64_t word, uint8_t *bytes) { memcpy(bytes, &word, sizeof word); }

/* Of 2 * distance levels, the lower four bits of levels l and l + distance share byte l. */
INLINE void pack_4bit(const uint8_t *restrict level, int distance, uint8_t *restrict out) {
    const uint64_t mask = EVERY_BYTE(15);
    for (int l = 0; l < distance; l += 8)
        store_word((load_word(level + l) & mask) | (load_word(level + distance + l) & mask) << 4, out + l);
}

/* Of 128 levels, two bits (from bit `shift` on) of levels l, l + 32, l + 64 and l + 96 share byte l. */
INLINE void pack_2bit(const uint8_t *restrict level, int shift, uint8_t *restrict out) {
    const uint64_t mask = EVERY_BYTE(3);
    for (int l = 0; l < 32; l += 8) {
        uint64_t word = load_word(level + l) >> shift & mask;
        word |= (load_word(level + 32 + l) >> shift & mask) << 2;
        word |= (load_word(level + 64 + l) >> shift & mask) << 4;
        word |= (load_word(level + 96 + l) >> shift & mask) << 6;
        store_word(word, out + l);
    }
}

/* Of 256 levels, bit `shift` of level 32 * k + l is bit k of byte l. */
INLINE void pack_1bit(const uint8_t *restrict level, int shift, uint8_t *restrict out) {
    for (int l = 0; l < 32; l += 8) {
        uint64_t word = 0;
        for (int k = 0; k < 8; k++) word |= (load_word(level + 32 * k + l) >> shift & EVERY_BYTE(1)) << k;
        store_word(word, out + l);
    }
}

/* Bit `shift` of eight levels as one byte. */
INLINE uint8_t gather_bits(const uint8_t *level, int shift) {
    return (uint8_t)((load_word(level) >> shift & EVERY_BYTE(1)) * 0x0102040810204080u >> 56);
}

#endif
