/* Grids of the IQ1, IQ2 and IQ3 types.

   ggml searches the neighbors anew for each of up to 31 scales. Here the tries are the lanes of a vector: the terms of
   the distances are computed once for all tries, and tries with the same levels, which have the same neighbors, go
   through them together. Each sum is added in ggml's order. */

#include "quantize_grid.h"

#include <float.h>
#include <stdlib.h>

#include "grids.h"

#define GRID(name, values, levels, bits, distances) \
    struct grid name##_grid = {values, levels, bits, sizeof name##_points / 2, name##_points, distances, NULL, NULL, NULL}

GRID(iq2_xxs, 8, 3, 2, 2);
GRID(iq2_xs, 8, 3, 2, 2);
GRID(iq2_s, 8, 3, 2, 1);
GRID(iq1, 8, 3, 2, 3);
GRID(iq3_xxs, 4, 8, 3, 2);
GRID(iq3_s, 4, 8, 3, 3);

/* ---- Neighbors ---- */

static int level_of(const struct grid *grid, int code, int i) {
    return code >> grid->bits * i & ((1 << grid->bits) - 1);
}

static int place_count(const struct grid *grid) {
    int count = 1;
    for (int i = 0; i < grid->values; i++) count *= grid->levels;
    return count;
}

/* The code of levels by the number of their place. */
static int code_at(const struct grid *grid, int place) {
    int code = 0;
    for (int i = 0; i < grid->values; i++, place /= grid->levels) code |= place % grid->levels << grid->bits * i;
    return code;
}

/* The levels of all points, a row for each value. */
typedef uint8_t point_levels[8][2048];

static void take_levels(const struct grid *grid, point_levels level) {
    for (int i = 0; i < grid->values; i++)
        for (int p = 0; p < grid->point_count; p++) level[i][p] = (uint8_t)level_of(grid, grid->points[p], i);
}

/* Squared distances of all points from levels; returns the largest that a neighbor may have. */
static int measure(const struct grid *grid, const point_levels level, int code, uint8_t *restrict distance) {
    uint8_t occurs[256] = {0}; /* a distance is at most 8 * 2^2 or 4 * 7^2 */
    memset(distance, 0, (size_t)grid->point_count);
    for (int i = 0; i < grid->values; i++) {
        int own = level_of(grid, code, i);
        for (int p = 0; p < grid->point_count; p++)
            distance[p] = (uint8_t)(distance[p] + (level[i][p] - own) * (level[i][p] - own));
    }
    for (int p = 0; p < grid->point_count; p++) occurs[distance[p]] = 1;
    int found = 0, limit = 0;
    for (int d = 0; d < 256 && found < grid->distances; d++)
        if (occurs[d]) limit = d, found++;
    return limit;
}

/* Write the numbers of the neighbors of levels, by distance and number; returns how many there are. */
static int list_neighbors(const struct grid *grid, const point_levels level, int code, uint16_t *restrict number) {
    uint8_t distance[2048];
    uint16_t near[2048];
    int limit = measure(grid, level, code, distance), candidates = 0, count = 0;
    for (int p = 0; p < grid->point_count; p++) {
        near[candidates] = (uint16_t)p;
        candidates += distance[p] <= limit;
    }
    for (int d = 0; d <= limit; d++)
        for (int k = 0; k < candidates; k++)
            if (distance[near[k]] == d) number[count++] = near[k];
    return count;
}

/* Room for `total` neighbors; 0 if there is no memory. */
static int allocate_neighbors(struct grid *grid, uint32_t total) {
    grid->codes = calloc(total + NEAR, sizeof *grid->codes);
    grid->rows = calloc(total, sizeof *grid->rows);
    if (grid->codes && grid->rows) return 1;
    free(grid->codes), free(grid->rows);
    grid->codes = NULL, grid->rows = NULL;
    return 0;
}

