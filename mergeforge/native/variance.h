/* sce: the variance of each element over the inputs, in float64, of the distances from the first input. */

#ifndef MERGEFORGE_VARIANCE_H
#define MERGEFORGE_VARIANCE_H

#include "inputs.h"

/* `values`: CHUNK values of each input. */
INLINE void variance_of(const float *values, int64_t inputs, int64_t count, float *out) {
    double total[CHUNK], squares[CHUNK], divisor = (double)inputs, factor = 1 / (divisor * divisor);
    for (int64_t i = 0; i < count; i++) total[i] = squares[i] = 0;
    for (int64_t k = 1; k < inputs; k++) {
        const float *other = values + k * CHUNK;
        for (int64_t i = 0; i < count; i++) {
            double distance = (double)other[i] - values[i];
            total[i] += distance;
            squares[i] += distance * distance;
        }
    }
    for (int64_t i = 0; i < count; i++)
        out[i] = (float)((squares[i] * divisor - total[i] * total[i]) * factor);
}

#endif
