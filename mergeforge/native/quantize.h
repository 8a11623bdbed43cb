/* Quantizers: float32 rows to GGUF's tensor types, with the same bytes as ggml's reference code.

   `x`: `blocks` blocks of the type, flat, from the start of a row on. `importance`: the imatrix's weight of each of a
   row's `columns` columns, or NULL. `out`: the blocks' bytes. */

#ifndef MERGEFORGE_QUANTIZE_H
#define MERGEFORGE_QUANTIZE_H

#include <stdint.h>

typedef void quantizer(const float *x, const float *importance, int64_t columns, int64_t blocks, uint8_t *out);

struct quant_type {
    const char *name; /* as in GGUF: "Q4_K" */
    int64_t block;    /* elements of a block */
    int64_t nbytes;   /* bytes of a block */
    quantizer *quantize;
};

extern const struct quant_type quant_types[]; /* ends with a NULL name */

#endif
