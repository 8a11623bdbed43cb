/* Searches for the scales of a group. */

#include "quantize_search.h"

/* ---- Scale and minimum ---- */

/* What the search knows of each group besides the fit. */
struct scale_min_state {
    lanes lowest, highest, sum_w, sum_x, best; /* the range, sums over the group, the smallest error so far */
    lanes tried, sum_l, sum_l2, sum_xl;        /* this step's inverse scale, sums over its levels */
    lanes scale, minimum, error;               /* the line through them; if there is none, the error is infinite */
};

INLINE float level_of(float value, float top) { return (float)clamp_int(nearest_int(value), 0, (int32_t)top); }

/* Clamped in magnitude of ROUNDING_MAGIC, where no comparison is with zero: those take an instruction more. */
INLINE float guarded_level_of(float value, float top) {
    float shifted = value + ROUNDING_MAGIC;
    shifted = shifted > ROUNDING_MAGIC ? shifted : ROUNDING_MAGIC; /* NaN too */
    shifted = shifted < ROUNDING_MAGIC + top ? shifted : ROUNDING_MAGIC + top;
    return shifted - ROUNDING_MAGIC;
}

/* Whether all values that get a level are in nearest_int()'s range. Guarded levels are the same then, but faster. */
INLINE int in_range(const struct scale_min_state *restrict state, const float *restrict minimum) {
    int outside = 0;
    EACH_LANE(g) {
        float above = fabsf(state->tried[g] * (state->highest[g] - minimum[g]));
        float below = fabsf(state->tried[g] * (state->lowest[g] - minimum[g]));
        outside |= !(above < 4e6f) | !(below < 4e6f);
    }
    return !outside;
}

INLINE void add_levels(const lanes *restrict x, const lanes *restrict w, int size, float top, int guarded,
                       const float *restrict minimum, struct scale_min_state *restrict state, lanes *restrict level) {
    EACH_LANE_OF_ROWS(i, size, g) {
        float low = minimum[g], inverse = state->tried[g];
        float sum_l = state->sum_l[g], sum_l2 = state->sum_l2[g], sum_xl = state->sum_xl[g];
        EACH_ROW(k) {
            float value = inverse * (x[i + k][g] - low);
            float l = guarded ? guarded_level_of(value, top) : level_of(value, top);
            float product = w[i + k][g] * l;
            level[i + k][g] = l;
            sum_l += product;
            sum_l2 += product * l;
            sum_xl += product * x[i + k][g];
        }
        state->sum_l[g] = sum_l;
        state->sum_l2[g] = sum_l2;
        state->sum_xl[g] = sum_xl;
    }
}

INLINE void add_errors(const lanes *restrict x, const lanes *restrict w, int size, int absolute,
                       const lanes *restrict level, const float *restrict scale, const float *restrict minimum,
                       float *restrict error) {
    EACH_LANE_OF_ROWS(i, size, g) {
        float sum = error[g];
        EACH_ROW(k) {
            float difference = scale[g] * level[i + k][g] + minimum[g] - x[i + k][g];
            sum += w[i + k][g] * (absolute ? fabsf(difference) : difference * difference);
        }
        error[g] = sum;
    }
}

/* The first fit: the range of each group in `top` steps. */
INLINE void start_scale_min(const lanes *restrict x, const lanes *restrict w, int size, float top, int absolute,
                            struct scale_min_fit *restrict fit, struct scale_min_state *restrict state,
                            lanes *restrict level) {
    EACH_LANE(g) {
        state->lowest[g] = state->highest[g] = x[0][g];
        state->sum_w[g] = w[0][g];
        state->sum_x[g] = w[0][g] * x[0][g];
    }
    for (int i = 1; i < size; i++) EACH_LANE(g) {
        float value = x[i][g], lowest = state->lowest[g], highest = state->highest[g];
        state->lowest[g] = value < lowest ? value : lowest;
        state->highest[g] = value > highest ? value : highest;
        state->sum_w[g] += w[i][g];
        state->sum_x[g] += w[i][g] * value;
    }
    EACH_LANE(g) {
        float low = state->lowest[g] > 0 ? 0 : state->lowest[g], inverse = top / (state->highest[g] - low);
        fit->minimum[g] = fit->offset[g] = low;
        fit->scale[g] = 1 / inverse;
        fit->inverse[g] = inverse < INFINITY ? inverse : 0; /* infinite: C's levels are 0 */
        state->best[g] = 0;
    }
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        level[i][g] = level_of(fit->inverse[g] * (x[i][g] - fit->offset[g]), top);
    }
    add_errors(x, w, size, absolute, level, fit->scale, fit->minimum, state->best);
}