static void write_neighbors(struct grid *grid, const uint16_t *number, uint32_t total) {
    for (uint32_t n = 0; n < total; n++) {
        grid->codes[n] = grid->points[number[n]];
        for (int i = 0; i < grid->values; i++)
            grid->rows[n][i] = (uint8_t)(ROWS / grid->values * i + level_of(grid, grid->codes[n], i));
    }
}

int prepare_grid(struct grid *grid) {
    if (grid->rows) return 1;
    int places = place_count(grid), prepared = 0;
    uint32_t total = 0, room = 1 << 19; /* more neighbors than any grid has */
    uint16_t *number = malloc(sizeof *number * room);
    point_levels *level = malloc(sizeof *level);
    if (!grid->places) grid->places = calloc((size_t)places, sizeof *grid->places);
    if (grid->places && number && level) {
        take_levels(grid, *level);
        for (int at = 0; at < places; at++) grid->places[at].count = 1;
        for (int p = 0; p < grid->point_count; p++) {
            struct grid_place *place = grid->places + (place_of(grid, grid->points[p]) - grid->places);
            place->count = 0, place->point = (uint16_t)p;
        }
        for (int at = 0; at < places; at++) {
            if (!grid->places[at].count) continue;
            grid->places[at].first = total;
            grid->places[at].count = (uint16_t)list_neighbors(grid, *level, code_at(grid, at), number + total);
            total += grid->places[at].count;
        }
        prepared = allocate_neighbors(grid, total);
        if (prepared) write_neighbors(grid, number, total);
    }
    free(number), free(level);
    return prepared;
}

/* ---- Nearest neighbors ---- */

/* STEP tries from `first` on. */
INLINE void search_step(const uint16_t *restrict neighbor, uint8_t (*restrict row)[8], int count, int values,
                        const tries *term, int first, int32_t *code) {
    floats best;
    integers nearest;
    for (int g = 0; g < STEP; g++) best[g] = FLT_MAX, nearest[g] = neighbor[0];
    for (int j = 0; j < count; j++) {
        floats sum, next;
        memcpy(&sum, term[row[j][0]] + first, sizeof sum);
        for (int i = 1; i < values; i++) {
            memcpy(&next, term[row[j][i]] + first, sizeof next);
            sum += next;
        }
        integers closer = sum < best, other = {0};
        other += neighbor[j];
        best = (floats)(((integers)sum & closer) | ((integers)best & ~closer));
        nearest = (other & closer) | (nearest & ~closer);
    }
    memcpy(code, &nearest, sizeof nearest);
}

INLINE void nearest_neighbors_body(const struct grid *grid, const struct grid_place *place, const tries *term,
                                   int first, int last, int lanes, int32_t *code) {
    const uint16_t *neighbor = grid->codes + place->first;
    uint8_t(*row)[8] = grid->rows + place->first;
    for (; first < last; first += STEP) {
        int32_t found[STEP];
        int start = first < lanes - STEP ? first : lanes - STEP, end = first + STEP < last ? first + STEP : last;
        if (grid->values == 8)
            search_step(neighbor, row, place->count, 8, term, start, found);
        else
            search_step(neighbor, row, place->count, 4, term, start, found);
        for (int t = first; t < end; t++) code[t] = found[t - start];
    }
}

EVERY_WIDTH(void, nearest_neighbors,
            (const struct grid *grid, const struct grid_place *place, const tries *term, int first, int last, int lanes,
             int32_t *code),
            (grid, place, term, first, last, lanes, code))

/* NEAR neighbors at a time; of equal sums, the first neighbor's is taken in each lane, then of the lanes. */
INLINE int32_t search_near(const uint16_t *restrict neighbor, int count, const float *restrict x,
                           const float *restrict w, float scale, float factor, float offset, int values, int bits) {
    floats best = {0};
    integers nearest = {0}, position = {0, 1, 2, 3, 4, 5, 6, 7};
    best += FLT_MAX;
    for (int j = 0; j < count; j += NEAR, position += NEAR) {
        near_codes loaded;
        memcpy(&loaded, neighbor + j, sizeof loaded);
        integers code = __builtin_convertvector(loaded, integers);
        floats sum = {0};
        for (int i = 0; i < values; i++) {
            floats level = __builtin_convertvector(code >> bits * i & ((1 << bits) - 1), floats);
            floats difference = (level * factor + offset) * scale - x[i];
            sum += w[i] * difference * difference;
        }
        integers closer = (sum < best) & (position < count);
        best = (floats)(((integers)sum & closer) | ((integers)best & ~closer));
        nearest = (position & closer) | (nearest & ~closer);
    }
    int lane = 0;
    for (int g = 1; g < NEAR; g++)
        if (best[g] < best[lane] || (best[g] == best[lane] && nearest[g] < nearest[lane])) lane = g;
    return neighbor[nearest[lane]];
}

