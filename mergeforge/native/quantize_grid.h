/* Grids of the IQ1, IQ2 and IQ3 types, and the search for the grid points nearest to a group's values.

   A grid is a set of points, each of which holds the levels of 8 (IQ1, IQ2) or 4 values (IQ3) that lie side by side.
   Values whose levels are not a point get one of its neighbors: those at the few smallest distances from it, by which
   ggml means the distances between levels. A point is written as a code: 2 or 3 bits for each level, the first lowest. */

#ifndef MERGEFORGE_QUANTIZE_GRID_H
#define MERGEFORGE_QUANTIZE_GRID_H

#include <stdint.h>

#include "quantize_lanes.h"

enum { MOST_PARTS = 8 };  /* points of a group */
enum { MOST_SIZE = 32 };  /* values of a group */
enum { MOST_TRIES = 32 }; /* scales that are tried */
enum { STEP = 8 };        /* tries that a vector holds */
enum { NEAR = STEP };     /* neighbors that a vector holds */
enum { ROWS = 32 };       /* of terms: 8 values with up to 4 levels, or 4 values with 8 */

/* Vectors of STEP: with more, GCC compares lane by lane. */
typedef float floats __attribute__((vector_size(4 * STEP)));
typedef int32_t integers __attribute__((vector_size(4 * STEP)));
typedef uint16_t near_codes __attribute__((vector_size(2 * NEAR)));

/* What levels become: a point, if they are one; else one of `count` neighbors from `first` on, in ggml's order. */
struct grid_place {
    uint32_t first;
    uint16_t count, point;
};

struct grid {
    int values, levels, bits; /* of a point, of a value, of a level */
    int point_count;
    const uint16_t *points; /* codes */
    int distances;          /* that neighbors may have */
    struct grid_place *places;
    uint16_t *codes;    /* of all neighbors, and NEAR zeros */
    uint8_t (*rows)[8]; /* of their levels in the terms */
};

extern struct grid iq2_xxs_grid, iq2_xs_grid, iq2_s_grid, iq1_grid, iq3_xxs_grid, iq3_s_grid;

/* Find the places and neighbors of all levels, once; 0 if there is no memory. Not for several threads at a time. */
int prepare_grid(struct grid *grid);

/* The place of levels. */
INLINE const struct grid_place *place_of(const struct grid *grid, uint32_t code) {
    if (grid->values == 4) return grid->places + code;
    uint32_t digits = 0;
    for (int i = 7; i >= 0; i--) digits = 3 * digits + (code >> 2 * i & 3);
    return grid->places + digits;
}

/* One value for each try. */
typedef float tries[MOST_TRIES] __attribute__((aligned(64)));
typedef int32_t codes[MOST_TRIES] __attribute__((aligned(64)));

/* Of tries `first` to `last` - 1, the codes of the neighbors with the smallest sum of terms; of several, the first in
   ggml's order. Terms: the weighted squared difference of each value for each of its levels, in `lanes` tries, a
   multiple of STEP. */
void nearest_neighbors(const struct grid *grid, const struct grid_place *place, const tries *term, int first, int last,
                       int lanes, int32_t *code);

/* For one scale: the code of the neighbor with the smallest sum of w * (scale * value - x)^2, where a value is
   factor * level + offset. */
int32_t nearest_neighbor(const struct grid *grid, const struct grid_place *place, const float *x, const float *w,
                         float scale, float factor, float offset);

/* A group of values, none negative but those whose sign had to be flipped, and their weights. */
struct grid_group {
    float x[MOST_SIZE], w[MOST_SIZE];
};

/* Which points are searched again for the scale that is found: those of levels that are no points; all, if there is one
   of those (or none was found); all, always. */
enum search_again { AGAIN_OFF_GRID, AGAIN_ALL_IF_ANY, AGAIN_ALL };

struct grid_search {
    const struct grid *grid;
    int size;        /* of the group */
    int tries_below; /* and above: as many scales are tried on either side of the middle */
    float delta;     /* between the divisors of the largest value */
    enum search_again again;
};

struct grid_fit {
    float scale; /* may be negative */
    int32_t code[MOST_PARTS];
};

/* Find the scale and the points with the smallest weighted error. `largest`: what the divisors divide; `scale`: what is
   left if no scale that is tried is better than none. */
void fit_grid(const struct grid_group *group, const struct grid_search *search, float largest, float scale,
              struct grid_fit *fit);

#endif