/* The line through the levels with the smallest squared error; its minimum is not above 0. */
INLINE void solve(struct scale_min_state *restrict state) {
    EACH_LANE(g) {
        float sum_l = state->sum_l[g], sum_l2 = state->sum_l2[g], sum_xl = state->sum_xl[g];
        float sum_w = state->sum_w[g], sum_x = state->sum_x[g];
        float determinant = sum_w * sum_l2 - sum_l * sum_l;
        float scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        float low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        float through_zero = sum_xl / sum_l2;
        state->scale[g] = low > 0 ? through_zero : scale;
        state->minimum[g] = low > 0 ? 0 : low;
        state->error[g] = determinant > 0 ? 0 : INFINITY;
    }
}

INLINE void keep_if_better(struct scale_min_fit *restrict fit, struct scale_min_state *restrict state) {
    EACH_LANE(g) {
        int better = state->error[g] < state->best[g];
        state->best[g] = better ? state->error[g] : state->best[g];
        fit->inverse[g] = better ? state->tried[g] : fit->inverse[g];
        fit->offset[g] = better ? fit->minimum[g] : fit->offset[g];
        fit->scale[g] = better ? state->scale[g] : fit->scale[g];
        fit->minimum[g] = better ? state->minimum[g] : fit->minimum[g];
    }
}

INLINE void search_scale_min(const lanes *restrict x, const lanes *restrict w, int size,
                             const struct scale_min_search *search, int absolute, int guarded,
                             struct scale_min_fit *restrict fit) {
    struct scale_min_state state;
    lanes level[MOST_ROWS];
    float top = (float)search->top;
    start_scale_min(x, w, size, top, absolute, fit, &state, level);
    for (int step = 0; step <= search->steps; step++) {
        float divisor = search->first + search->delta * (float)step + top;
        EACH_LANE(g) {
            state.tried[g] = divisor / (state.highest[g] - fit->minimum[g]);
            state.sum_l[g] = state.sum_l2[g] = state.sum_xl[g] = 0;
        }
        if (guarded || in_range(&state, fit->minimum))
            add_levels(x, w, size, top, 1, fit->minimum, &state, level);
        else
            add_levels(x, w, size, top, 0, fit->minimum, &state, level);
        solve(&state);
        add_errors(x, w, size, absolute, level, state.scale, state.minimum, state.error);
        keep_if_better(fit, &state);
    }
}

INLINE void fit_scale_min_body(const lanes *x, const lanes *w, int size, const struct scale_min_search *search,
                               struct scale_min_fit *fit) {
    if (search->guarded)
        search_scale_min(x, w, size, search, 0, 1, fit);
    else if (search->absolute)
        search_scale_min(x, w, size, search, 1, 0, fit);
    else
        search_scale_min(x, w, size, search, 0, 0, fit);
}

EVERY_WIDTH(void, fit_scale_min,
            (const lanes *x, const lanes *w, int size, const struct scale_min_search *search,
             struct scale_min_fit *fit),
            (x, w, size, search, fit))

/* ---- Scale ---- */

INLINE float signed_level(float value, float top) {
    float level = (value + ROUNDING_MAGIC) - ROUNDING_MAGIC;
    level = level < top - 1 ? level : top - 1;
    return level > -top ? level : -top;
}

