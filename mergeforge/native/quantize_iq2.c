/* IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: magnitudes on a grid, signs, and 4-bit scales of groups of 32 or 16.

   The signs of eight values are stored in seven bits (XXS and XS), so that an odd number of negative values flips the
   sign of the one that matters least; or in eight. */

#include "quantize.h"
#include "quantize_grid.h"
#include "quantize_search.h"

enum { BLOCK = 256, MOST_GROUPS = 16 };

struct grid_type {
    struct grid_search search;
    int even_signs;   /* stored in seven bits */
    float smallest;   /* a group whose largest value is below it counts as zero */
    float factor;     /* of the block's mean square in the weights with importance */
    float correction; /* of the block's scale */
};

/* What is stored of a block. */
struct grid_block {
    float scale[MOST_GROUPS];   /* of the groups */
    uint8_t level[MOST_GROUPS]; /* of the scales */
    uint8_t fitted[MOST_GROUPS]; /* whether the group has more than zeros */
    uint16_t point[BLOCK / 4];  /* of 8 or 4 values */
    uint8_t sign[BLOCK / 8];
    float d; /* 0: all groups are zero */
};

/* The weights of a group of a block with this sum of squares. Without importance, IQ2_S has other ones than IQ3. */
INLINE void weigh(const float *restrict x, const float *restrict importance, float squares,
                  const struct grid_type *restrict type, float *restrict w) {
    float sigma2 = squares * (type->factor / BLOCK);
    int size = type->search.size;
    if (importance)
        for (int i = 0; i < size; i++) w[i] = importance[i] * sqrtf(sigma2 + x[i] * x[i]);
    else
        for (int i = 0; i < size; i++) w[i] = (size == 16 ? 0.25f * sigma2 : 0) + x[i] * x[i];
}

/* Make values positive; their signs, set for negative ones. */
INLINE uint8_t take_signs(const float *restrict x, const float *restrict w, int even, float *restrict positive) {
    uint32_t sign = 0;
    for (int i = 0; i < 8; i++) {
        int negative = !(x[i] >= 0);
        positive[i] = negative ? -x[i] : x[i];
        sign |= (uint32_t)negative << i;
    }
    if (!even || __builtin_popcount(sign) % 2 == 0) return (uint8_t)sign;
    int least = 0;
    for (int i = 1; i < 8; i++)
        if (w[i] * x[i] * x[i] < w[least] * x[least] * x[least]) least = i;
    positive[least] = -positive[least];
    return (uint8_t)(sign ^ 1u << least);
}

INLINE float largest_of(const float *restrict x, int size) {
    float largest = x[0];
    for (int i = 1; i < size; i++) largest = largest > x[i] ? largest : x[i];
    return largest;
}

/* Fit a group and keep what is stored of it; `scale`: what IQ2_XXS begins with, else negative. */
INLINE void fit_group(const struct grid_group *restrict group, const struct grid_type *restrict type, int number,
                      float scale, const uint8_t *restrict sign, struct grid_block *restrict block) {
    const struct grid *grid = type->search.grid;
    int size = type->search.size, parts = size / grid->values, all = type->even_signs ? 127 : 255;
    float largest = largest_of(group->x, size);
    struct grid_fit fit;
    block->scale[number] = 0;
    if (largest < type->smallest || largest == 0 || scale == 0) return;
    block->fitted[number] = 1;
    if (scale > 0)
        fit_grid(group, &type->search, scale * 3, scale, &fit);
    else
        fit_grid(group, &type->search, largest, largest / (float)(2 * grid->levels - 1), &fit);
    int flip = fit.scale < 0 ? all : 0;
    block->scale[number] = fit.scale < 0 ? -fit.scale : fit.scale;
    for (int k = 0; k < parts; k++)
        block->point[number * parts + k] = place_of(grid, (uint32_t)fit.code[k])->point;
    for (int k = 0; k < size / 8; k++) block->sign[number * size / 8 + k] = (uint8_t)((sign[k] ^ flip) & all);
}

/* The block's scale and the levels of the groups'. */
INLINE void fit_block(int groups, float correction, struct grid_block *restrict block) {
    float largest = 0;
    for (int g = 0; g < groups; g++) largest = largest > block->scale[g] ? largest : block->scale[g];
    float d = largest / 31, inverse = 1 / d;
    block->d = largest != 0 ? d * correction : 0;
    for (int g = 0; g < groups; g++)
        block->level[g] = largest != 0 ? (uint8_t)clamp_int(nearest_int(0.5f * (inverse * block->scale[g] - 1)), 0, 15) : 0;
}

