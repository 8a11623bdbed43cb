/* What a merge does with its inputs, and the facts about whole tensors that it needs first.

   Functions that return a number return 0, or 1 + the number of an input that could not be read. */

#ifndef MERGEFORGE_REDUCTIONS_H
#define MERGEFORGE_REDUCTIONS_H

#include "inputs.h"
#include "masks.h"

enum combine {
    SUM,            /* base + scale * sum(factor * kept) / divisor, kept: what is kept of (input - base) */
    CONSENSUS_SUM,  /* the same of those products that have the elected sign; `normalize`: divided by their weights */
    CONSENSUS_MEAN, /* base + the mean, weighted by the factors, of what has the elected sign (sce) */
    NEARSWAP        /* (1 - w) * first + w * second, w = t / |first - second|, at most 1 */
};

enum keep {
    KEEP_WHOLE,
    KEEP_RANDOM,     /* masks: one for each input */
    KEEP_MAGNITUDES, /* ranges: one for each input; if the lower bits are negative, all of it */
    KEEP_RANKS,      /* ranks: one for each input */
    KEEP_VARIANCE /* ranges: one, of the variance over the inputs */
};

struct reduction {
    int combine, keep, fused, normalize; /* fused: products are added unrounded */
    float divisor, scale, t, min_divisor;
    int64_t element;    /* the index of element 0 in its tensor */
    int64_t row_length; /* elements of a row; the tensor's last one may be shorter */
    const float *factors, *weights;
    const struct random_mask *masks;
    struct magnitude_range *ranges; /* ties are counted off in them */
    const struct rank_mask *ranks;
    uint8_t *rank_bits;      /* with ranks, or NULL: which elements of the first rows are kept, rank_row_nbytes() for each
                                row of each input; l1_norms() writes them, reduce() reads them */
    int64_t rank_bits_rows;
    int reads_rank_bits;
    /* buffers */
    float *values;               /* VALUES_STRIDE for each input: for a consensus, and for the variance */
    uint8_t *kept;               /* with ranks: read_elems marks for each input */
    float *row;                  /* with ranks: row_length values */
    struct rank_buffers buffers; /* with ranks: for row_length columns */
};

/* Elements [0, length) of the merged tensor, rounded to `dtype`. `max_bits`: the bits of the largest magnitude before
   rounding. `changes`: receives the effect on the base of the first `measured` elements. */
int64_t reduce(const struct inputs *inputs, const struct reduction *reduction, int64_t dtype, void *out,
               uint32_t *max_bits, double *changes, int64_t measured);

/* Decide by rank what is kept of every input in a step, which consists of whole rows. */
void rank_step(const struct reduction *reduction, const struct chunks *chunks);

/* The first input, minus the base if there is one. */
int64_t load_values(const struct inputs *inputs, float *out);

/* Add to `norms`, for each input, its L1 norm and that of what is kept of it. */
int64_t l1_norms(const struct inputs *inputs, const struct reduction *reduction, double *norms);

/* Add to `sums`, for each input, the squares of what is kept of it. */
int64_t kept_squares(const struct inputs *inputs, const struct reduction *reduction, double *sums);

/* Add to `sums` the inner products of every input (minus the base) with itself and the inputs that follow it.
   `values`: PRODUCT_CHUNK values of each input. */
enum { PRODUCT_CHUNK = 512 };
int64_t inner_products(const struct inputs *inputs, double *values, double *sums);

/* Magnitudes in an interval of bits, of one input or of the variance over all inputs. */
struct magnitude_count {
    int64_t input; /* VARIANCE: of the variance */
    int32_t low, high, guess;
    int32_t *inside; /* the bits of those in [low, high) but not of `guess`, minus `low`: room for `capacity`, at least a
                        chunk */
    int64_t capacity, count;
    int64_t above;   /* how many have bits of at least `high` */
    int64_t equal;   /* how many have the bits of `guess`: often many, because 16-bit models differ in few values */
    int64_t nonzero; /* how many are not zero; only of the variance */
};
enum { VARIANCE = -1 };

/* Count magnitudes; the counts are in the order of the inputs. Stops where `inside` has no room for another chunk;
   `done` receives the number of elements that were counted. `values`: VALUES_STRIDE for each input, and once
   more. */
int64_t count_magnitudes(const struct inputs *inputs, struct magnitude_count *counts, int64_t count, float *values,
                         int64_t *done);

/* The variance over the inputs (minus the base) of every element. `values`: as for count_magnitudes(). */
int64_t variances(const struct inputs *inputs, float *values, float *out);

#endif
