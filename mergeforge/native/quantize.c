/* The tensor types that can be quantized. */

#include "quantize.h"

#include <stddef.h>

const struct quant_type quant_types[] = {
    {"Q4_0", 32, 18, quantize_q4_0},
    {"Q4_1", 32, 20, quantize_q4_1},
    {"Q5_0", 32, 22, quantize_q5_0},
    {"Q5_1", 32, 24, quantize_q5_1},
    {"Q8_0", 32, 34, quantize_q8_0},
    {NULL, 0, 0, NULL},
};