/* The scales that IQ2_XXS begins with, of the groups of four blocks: those that levels 0 to 4 need. */
INLINE void fit_first_scales(const struct grid_group *restrict group, float *restrict scale) {
    lanes x_t[32], w_t[32], level[32];
    for (int i = 0; i < 32; i++) EACH_LANE(g) x_t[i][g] = group[g].x[i], w_t[i][g] = group[g].w[i];
    fit_block_scales(x_t, w_t, 32, 4, scale, level);
}

typedef void store_grid_block(const struct grid_block *block, uint8_t *out);

/* Four blocks at a time, whose groups are up to 64. */
INLINE void quantize_on_grid(const float *restrict x, const float *restrict importance, int64_t columns, int64_t blocks,
                             const struct grid_type *restrict type, int nbytes, store_grid_block *store,
                             uint8_t *restrict out) {
    int size = type->search.size, groups = BLOCK / size, begins = type->search.grid == &iq2_xxs_grid;
    for (int64_t first = 0; first < blocks; first += 4) {
        int64_t count = min_of(4, blocks - first);
        struct grid_group group[4 * MOST_GROUPS];
        uint8_t sign[4 * BLOCK / 8];
        float squares[LANES], scale[LANES];
        memset(group, 0, sizeof group);
        sums_of_squares(x + first * BLOCK, count, BLOCK, squares);
        for (int n = 0; n < count * groups; n++) {
            int64_t at = first * BLOCK + n * size;
            weigh(x + at, importance ? importance + at % columns : 0, squares[n / groups], type, group[n].w);
            for (int k = 0; k < size / 8; k++)
                sign[n * size / 8 + k] =
                    take_signs(x + at + 8 * k, group[n].w + 8 * k, type->even_signs, group[n].x + 8 * k);
        }
        if (begins) fit_first_scales(group, scale);
        for (int b = 0; b < count; b++) {
            struct grid_block block;
            memset(&block, 0, sizeof block);
            for (int g = 0; g < groups; g++) {
                int n = b * groups + g;
                fit_group(group + n, type, g, begins ? scale[n] > 0 ? scale[n] : 0 : -1, sign + n * size / 8, &block);
            }
            fit_block(groups, type->correction, &block);
            store(&block, out + (first + b) * nbytes);
        }
    }
}

/* ---- Bytes ---- */

INLINE void store_u16(uint8_t *out, uint32_t value) {
    uint16_t word = (uint16_t)value;
    memcpy(out, &word, sizeof word);
}

INLINE void store_u32(uint8_t *out, uint32_t value) { memcpy(out, &value, sizeof value); }

/* 28 bits with the signs of 32 values, 4 with the scale. */
INLINE uint32_t signs_and_scale(const struct grid_block *block, int group) {
    const uint8_t *sign = block->sign + 4 * group;
    return (uint32_t)sign[0] | (uint32_t)sign[1] << 7 | (uint32_t)sign[2] << 14 | (uint32_t)sign[3] << 21 |
           (uint32_t)block->level[group] << 28;
}

INLINE void store_levels(const struct grid_block *block, int groups, uint8_t *out) {
    for (int g = 0; g < groups; g += 2) out[g / 2] = (uint8_t)(block->level[g] | block->level[g + 1] << 4);
}

/* IQ2_XXS, 66 bytes: d; for each group 4 with a point each, 4 with signs and the scale. */
INLINE void store_iq2_xxs(const struct grid_block *block, uint8_t *out) {
    store_half(out, block->d);
    memset(out + 2, 0, 64);
    for (int g = 0; g < 8 && block->d != 0; g++) {
        for (int k = 0; k < 4; k++) out[2 + 8 * g + k] = (uint8_t)block->point[4 * g + k];
        store_u32(out + 6 + 8 * g, signs_and_scale(block, g));
    }
}

/* IQ2_XS, 74 bytes: d; 32 numbers of 16 bits with a point and seven signs each; 8 with two scales each. */
INLINE void store_iq2_xs(const struct grid_block *block, uint8_t *out) {
    store_half(out, block->d);
    memset(out + 2, 0, 72);
    if (block->d == 0) return;
    for (int k = 0; k < 32; k++) store_u16(out + 2 + 2 * k, block->point[k] | (uint32_t)block->sign[k] << 9);
    store_levels(block, 16, out + 66);
}