/* The sums over the levels that `level_of_absmax` for the element of the largest magnitude gives. */
INLINE void try_scale(const lanes *restrict x, const lanes *restrict w, const lanes *restrict wx, int size, float top,
                      float level_of_absmax, const float *restrict absmax, float *restrict tried,
                      float *restrict sum_lx, float *restrict sum_l2) {
    EACH_LANE(g) {
        tried[g] = -level_of_absmax / absmax[g];
        sum_lx[g] = sum_l2[g] = 0;
    }
    EACH_LANE_OF_ROWS(i, size, g) {
        float lx = sum_lx[g], l2 = sum_l2[g];
        EACH_ROW(k) {
            float level = signed_level(tried[g] * x[i + k][g], top);
            lx += wx[i + k][g] * level;
            l2 += w[i + k][g] * level * level;
        }
        sum_lx[g] = lx;
        sum_l2[g] = l2;
    }
}

INLINE void fit_scale_body(const lanes *restrict x, const lanes *restrict w, const lanes *restrict wx, int size,
                           int top_level, struct scale_fit *restrict fit) {
    lanes absmax, best, tried, lx, l2;
    float top = (float)top_level;
    signed_absmax(x, size, absmax);
    try_scale(x, w, wx, size, top, top, absmax, tried, lx, l2);
    EACH_LANE(g) {
        fit->scale[g] = l2[g] != 0 ? lx[g] / l2[g] : 0;
        fit->inverse[g] = tried[g];
        best[g] = fit->scale[g] * lx[g];
    }
    for (int offset = -9; offset <= 9; offset++) {
        if (offset == 0) continue;
        try_scale(x, w, wx, size, top, top + 0.1f * (float)offset, absmax, tried, lx, l2);
        EACH_LANE(g) {
            float scale = lx[g] / l2[g];
            int better = (l2[g] > 0) & (lx[g] * lx[g] > best[g] * l2[g]);
            fit->scale[g] = better ? scale : fit->scale[g];
            fit->inverse[g] = better ? tried[g] : fit->inverse[g];
            best[g] = better ? scale * lx[g] : best[g];
        }
    }
    EACH_LANE(g) {
        int is_zero = fabsf(absmax[g]) < GROUP_MAX_EPS;
        fit->scale[g] = is_zero ? 0 : fit->scale[g];
        fit->inverse[g] = is_zero ? NAN : fit->inverse[g];
    }
}

EVERY_WIDTH(void, fit_scale,
            (const lanes *x, const lanes *w, const lanes *wx, int size, int top, struct scale_fit *fit),
            (x, w, wx, size, top, fit))

/* ---- Scale, level by level ---- */

/* Change each level where that is better. Returns whether any has changed. */
INLINE int refine_levels(const lanes *restrict x, const lanes *restrict w, const lanes *restrict wx, int size, int top,
                         lanes *restrict level, float *restrict sum_lx, float *restrict sum_l2) {
    int changed = 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        float old = level[i][g], lx = sum_lx[g], l2 = sum_l2[g];
        float less_lx = lx - wx[i][g] * old, less_l2 = l2 - w[i][g] * old * old;
        float moved = (float)clamp_int(nearest_int(x[i][g] * less_l2 / less_lx), -top, top - 1);
        float new_lx = less_lx + wx[i][g] * moved, new_l2 = less_l2 + w[i][g] * moved * moved;
        int better = (less_lx > 0) & (moved != old) & (new_l2 > 0) & (new_lx * new_lx * l2 > lx * lx * new_l2);
        changed |= better;
        level[i][g] = better ? moved : old;
        sum_lx[g] = better ? new_lx : lx;
        sum_l2[g] = better ? new_l2 : l2;
    }
    return changed;
}

INLINE void refine_scale_body(const lanes *restrict x, int size, int top, float *restrict scale,
                              lanes *restrict level) {
    lanes absmax, inverse, lx, l2, w[MOST_ROWS], wx[MOST_ROWS];
    signed_absmax(x, size, absmax);
    multiply(x, x, size, w);
    multiply(w, x, size, wx);
    try_scale(x, w, wx, size, (float)top, (float)top, absmax, inverse, lx, l2);
    for (int i = 0; i < size; i++) EACH_LANE(g) level[i][g] = signed_level(inverse[g] * x[i][g], (float)top);
    for (int pass = 0; pass < 5; pass++)
        if (!refine_levels(x, w, wx, size, top, level, lx, l2)) break;
    EACH_LANE(g) scale[g] = l2[g] > 0 && !(fabsf(absmax[g]) < GROUP_MAX_EPS) ? lx[g] / l2[g] : 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        level[i][g] = fabsf(absmax[g]) < GROUP_MAX_EPS ? 0 : level[i][g] + (float)top;
    }
}