INLINE int32_t nearest_neighbor_body(const struct grid *grid, const struct grid_place *place, const float *x,
                                     const float *w, float scale, float factor, float offset) {
    const uint16_t *neighbor = grid->codes + place->first;
    if (grid->values == 8) return search_near(neighbor, place->count, x, w, scale, factor, offset, 8, 2);
    return search_near(neighbor, place->count, x, w, scale, factor, offset, 4, 3);
}

EVERY_WIDTH(int32_t, nearest_neighbor,
            (const struct grid *grid, const struct grid_place *place, const float *x, const float *w, float scale,
             float factor, float offset),
            (grid, place, x, w, scale, factor, offset))

/* ---- Scales ---- */

/* The levels of a part of a group for each try, as codes. */
INLINE void divide(const float *restrict x, const float *restrict inverse, int values, int levels, int bits, int lanes,
                   int32_t *restrict code) {
    for (int t = 0; t < lanes; t++) code[t] = 0;
    for (int i = 0; i < values; i++)
        for (int t = 0; t < lanes; t++)
            code[t] |= clamp_int(nearest_int(0.5f * (inverse[t] * x[i] - 1)), 0, levels - 1) << bits * i;
}

/* The terms of a part: weight * (scale * (2 * level + 1) - x)^2 with the weights' roots, as in ggml. */
INLINE void make_terms(const float *restrict x, const float *restrict root, const float *restrict scale, int values,
                       int levels, int lanes, tries *restrict term) {
    for (int i = 0; i < values; i++)
        for (int l = 0; l < levels; l++)
            for (int t = 0; t < lanes; t++) {
                float difference = scale[t] * (float)(2 * l + 1) - x[i];
                term[ROWS / values * i + l][t] = root[i] * difference * difference;
            }
}

/* Replace levels that are no point by their nearest neighbors; `on_grid`: whether the levels of each try are a point. */
INLINE void move_to_grid(const struct grid *grid, const float *restrict x, const float *restrict root,
                         const float *restrict scale, int values, int levels, int count, int lanes,
                         int32_t *restrict code, uint8_t *restrict on_grid) {
    tries term[ROWS];
    int made = 0;
    for (int t = 0, end; t < count; t = end) {
        for (end = t + 1; end < count && code[end] == code[t];) end++;
        const struct grid_place *place = place_of(grid, (uint32_t)code[t]);
        for (int at = t; at < end; at++) on_grid[at] = !place->count;
        if (!place->count) continue;
        if (!made) make_terms(x, root, scale, values, levels, lanes, term);
        made = 1;
        nearest_neighbors(grid, place, term, t, end, lanes, code);
    }
}

/* The sums of weight * x * value and of weight * value * value, in order. */
INLINE void add_points(const struct grid_group *restrict group, const codes *restrict code, int size, int values,
                       int bits, int lanes, float *restrict sum_qx, float *restrict sum_q2) {
    for (int t = 0; t < lanes; t++) sum_qx[t] = sum_q2[t] = 0;
    for (int i = 0; i < size; i++) {
        float w = group->w[i], wx = w * group->x[i];
        for (int t = 0; t < lanes; t++) {
            int32_t level = code[i / values][t] >> bits * (i % values) & ((1 << bits) - 1);
            float value = (float)(2 * level + 1);
            sum_qx[t] += wx * value;
            sum_q2[t] += w * value * value;
        }
    }
}