/* IQ2_S, 82 bytes: d; 32 with the points' lower eight bits; 32 with signs; 8 with the points' upper two bits; 8 with two
   scales each. */
INLINE void store_iq2_s(const struct grid_block *block, uint8_t *out) {
    store_half(out, block->d);
    memset(out + 66, 0, 8);
    for (int k = 0; k < 32; k++) {
        out[2 + k] = (uint8_t)block->point[k];
        out[34 + k] = block->sign[k];
        out[66 + k / 4] |= (uint8_t)(block->point[k] >> 8 << (2 * (k % 4)));
    }
    store_levels(block, 16, out + 74);
}

/* IQ3_XXS, 98 bytes: d; 64 with a point each; for each group 4 with signs and the scale. */
INLINE void store_iq3_xxs(const struct grid_block *block, uint8_t *out) {
    store_half(out, block->d);
    memset(out + 2, 0, 96);
    if (block->d == 0) return;
    for (int k = 0; k < 64; k++) out[2 + k] = (uint8_t)block->point[k];
    for (int g = 0; g < 8; g++) store_u32(out + 66 + 4 * g, signs_and_scale(block, g));
}

/* IQ3_S, 110 bytes: d; 64 with the points' lower eight bits; 8 with their ninth bits; 32 with signs; 4 with two scales
   each. ggml writes no points and signs for groups of zeros, so those of the groups that follow move up; of files with
   such groups, the bytes are the same here. */
INLINE void store_iq3_s(const struct grid_block *block, uint8_t *out) {
    uint8_t *point = out + 2, *sign = out + 74;
    memset(out, 0, 110);
    store_half(out, block->d);
    for (int g = 0; g < 8; g++) {
        if (!block->fitted[g]) continue;
        for (int k = 0; k < 8; k++) {
            *point++ = (uint8_t)block->point[8 * g + k];
            out[66 + g] |= (uint8_t)(block->point[8 * g + k] >> 8 << k);
        }
        for (int k = 0; k < 4; k++) *sign++ = block->sign[4 * g + k];
    }
    store_levels(block, 8, out + 106);
}

/* ---- Types ---- */

/*                                 grid, size, tries, delta, again;              even signs, smallest, factor, correction */
static const struct grid_type iq2_xxs = {{&iq2_xxs_grid, 32, 6, 0.1f, AGAIN_ALL}, 1, GROUP_MAX_EPS, 1, 1};
static const struct grid_type iq2_xs = {{&iq2_xs_grid, 16, 9, 0.1f, AGAIN_OFF_GRID}, 1, GROUP_MAX_EPS, 1, 1};
static const struct grid_type iq2_s = {{&iq2_s_grid, 16, 9, 0.1f, AGAIN_OFF_GRID}, 0, 1e-8f, 2, 0.9875f};
static const struct grid_type iq3_xxs = {{&iq3_xxs_grid, 32, 15, 0.2f, AGAIN_OFF_GRID}, 1, 1e-8f, 2, 1.0125f};
static const struct grid_type iq3_s = {{&iq3_s_grid, 32, 9, 0.2f, AGAIN_ALL_IF_ANY}, 0, 0, 2, 1.033f};

#define ON_GRID(type, nbytes) quantize_on_grid(x, importance, columns, blocks, &type, nbytes, store_##type, out)

QUANTIZER(quantize_iq2_xxs, ON_GRID(iq2_xxs, 66))
QUANTIZER(quantize_iq2_xs, ON_GRID(iq2_xs, 74))
QUANTIZER(quantize_iq2_s, ON_GRID(iq2_s, 82))
QUANTIZER(quantize_iq3_xxs, ON_GRID(iq3_xxs, 98))
QUANTIZER(quantize_iq3_s, ON_GRID(iq3_s, 110))

int prepare_iq2_xxs(void) { return prepare_grid(&iq2_xxs_grid); }
int prepare_iq2_xs(void) { return prepare_grid(&iq2_xs_grid); }
int prepare_iq2_s(void) { return prepare_grid(&iq2_s_grid); }
int prepare_iq3_xxs(void) { return prepare_grid(&iq3_xxs_grid); }
int prepare_iq3_s(void) { return prepare_grid(&iq3_s_grid); }
