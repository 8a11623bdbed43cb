/* Searches for the scales of LANES groups. A group has a multiple of UNROLLED elements, at most MOST_ROWS. */

#ifndef MERGEFORGE_QUANTIZE_SEARCH_H
#define MERGEFORGE_QUANTIZE_SEARCH_H

#include "quantize_lanes.h"

/* x ~ scale * level + minimum with levels 0 to top. */
struct scale_min_search {
    int top;
    float first, delta; /* the divisors that are tried: top + first + step * delta for step <= steps */
    int steps;
    int absolute; /* minimize |difference| instead of its square (use_mad in ggml) */
    int guarded;  /* levels as make_qkx3_quants() computes them */
};

/* The search that every type with a minimum uses when there is an importance vector. */
#define IMPORTANCE_SEARCH(top) {top, -0.9f, 0.05f, 36, 0, 1}

/* What was found. Of the elements' levels only this is kept, which determines them: scale_min_level(). */
struct scale_min_fit {
    lanes scale, minimum, inverse, offset;
};

/* Find the scale and minimum with the smallest weighted error.
   ggml: make_qkx2_quants() and, if guarded, make_qkx3_quants().

   Each step divides the range by a divisor to get levels, fits a line through them by least squares, and keeps the line
   if its error is the smallest so far. The next step starts from the kept line's minimum, as in llama.cpp. */
void fit_scale_min(const lanes *x, const lanes *w, int size, const struct scale_min_search *search,
                   struct scale_min_fit *fit);

INLINE int32_t scale_min_level(float x, float inverse, float offset, int top, int guarded) {
    float value = inverse * (x - offset);
    if (!guarded) return clamp_int(nearest_int(value), 0, top);
    value = value > 0 ? value : 0; /* NaN too */
    return nearest_int(value < (float)top ? value : (float)top);
}

/* x ~ scale * level with levels -top to top - 1. What was found; the elements' levels: scale_level(). */
struct scale_fit {
    lanes scale, inverse; /* 0 and NaN for a group of zeros */
};

/* Find the scale with the smallest weighted error; wx = w * x. ggml: make_qx_quants() with rmse_type 1.

   The element of the largest magnitude gets level -top, or one of 18 values near it. */
void fit_scale(const lanes *x, const lanes *w, const lanes *wx, int size, int top, struct scale_fit *fit);

/* A level counted from 0; 0 in a group of zeros. */
INLINE int32_t scale_level(float x, float inverse, int top) {
    int32_t level = clamp_int(nearest_int(inverse * x), -top, top - 1) + top;
    return inverse == inverse ? level : 0;
}

/* Find the scale by changing one level after another, in at most five passes, with weights x * x. Writes the levels
   counted from 0; they are 0 in a group of zeros. ggml: make_q3_quants(). */
void refine_scale(const lanes *x, int size, int top, float *scale, lanes *level);

/* Find the step of a block's scales, which are not negative, and their levels; a lane holds one block's scales.
   ggml: make_qp_quants().

   Nine inverse steps near top / largest are compared, then single levels are changed, in at most five passes, as long
   as that lowers the weighted error. A level is a byte, which may be above `top`. */
void fit_block_scales(const lanes *x, const lanes *w, int size, int top, float *step, lanes *level);

#endif
