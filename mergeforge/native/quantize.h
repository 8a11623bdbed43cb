/* Quantizers: float32 rows to GGUF's tensor types, with the same bytes as ggml's reference code.

   `x`: `blocks` blocks of the type, flat, whole rows. `importance`: the imatrix's weight of each of a row's `columns`
   columns, or NULL. `out`: the blocks' bytes. All buffers are on the stack, less than 64 KiB per call. */

#ifndef MERGEFORGE_QUANTIZE_H
#define MERGEFORGE_QUANTIZE_H

#include <stdint.h>

#include "widths.h"

typedef void quantizer(const float *x, const float *importance, int64_t columns, int64_t blocks, uint8_t *out);

struct quant_type {
    const char *name; /* as in GGUF: "Q4_K" */
    int64_t block;    /* elements of a block */
    int64_t nbytes;   /* bytes of a block */
    quantizer *quantize;
    int needs_importance;
    int (*prepare)(void); /* called before, by one thread at a time; returns 0 if there is no memory. NULL: nothing */
};

extern const struct quant_type quant_types[]; /* ends with a NULL name */

quantizer quantize_q4_0, quantize_q4_1, quantize_q5_0, quantize_q5_1, quantize_q8_0;
quantizer quantize_q2_k, quantize_q3_k, quantize_q4_k, quantize_q5_k, quantize_q6_k;
quantizer quantize_iq4_nl, quantize_iq4_xs;
quantizer quantize_q1_0, quantize_q2_0, quantize_tq1_0, quantize_tq2_0;
quantizer quantize_mxfp4, quantize_nvfp4;
quantizer quantize_iq1_s, quantize_iq1_m;
int prepare_iq1(void);
quantizer quantize_iq2_xxs, quantize_iq2_xs, quantize_iq2_s, quantize_iq3_xxs, quantize_iq3_s;
int prepare_iq2_xxs(void), prepare_iq2_xs(void), prepare_iq2_s(void), prepare_iq3_xxs(void), prepare_iq3_s(void);

#define QUANTIZER_PARAMETERS (const float *x, const float *importance, int64_t columns, int64_t blocks, uint8_t *out)

/* Define a quantizer. `statements` use the parameters of `quantizer`. */
#define QUANTIZER(name, statements)                          \
    INLINE void name##_body QUANTIZER_PARAMETERS {           \
        (void)importance, (void)columns;                     \
        statements;                                          \
    }                                                        \
    EVERY_WIDTH(void, name, QUANTIZER_PARAMETERS, (x, importance, columns, blocks, out))

#endif
