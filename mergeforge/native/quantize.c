/* The tensor types that can be quantized. */

#include "quantize.h"

#include <stddef.h>

const struct quant_type quant_types[] = {
    {"Q4_0", 32, 18, quantize_q4_0},
    {"Q4_1", 32, 20, quantize_q4_1},
    {"Q5_0", 32, 22, quantize_q5_0},
    {"Q5_1", 32, 24, quantize_q5_1},
    {"Q8_0", 32, 34, quantize_q8_0},
    {"Q2_K", 256, 84, quantize_q2_k},
    {"Q3_K", 256, 110, quantize_q3_k},
    {"Q4_K", 256, 144, quantize_q4_k},
    {"Q5_K", 256, 176, quantize_q5_k},
    {"Q6_K", 256, 210, quantize_q6_k},
    {"IQ4_NL", 32, 18, quantize_iq4_nl},
    {"IQ4_XS", 256, 136, quantize_iq4_xs},
    {"TQ1_0", 256, 54, quantize_tq1_0},
    {"TQ2_0", 256, 66, quantize_tq2_0},
    {"MXFP4", 32, 17, quantize_mxfp4},
    {"NVFP4", 64, 36, quantize_nvfp4},
    {"Q1_0", 128, 18, quantize_q1_0},
    {"Q2_0", 64, 18, quantize_q2_0},
    {NULL, 0, 0, NULL},
};
