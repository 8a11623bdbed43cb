/* Inputs of a merge: tensors in memory or in files, read in steps that stay in the L2 cache and processed in chunks that
   stay in the L1 cache. */

#ifndef MERGEFORGE_INPUTS_H
#define MERGEFORGE_INPUTS_H

#include <errno.h>
#include <unistd.h>

#include "floats.h"

/* Consecutive elements of a tensor: in memory at `data`, or in a file from byte `offset` on. */
struct input {
    const char *data; /* NULL: in a file */
    int file;         /* file descriptor */
    int64_t offset;
    int64_t dtype;
};

/* The inputs of a call. If there is a base to subtract, it is the last one. */
struct inputs {
    const struct input *tensors;
    int64_t count;      /* without the base */
    int64_t has_base;
    int64_t length;     /* elements of each */
    int64_t read_elems; /* the most elements of each that are read at a time */
    char *read_buffer;  /* read_elems elements of each input in a file, at four bytes each */
    const void **step;  /* room for a pointer to each input */
};

INLINE int64_t tensor_count(const struct inputs *inputs) { return inputs->count + inputs->has_base; }

static inline int read_file(int file, char *out, int64_t nbytes, int64_t offset) {
    while (nbytes > 0) {
        ssize_t count = pread(file, out, (size_t)nbytes, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return 0;
        out += count, offset += count, nbytes -= count;
    }
    return 1;
}

/* Iterates over the elements of all inputs, a chunk at a time, and reads them in larger steps. */
struct chunks {
    const struct inputs *inputs;
    int64_t chunk;
    int64_t step_start, step_count; /* the step: its first element, and how many there are */
    int64_t start, count;           /* the chunk, relative to the step */
    int64_t failed;                 /* 1 + the number of the input that could not be read */
};

INLINE struct chunks chunks_of(const struct inputs *inputs, int64_t chunk) {
    struct chunks chunks = {.inputs = inputs, .chunk = chunk};
    return chunks;
}

/* Read the elements of the step; sets inputs->step. */
static inline int read_step(struct chunks *chunks) {
    const struct inputs *inputs = chunks->inputs;
    char *buffer = inputs->read_buffer;
    for (int64_t k = 0; k < tensor_count(inputs); k++) {
        const struct input *input = inputs->tensors + k;
        int64_t size = itemsize(input->dtype), first = chunks->step_start * size;
        if (input->data) {
            inputs->step[k] = input->data + first;
            continue;
        }
        if (!read_file(input->file, buffer, chunks->step_count * size, input->offset + first)) {
            chunks->failed = k + 1;
            return 0;
        }
        inputs->step[k] = buffer;
        buffer += inputs->read_elems * (int64_t)sizeof(float);
    }
    return 1;
}

/* Whether the next chunk begins a new step. */
INLINE int starts_step(const struct chunks *chunks) { return chunks->start == 0; }

/* Move to the next chunk; 0 at the end or after a read error. */
INLINE int next_chunk(struct chunks *chunks) {
    chunks->start += chunks->count;
    if (chunks->start == chunks->step_count) {
        chunks->step_start += chunks->step_count;
        if (chunks->step_start >= chunks->inputs->length) return 0;
        chunks->step_count = min_of(chunks->inputs->read_elems, chunks->inputs->length - chunks->step_start);
        if (!read_step(chunks)) return 0;
        chunks->start = 0;
    }
    chunks->count = min_of(chunks->chunk, chunks->step_count - chunks->start);
    return 1;
}

/* Functions on loaded elements have a version per dtype, so that the compiler sees a constant in the loop. */
#define FOR_DTYPE(dtype, call)             \
    do {                                   \
        if ((dtype) == BF16) call(BF16);   \
        else if ((dtype) == F16) call(F16); \
        else call(F32);                    \
    } while (0)

INLINE void load_sub_as(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = load_f32(data, dtype, start + i) - base[i];
}

/* `count` elements from element `start` on, minus the base. */
INLINE void load_sub(const void *data, int64_t dtype, int64_t start, int64_t count, const float *base, float *out) {
#define LOAD(constant) load_sub_as(data, constant, start, count, base, out)
    FOR_DTYPE(dtype, LOAD);
#undef LOAD
}

/* The chunk of input `k`, minus the base. */
INLINE void load_chunk(const struct chunks *chunks, int64_t k, const float *base, float *out) {
    load_sub(chunks->inputs->step[k], chunks->inputs->tensors[k].dtype, chunks->start, chunks->count, base, out);
}

/* The chunk of the base in `buffer`; zeros if there is none. */
INLINE const float *load_base(const struct chunks *chunks, float *buffer) {
    if (!chunks->inputs->has_base) return ZEROS;
    load_chunk(chunks, chunks->inputs->count, ZEROS, buffer);
    return buffer;
}

#endif
