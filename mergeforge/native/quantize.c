/* The tensor types that can be quantized. */

#include "quantize.h"

#include <stddef.h>

const struct quant_type quant_types[] = {
    {"Q4_0", 32, 18, quantize_q4_0, 0, NULL},
    {"Q4_1", 32, 20, quantize_q4_1, 0, NULL},
    {"Q5_0", 32, 22, quantize_q5_0, 0, NULL},
    {"Q5_1", 32, 24, quantize_q5_1, 0, NULL},
    {"Q8_0", 32, 34, quantize_q8_0, 0, NULL},
    {"Q2_K", 256, 84, quantize_q2_k, 0, NULL},
    {"Q3_K", 256, 110, quantize_q3_k, 0, NULL},
    {"Q4_K", 256, 144, quantize_q4_k, 0, NULL},
    {"Q5_K", 256, 176, quantize_q5_k, 0, NULL},
    {"Q6_K", 256, 210, quantize_q6_k, 0, NULL},
    {"IQ4_NL", 32, 18, quantize_iq4_nl, 0, NULL},
    {"IQ4_XS", 256, 136, quantize_iq4_xs, 0, NULL},
    {"TQ1_0", 256, 54, quantize_tq1_0, 0, NULL},
    {"TQ2_0", 256, 66, quantize_tq2_0, 0, NULL},
    {"MXFP4", 32, 17, quantize_mxfp4, 0, NULL},
    {"NVFP4", 64, 36, quantize_nvfp4, 0, NULL},
    {"Q1_0", 128, 18, quantize_q1_0, 0, NULL},
    {"Q2_0", 64, 18, quantize_q2_0, 0, NULL},
    {"IQ1_S", 256, 50, quantize_iq1_s, 1, prepare_iq1},
    {"IQ1_M", 256, 56, quantize_iq1_m, 0, prepare_iq1},
    {"IQ2_XXS", 256, 66, quantize_iq2_xxs, 1, prepare_iq2_xxs},
    {"IQ2_XS", 256, 74, quantize_iq2_xs, 1, prepare_iq2_xs},
    {"IQ2_S", 256, 82, quantize_iq2_s, 0, prepare_iq2_s},
    {"IQ3_XXS", 256, 98, quantize_iq3_xxs, 0, prepare_iq3_xxs},
    {"IQ3_S", 256, 110, quantize_iq3_s, 0, prepare_iq3_s},
    {NULL, 0, 0, NULL, 0, NULL},
};