/* Search points again for the scale that was found, and find the scale anew. */
INLINE void fit_again(const struct grid_group *restrict group, const struct grid_search *restrict search,
                      const float *restrict root, const uint8_t *restrict on_grid, int values, int levels, int bits,
                      struct grid_fit *restrict fit) {
    float qx = 0, q2 = 0, inverse = 1 / fit->scale;
    for (int k = 0; k < search->size / values; k++) {
        const float *x = group->x + values * k;
        if (search->again == AGAIN_OFF_GRID && on_grid[k]) continue;
        divide(x, &inverse, values, levels, bits, 1, fit->code + k);
        const struct grid_place *place = place_of(search->grid, (uint32_t)fit->code[k]);
        if (place->count)
            fit->code[k] = nearest_neighbor(search->grid, place, x, root + values * k, fit->scale, 2, 1);
    }
    for (int i = 0; i < search->size; i++) {
        float value = (float)(2 * (fit->code[i / values] >> bits * (i % values) & ((1 << bits) - 1)) + 1);
        qx += group->w[i] * group->x[i] * value;
        q2 += group->w[i] * value * value;
    }
    if (q2 > 0) fit->scale = qx / q2;
}

INLINE void fit_tries(const struct grid_group *restrict group, const struct grid_search *restrict search,
                      float largest, float scale, int values, int levels, int bits, int lanes,
                      struct grid_fit *restrict fit) {
    int parts = search->size / values, count = 2 * search->tries_below + 1, chosen = -1, missing = 0;
    uint8_t on_grid[MOST_PARTS][MOST_TRIES], chosen_on_grid[MOST_PARTS];
    float root[MOST_SIZE], best = 0;
    codes code[MOST_PARTS];
    tries inverse, step, qx, q2;
    for (int i = 0; i < search->size; i++) root[i] = sqrtf(group->w[i]);
    for (int t = 0; t < lanes; t++) {
        inverse[t] = ((float)(2 * levels - 1) + (float)(t - search->tries_below) * search->delta) / largest;
        step[t] = 1 / inverse[t];
    }
    for (int k = 0; k < parts; k++) {
        int at = values * k;
        divide(group->x + at, inverse, values, levels, bits, lanes, code[k]);
        move_to_grid(search->grid, group->x + at, root + at, step, values, levels, count, lanes, code[k], on_grid[k]);
    }
    add_points(group, code, search->size, values, bits, lanes, qx, q2);
    for (int t = 0; t < count; t++)
        if (q2[t] > 0 && qx[t] * qx[t] > best * q2[t]) {
            scale = qx[t] / q2[t];
            best = scale * qx[t];
            chosen = t;
        }
    for (int k = 0; k < parts; k++) {
        fit->code[k] = chosen < 0 ? 0 : code[k][chosen];
        chosen_on_grid[k] = chosen < 0 ? search->again != AGAIN_ALL_IF_ANY : on_grid[k][chosen];
        missing |= !chosen_on_grid[k];
    }
    fit->scale = scale;
    if (scale > 0 && (missing || search->again == AGAIN_ALL))
        fit_again(group, search, root, chosen_on_grid, values, levels, bits, fit);
}

INLINE void fit_grid_body(const struct grid_group *group, const struct grid_search *search, float largest, float scale,
                          struct grid_fit *fit) {
    if (search->grid->values == 4 && search->tries_below > 11)
        fit_tries(group, search, largest, scale, 4, 8, 3, 32, fit);
    else if (search->grid->values == 4)
        fit_tries(group, search, largest, scale, 4, 8, 3, 24, fit);
    else if (search->tries_below > 7)
        fit_tries(group, search, largest, scale, 8, 3, 2, 24, fit);
    else
        fit_tries(group, search, largest, scale, 8, 3, 2, 16, fit);
}

EVERY_WIDTH(void, fit_grid,
            (const struct grid_group *group, const struct grid_search *search, float largest, float scale,
             struct grid_fit *fit),
            (group, search, largest, scale, fit))