EVERY_WIDTH(void, refine_scale, (const lanes *x, int size, int top, float *scale, lanes *level),
            (x, size, top, scale, level))

/* ---- Scales of a block ---- */

INLINE float capped_level(float value, int top) {
    int32_t level = nearest_int(value);
    return (float)(level < top ? level : top);
}

INLINE float byte_of(float level) { return (float)((int32_t)level & 0xff); }

INLINE void add_scale_errors(const lanes *restrict x, const lanes *restrict w, int size,
                             const float *restrict inverse, const lanes *restrict level, float *restrict error) {
    lanes step;
    EACH_LANE(g) {
        step[g] = 1 / inverse[g];
        error[g] = 0;
    }
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        float difference = x[i][g] - step[g] * level[i][g];
        error[g] += w[i][g] * difference * difference;
    }
}

/* Change each level where that is better. Returns whether any has changed. */
INLINE int move_levels(const lanes *restrict x, const lanes *restrict w, int size, int top, lanes *restrict level,
                       float *restrict sum_lx, float *restrict sum_l2) {
    int changed = 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        float old = level[i][g], lx = sum_lx[g], l2 = sum_l2[g];
        float less_lx = lx - w[i][g] * x[i][g] * old, less_l2 = l2 - w[i][g] * old * old;
        float moved = capped_level(x[i][g] * less_l2 / less_lx, top);
        float new_lx = less_lx + w[i][g] * x[i][g] * moved, new_l2 = less_l2 + w[i][g] * moved * moved;
        int better = (less_lx > 0) & (less_l2 > 0) & (moved != old) & (new_lx * new_lx * l2 > lx * lx * new_l2);
        changed |= better;
        level[i][g] = better ? byte_of(moved) : old;
        sum_lx[g] = better ? new_lx : lx;
        sum_l2[g] = better ? new_l2 : l2;
    }
    return changed;
}

INLINE void fit_block_scales_body(const lanes *restrict x, const lanes *restrict w, int size, int top,
                                  float *restrict step, lanes *restrict level) {
    lanes largest, inverse, best, tried, error, lx, l2;
    EACH_LANE(g) largest[g] = lx[g] = l2[g] = 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) largest[g] = x[i][g] > largest[g] ? x[i][g] : largest[g];
    EACH_LANE(g) inverse[g] = (float)top / largest[g];
    for (int i = 0; i < size; i++) EACH_LANE(g) level[i][g] = (float)(nearest_int(inverse[g] * x[i][g]) & 0xff);
    add_scale_errors(x, w, size, inverse, level, best);
    for (int offset = -4; offset <= 4; offset++) {
        if (offset == 0) continue;
        EACH_LANE(g) tried[g] = (0.1f * (float)offset + (float)top) / largest[g];
        for (int i = 0; i < size; i++) EACH_LANE(g) level[i][g] = capped_level(tried[g] * x[i][g], top);
        add_scale_errors(x, w, size, tried, level, error);
        EACH_LANE(g) {
            int better = error[g] < best[g];
            inverse[g] = better ? tried[g] : inverse[g];
            best[g] = better ? error[g] : best[g];
        }
    }
    for (int i = 0; i < size; i++) EACH_LANE(g) {
        float l = capped_level(inverse[g] * x[i][g], top);
        lx[g] += w[i][g] * x[i][g] * l;
        l2[g] += w[i][g] * l * l;
        level[i][g] = byte_of(l);
    }
    for (int pass = 0; pass < 5; pass++)
        if (!move_levels(x, w, size, top, level, lx, l2)) break;
    EACH_LANE(g) step[g] = l2[g] > 0 && !(largest[g] < GROUP_MAX_EPS) ? lx[g] / l2[g] : 0;
    for (int i = 0; i < size; i++) EACH_LANE(g) level[i][g] = largest[g] < GROUP_MAX_EPS ? 0 : level[i][g];
}

EVERY_WIDTH(void, fit_block_scales,
            (const lanes *x, const lanes *w, int size, int top, float *step, lanes *level),
            (x, w, size, top, step, level))
