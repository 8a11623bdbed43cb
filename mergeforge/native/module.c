/* mergeforge.native._kernels: the border between Python and the kernels.

   Arrays come in through the buffer protocol. Their types, sizes, contiguity and alignment are checked here, so that no
   argument, however wrong, makes a kernel read or write outside of them. Wrong types raise TypeError, wrong sizes and
   values ValueError, and an input that cannot be read from its file ReadError(number of the input). Kernels run without
   the GIL. Built for the stable ABI of Python 3.11, the first one with the buffer protocol. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <stdlib.h>

#include "quantize.h"
#include "reductions.h"

/* Raised by each change of a function's arguments or results; bindings.py refuses a library of another one. */
enum { INTERFACE = 3 };
enum { MAX_ARRAYS = 16, MAX_ALLOCATIONS = 8, STEP_ELEMS = 1 << 16 };
static const int64_t MAX_LENGTH = (int64_t)1 << 40; /* far below overflows */

static PyObject *ReadError;

/* ---- Arrays ---- */

/* What a call borrows from Python and allocates: all of it is given back by release(). */
struct call {
    Py_buffer arrays[MAX_ARRAYS];
    int array_count;
    Py_buffer *memory; /* of inputs in memory */
    int64_t memory_count;
    void *allocated[MAX_ALLOCATIONS];
    int allocated_count;
    struct inputs inputs;
    struct reduction reduction;
};

static void release(struct call *call) {
    for (int i = 0; i < call->array_count; i++) PyBuffer_Release(call->arrays + i);
    for (int64_t i = 0; i < call->memory_count; i++) PyBuffer_Release(call->memory + i);
    for (int i = 0; i < call->allocated_count; i++) free(call->allocated[i]);
}

/* Zeroed memory that lives as long as the call. */
static void *allocate(struct call *call, int64_t count, int64_t size) {
    void *memory = NULL;
    if (call->allocated_count == MAX_ALLOCATIONS)
        PyErr_SetString(PyExc_SystemError, "too many allocations in one call");
    else if (!(memory = calloc((size_t)(count > 0 ? count : 1), (size_t)size)))
        PyErr_NoMemory();
    else
        call->allocated[call->allocated_count++] = memory;
    return memory;
}

/* The kinds of array elements; each is the letter of the struct module for it. */
enum kind { BYTE = 'B', FLOAT = 'f', DOUBLE = 'd', INT32 = 'i', UINT32 = 'I', INT64 = 'q' };

static Py_ssize_t kind_nbytes(enum kind kind) {
    return kind == BYTE ? 1 : kind == DOUBLE || kind == INT64 ? 8 : 4;
}

static const char *kind_name(enum kind kind) {
    switch (kind) {
        case BYTE: return "uint8";
        case FLOAT: return "float32";
        case DOUBLE: return "float64";
        case INT32: return "int32";
        case UINT32: return "uint32";
        default: return "int64";
    }
}

/* The format letters of the kind; which of them an array uses differs between systems. */
static const char *kind_letters(enum kind kind) {
    return kind == BYTE ? "B" : kind == FLOAT ? "f" : kind == DOUBLE ? "d" : kind == UINT32 ? "IL" : "ilq";
}

static int is_kind(const Py_buffer *view, enum kind kind) {
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || *format == '<') format++;
    return view->itemsize == kind_nbytes(kind) && format[0] && !format[1] && strchr(kind_letters(kind), format[0]);
}

/* Borrow a contiguous array of the kind into `view`. Returns 0 and sets an exception if it is something else. */
static int borrow(PyObject *object, enum kind kind, int writable, const char *name, Py_buffer *view) {
    if (PyObject_GetBuffer(object, view, PyBUF_FULL_RO) < 0) return 0;
    if (!is_kind(view, kind))
        PyErr_Format(PyExc_TypeError, "%s must hold %s, not elements of format '%s' and %zd bytes", name,
                     kind_name(kind), view->format ? view->format : "B", view->itemsize);
    else if (!PyBuffer_IsContiguous(view, 'C'))
        PyErr_Format(PyExc_ValueError, "%s is not contiguous", name);
    else if (writable && view->readonly)
        PyErr_Format(PyExc_ValueError, "%s is read-only", name);
    else if ((uintptr_t)view->buf % (uintptr_t)view->itemsize)
        PyErr_Format(PyExc_ValueError, "%s is not aligned to %zd bytes", name, view->itemsize);
    else
        return 1;
    PyBuffer_Release(view);
    return 0;
}

/* The elements of an array argument, `count` of them (-1: any number); NULL and an exception if it has others. */
static void *array(struct call *call, PyObject *object, enum kind kind, int writable, int64_t count, const char *name) {
    Py_buffer *view = call->arrays + call->array_count;
    if (call->array_count == MAX_ARRAYS) return PyErr_SetString(PyExc_SystemError, "too many arrays in one call"), NULL;
    if (!borrow(object, kind, writable, name, view)) return NULL;
    call->array_count++;
    if (count >= 0 && view->len != count * view->itemsize) {
        PyErr_Format(PyExc_ValueError, "%s has %zd elements instead of %lld", name, view->len / view->itemsize,
                     (long long)count);
        return NULL;
    }
    static char nothing[8];  /* an empty buffer may have no address, but NULL means an exception */
    return view->buf ? view->buf : nothing;
}

/* The number of elements of the array that was borrowed last. */
static int64_t last_count(const struct call *call) {
    const Py_buffer *view = call->arrays + call->array_count - 1;
    return view->len / view->itemsize;
}

/* ---- Inputs ---- */

static int parse_dtype(const char *name, int64_t *dtype) {
    *dtype = !strcmp(name, "BF16") ? BF16 : !strcmp(name, "F16") ? F16 : F32;
    if (*dtype != F32 || !strcmp(name, "F32")) return 1;
    PyErr_Format(PyExc_ValueError, "dtype must be BF16, F16 or F32, not %s", name);
    return 0;
}

/* One input: (array or file descriptor, byte offset, dtype). */
static int parse_input(struct call *call, PyObject *object, struct input *input) {
    PyObject *source;
    const char *dtype;
    long long offset;
    if (!PyTuple_Check(object)) return PyErr_SetString(PyExc_TypeError, "an input must be a tuple"), 0;
    if (!PyArg_ParseTuple(object, "OLs;an input is (array or file descriptor, offset, dtype)", &source, &offset, &dtype))
        return 0;
    if (!parse_dtype(dtype, &input->dtype)) return 0;
    if (offset < 0) return PyErr_SetString(PyExc_ValueError, "an input's offset is negative"), 0;
    input->offset = offset;
    if (PyLong_Check(source)) {
        input->file = (int)PyLong_AsLong(source);
        if (input->file < 0 && !PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "a file descriptor is negative");
        return !PyErr_Occurred();
    }
    Py_buffer *view = call->memory + call->memory_count;
    if (!borrow(source, BYTE, 0, "an input", view)) return 0;
    call->memory_count++;
    int64_t size = itemsize(input->dtype);
    if (offset > view->len || (view->len - offset) / size < call->inputs.length)
        return PyErr_Format(PyExc_ValueError, "an input ends before its last element"), 0;
    input->data = (const char *)view->buf + offset;
    if ((uintptr_t)input->data % (uintptr_t)size)
        return PyErr_Format(PyExc_ValueError, "an input is not aligned to its elements"), 0;
    return 1;
}

/* Set call->inputs. A step is whole rows if `row_length` is not 0. */
static int parse_inputs(struct call *call, PyObject *tensors, int has_base, int64_t length, int64_t row_length,
                        PyObject *read_buffer) {
    if (!PyList_Check(tensors)) return PyErr_SetString(PyExc_TypeError, "inputs must be a list"), 0;
    int64_t count = PyList_Size(tensors), in_files = 0;
    if (count <= has_base) return PyErr_SetString(PyExc_ValueError, "there are no inputs"), 0;
    if (length < 0 || length > MAX_LENGTH) return PyErr_SetString(PyExc_ValueError, "the length is out of range"), 0;
    struct input *parsed = allocate(call, count, sizeof *parsed);
    if (!parsed) return 0;
    const void **step = allocate(call, count, sizeof *step);
    if (!step) return 0;
    if (!(call->memory = allocate(call, count, sizeof *call->memory))) return 0;
    call->inputs = (struct inputs){.tensors = parsed, .count = count - has_base, .has_base = has_base, .length = length,
                                   .step = step};
    for (int64_t k = 0; k < count; k++) {
        if (!parse_input(call, PyList_GetItem(tensors, k), parsed + k)) return 0;
        in_files += !parsed[k].data;
    }
    call->inputs.read_buffer = array(call, read_buffer, BYTE, 1, -1, "the read buffer");
    if (!call->inputs.read_buffer) return 0;
    int64_t room = last_count(call) / (count * (int64_t)sizeof(float)), whole = row_length ? row_length : CHUNK;
    if (!in_files) room = row_length > STEP_ELEMS ? row_length : STEP_ELEMS;
    if (room < whole) return PyErr_SetString(PyExc_ValueError, "the read buffer is too small"), 0;
    call->inputs.read_elems = room / whole * whole;
    if ((uintptr_t)call->inputs.read_buffer % sizeof(float))
        return PyErr_SetString(PyExc_ValueError, "the read buffer is not aligned to 4 bytes"), 0;
    return 1;
}

/* None, or ReadError, from the result of a kernel. */
static PyObject *result_of(int64_t failed, PyObject *value) {
    if (!failed && value) return value;
    if (failed) {
        Py_XDECREF(value);
        PyObject *number = PyLong_FromLongLong(failed - 1);
        if (number) PyErr_SetObject(ReadError, number);
        Py_XDECREF(number);
    }
    return NULL;
}

/* ---- Reductions ---- */

/* Masks by rank: (ranks, bits that are read or written, or None, the rows that they cover, whether they are read). */
static int parse_ranks(struct call *call, PyObject *object) {
    struct reduction *reduction = &call->reduction;
    int64_t count = call->inputs.count, columns = reduction->row_length, buffers = rank_buffers_nbytes(columns);
    PyObject *ranks, *bits;
    long long rows;
    if (!PyTuple_Check(object)) return PyErr_SetString(PyExc_TypeError, "ranks must be a tuple"), 0;
    if (!PyArg_ParseTuple(object, "OOLp;ranks are (ranks, bits, rows, is_read)", &ranks, &bits, &rows,
                          &reduction->reads_rank_bits))
        return 0;
    if (rows < 0 || rows > MAX_LENGTH / count / rank_row_nbytes(columns))
        return PyErr_SetString(PyExc_ValueError, "the rows of the ranks' bits are out of range"), 0;
    if (!(reduction->ranks = array(call, ranks, UINT32, 0, count * 9, "ranks"))) return 0;
    if (bits != Py_None) {
        int64_t nbytes = count * rows * rank_row_nbytes(columns);
        if (!(reduction->rank_bits = array(call, bits, BYTE, 1, nbytes, "the ranks' bits"))) return 0;
        reduction->rank_bits_rows = rows;
    }
    char *memory = allocate(call, buffers + columns * 4 + count * call->inputs.read_elems, 1);
    if (!memory) return 0;
    reduction->buffers = make_rank_buffers(memory, columns);
    reduction->row = (float *)(void *)(memory + buffers);
    reduction->kept = (uint8_t *)(reduction->row + columns);
    return 1;
}

/* Set the arrays that decide what is kept. */
static int parse_kept(struct call *call, PyObject *kept) {
    struct reduction *reduction = &call->reduction;
    const struct inputs *inputs = &call->inputs;
    int64_t count = inputs->count;
    switch (reduction->keep) {
        case KEEP_WHOLE: return 1;
        case KEEP_RANDOM:
            reduction->masks = array(call, kept, UINT32, 0, count * 5, "masks");
            return reduction->masks != NULL;
        case KEEP_MAGNITUDES:
        case KEEP_VARIANCE:
            reduction->ranges =
                array(call, kept, INT64, 1, 6 * (reduction->keep == KEEP_VARIANCE ? 1 : count), "ranges");
            return reduction->ranges != NULL;
        case KEEP_RANKS: return parse_ranks(call, kept);
        default: return PyErr_SetString(PyExc_ValueError, "unknown kind of reduction"), 0;
    }
}

/* Set call->inputs and call->reduction. `object`: (combine, keep, fused, normalize, divisor, scale, t, min_divisor,
   row_length, factors, weights, kept). */
static int parse_reduction(struct call *call, PyObject *tensors, int has_base, PyObject *object, int64_t element,
                           int64_t length, PyObject *read_buffer) {
    struct reduction *reduction = &call->reduction;
    PyObject *factors, *weights, *kept;
    long long row_length;
    if (!PyTuple_Check(object)) return PyErr_SetString(PyExc_TypeError, "the reduction must be a tuple"), 0;
    if (!PyArg_ParseTuple(object, "iippffffLOOO", &reduction->combine, &reduction->keep, &reduction->fused,
                          &reduction->normalize, &reduction->divisor, &reduction->scale, &reduction->t,
                          &reduction->min_divisor, &row_length, &factors, &weights, &kept))
        return 0;
    if (reduction->combine < SUM || reduction->combine > NEARSWAP)
        return PyErr_SetString(PyExc_ValueError, "unknown kind of reduction"), 0;
    if (row_length <= 0 || row_length > INT32_MAX || element < 0 || element > MAX_LENGTH)
        return PyErr_SetString(PyExc_ValueError, "rows or the first element are out of range"), 0;
    if (reduction->keep == KEEP_VARIANCE && reduction->combine == SUM)
        return PyErr_SetString(PyExc_ValueError, "a sum does not select by variance"), 0;
    reduction->row_length = row_length, reduction->element = element;
    int by_rows = reduction->keep == KEEP_RANKS;
    if (!parse_inputs(call, tensors, has_base, length, by_rows ? row_length : 0, read_buffer)) return 0;
    if (reduction->combine == NEARSWAP && (call->inputs.count != 2 || has_base))
        return PyErr_SetString(PyExc_ValueError, "nearswap takes two inputs and no base"), 0;
    if (!(reduction->factors = array(call, factors, FLOAT, 0, call->inputs.count, "factors"))) return 0;
    if (!(reduction->weights = array(call, weights, FLOAT, 0, call->inputs.count, "weights"))) return 0;
    if (!(reduction->values = allocate(call, call->inputs.count * VALUES_STRIDE, sizeof(float)))) return 0;
    return parse_kept(call, kept);
}

static PyObject *py_reduce(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    PyObject *tensors, *reduction, *out, *changes, *read_buffer, *result = NULL;
    const char *dtype_name;
    int has_base;
    long long element, length, measured;
    int64_t dtype;
    uint32_t max_bits = 0;
    if (!PyArg_ParseTuple(arguments, "OpOLLsOOLO:reduce", &tensors, &has_base, &reduction, &element, &length,
                          &dtype_name, &out, &changes, &measured, &read_buffer))
        return NULL;
    if (parse_dtype(dtype_name, &dtype) &&
        parse_reduction(&call, tensors, has_base, reduction, element, length, read_buffer)) {
        char *bytes = array(&call, out, BYTE, 1, length * itemsize(dtype), "out");
        double *sums = bytes ? array(&call, changes, DOUBLE, 1, 5, "changes") : NULL;
        if (bytes && (uintptr_t)bytes % (uintptr_t)itemsize(dtype))
            PyErr_SetString(PyExc_ValueError, "out is not aligned to its elements");
        else if (bytes && sums) {
            int64_t failed;
            Py_BEGIN_ALLOW_THREADS;
            failed = reduce(&call.inputs, &call.reduction, dtype, bytes, &max_bits, sums, measured);
            Py_END_ALLOW_THREADS;
            result = result_of(failed, PyFloat_FromDouble(float_of(max_bits)));
        }
    }
    release(&call);
    return result;
}

typedef int64_t measure(const struct inputs *inputs, const struct reduction *reduction, double *sums);

static PyObject *measured(PyObject *arguments, measure *kernel, int64_t per_input) {
    struct call call = {0};
    PyObject *tensors, *reduction, *sums, *read_buffer, *result = NULL;
    int has_base;
    long long element, length;
    if (!PyArg_ParseTuple(arguments, "OpOLLOO", &tensors, &has_base, &reduction, &element, &length, &sums, &read_buffer))
        return NULL;
    if (parse_reduction(&call, tensors, has_base, reduction, element, length, read_buffer)) {
        int by_variance = call.reduction.keep == KEEP_VARIANCE;
        if (by_variance && kernel == l1_norms) PyErr_SetString(PyExc_ValueError, "norms do not select by variance");
        double *totals = PyErr_Occurred() ? NULL : array(&call, sums, DOUBLE, 1, per_input * call.inputs.count, "sums");
        if (totals) {
            int64_t failed;
            Py_BEGIN_ALLOW_THREADS;
            failed = kernel(&call.inputs, &call.reduction, totals);
            Py_END_ALLOW_THREADS;
            result = result_of(failed, Py_NewRef(Py_None));
        }
    }
    release(&call);
    return result;
}

static PyObject *py_l1_norms(PyObject *module, PyObject *arguments) {
    (void)module;
    return measured(arguments, l1_norms, 2);
}

static PyObject *py_kept_squares(PyObject *module, PyObject *arguments) {
    (void)module;
    return measured(arguments, kept_squares, 1);
}

/* ---- Values and statistics ---- */

static PyObject *py_load_values(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    PyObject *tensors, *out, *read_buffer, *result = NULL;
    int has_base;
    long long length;
    if (!PyArg_ParseTuple(arguments, "OpLOO:load_values", &tensors, &has_base, &length, &out, &read_buffer)) return NULL;
    float *values;
    if (parse_inputs(&call, tensors, has_base, length, 0, read_buffer) &&
        (values = array(&call, out, FLOAT, 1, length, "out"))) {
        int64_t failed;
        Py_BEGIN_ALLOW_THREADS;
        failed = load_values(&call.inputs, values);
        Py_END_ALLOW_THREADS;
        result = result_of(failed, Py_NewRef(Py_None));
    }
    release(&call);
    return result;
}

static PyObject *py_variances(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    PyObject *tensors, *out, *read_buffer, *result = NULL;
    int has_base;
    long long length;
    if (!PyArg_ParseTuple(arguments, "OpLOO:variances", &tensors, &has_base, &length, &out, &read_buffer)) return NULL;
    float *values, *buffer;
    if (parse_inputs(&call, tensors, has_base, length, 0, read_buffer) &&
        (values = array(&call, out, FLOAT, 1, length, "out")) &&
        (buffer = allocate(&call, (call.inputs.count + 1) * VALUES_STRIDE, sizeof(float)))) {
        int64_t failed;
        Py_BEGIN_ALLOW_THREADS;
        failed = variances(&call.inputs, buffer, values);
        Py_END_ALLOW_THREADS;
        result = result_of(failed, Py_NewRef(Py_None));
    }
    release(&call);
    return result;
}

static PyObject *py_inner_products(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    PyObject *tensors, *sums, *read_buffer, *result = NULL;
    int has_base;
    long long length;
    if (!PyArg_ParseTuple(arguments, "OpLOO:inner_products", &tensors, &has_base, &length, &sums, &read_buffer))
        return NULL;
    if (parse_inputs(&call, tensors, has_base, length, 0, read_buffer)) {
        int64_t count = call.inputs.count;
        double *totals = array(&call, sums, DOUBLE, 1, count * (count + 1) / 2, "sums");
        double *values = totals ? allocate(&call, count * PRODUCT_CHUNK, sizeof(double)) : NULL;
        if (values) {
            int64_t failed;
            Py_BEGIN_ALLOW_THREADS;
            failed = inner_products(&call.inputs, values, totals);
            Py_END_ALLOW_THREADS;
            result = result_of(failed, Py_NewRef(Py_None));
        }
    }
    release(&call);
    return result;
}

/* One interval: (input, low, high, guess, inside). Its counts are (inside, above, equal, nonzero). */
static int parse_interval(struct call *call, PyObject *object, const int64_t *counts, struct magnitude_count *interval,
                          Py_buffer *view) {
    PyObject *inside;
    long long input;
    if (!PyTuple_Check(object)) return PyErr_SetString(PyExc_TypeError, "an interval must be a tuple"), 0;
    if (!PyArg_ParseTuple(object, "LiiiO;an interval is (input, low, high, guess, inside)", &input, &interval->low,
                          &interval->high, &interval->guess, &inside))
        return 0;
    if (input < VARIANCE || input >= call->inputs.count || interval->low < 0 || interval->guess < interval->low ||
        interval->guess >= interval->high)
        return PyErr_SetString(PyExc_ValueError, "an interval's input, end or guess is out of range"), 0;
    if (!borrow(inside, INT32, 1, "inside", view)) return 0;
    call->memory_count++;
    interval->input = input, interval->inside = view->buf;
    interval->capacity = view->len / view->itemsize;
    interval->count = counts[0], interval->above = counts[1];
    interval->equal = counts[2], interval->nonzero = counts[3];
    if (interval->count < 0 || interval->count + CHUNK > interval->capacity)
        return PyErr_SetString(PyExc_ValueError, "inside has no room for a chunk"), 0;
    return 1;
}

static PyObject *py_count_magnitudes(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    PyObject *tensors, *intervals, *counts, *read_buffer, *result = NULL;
    int has_base;
    long long length;
    if (!PyArg_ParseTuple(arguments, "OpLOOO:count_magnitudes", &tensors, &has_base, &length, &intervals, &counts,
                          &read_buffer))
        return NULL;
    if (!PyList_Check(intervals)) return PyErr_SetString(PyExc_TypeError, "intervals must be a list"), NULL;
    int64_t count = PyList_Size(intervals), done = 0, *totals, parsed = 0;
    struct call interval_call = {0};
    struct magnitude_count *table = NULL;
    float *values = NULL;
    if (parse_inputs(&call, tensors, has_base, length, 0, read_buffer) &&
        (totals = array(&call, counts, INT64, 1, 4 * count, "counts")) &&
        (table = allocate(&interval_call, count, sizeof *table)) &&
        (interval_call.memory = allocate(&interval_call, count, sizeof *interval_call.memory)) &&
        (values = allocate(&interval_call, (call.inputs.count + 1) * VALUES_STRIDE, sizeof(float)))) {
        interval_call.inputs = call.inputs;
        while (parsed < count && parse_interval(&interval_call, PyList_GetItem(intervals, parsed), totals + 4 * parsed,
                                                table + parsed, interval_call.memory + parsed))
            parsed++;
        if (parsed == count) {
            int64_t failed;
            Py_BEGIN_ALLOW_THREADS;
            failed = count_magnitudes(&call.inputs, table, count, values, &done);
            Py_END_ALLOW_THREADS;
            for (int64_t k = 0; k < count; k++)
                memcpy(totals + 4 * k, (int64_t[]){table[k].count, table[k].above, table[k].equal, table[k].nonzero},
                       4 * sizeof *totals);
            result = result_of(failed, PyLong_FromLongLong(done));
        }
    }
    release(&interval_call);
    release(&call);
    return result;
}

/* ---- Quantizers ---- */

static const struct quant_type *find_quant_type(const char *name) {
    const struct quant_type *type = quant_types;
    while (type->name && strcmp(type->name, name)) type++;
    if (type->name) return type;
    PyErr_Format(PyExc_ValueError, "there is no quantizer for %s", name);
    return NULL;
}

static PyObject *py_quantize(PyObject *module, PyObject *arguments) {
    (void)module;
    struct call call = {0};
    const char *name;
    PyObject *rows, *importance, *out, *result = NULL;
    long long columns;
    if (!PyArg_ParseTuple(arguments, "sOOLO:quantize", &name, &rows, &importance, &columns, &out)) return NULL;
    const struct quant_type *type = find_quant_type(name);
    if (!type) return NULL;
    if (columns <= 0 || columns > MAX_LENGTH || columns % type->block)
        return PyErr_Format(PyExc_ValueError, "columns must be a multiple of %lld, not %lld", (long long)type->block,
                            columns);
    const float *x = array(&call, rows, FLOAT, 0, -1, "rows"), *weights = NULL;
    int64_t length = PyErr_Occurred() ? 0 : last_count(&call), blocks = length / type->block;
    if (length % columns)
        PyErr_Format(PyExc_ValueError, "rows are %lld elements, not a multiple of %lld", (long long)length, columns);
    if (!PyErr_Occurred() && importance != Py_None)
        weights = array(&call, importance, FLOAT, 0, columns, "importance");
    if (!PyErr_Occurred() && type->needs_importance && !weights)
        PyErr_Format(PyExc_ValueError, "%s needs importance", name);
    uint8_t *bytes = PyErr_Occurred() ? NULL : array(&call, out, BYTE, 1, blocks * type->nbytes, "out");
    if (!PyErr_Occurred() && type->prepare && !type->prepare()) PyErr_NoMemory();
    if (!PyErr_Occurred()) { /* an empty array may be NULL */
        Py_BEGIN_ALLOW_THREADS;
        type->quantize(x, weights, columns, blocks, bytes);
        Py_END_ALLOW_THREADS;
        result = Py_NewRef(Py_None);
    }
    release(&call);
    return result;
}

/* {name: (elements of a block, bytes of a block)} */
static PyObject *quant_type_sizes(void) {
    PyObject *sizes = PyDict_New();
    for (const struct quant_type *type = quant_types; sizes && type->name; type++) {
        PyObject *size = Py_BuildValue("(LL)", (long long)type->block, (long long)type->nbytes);
        if (!size || PyDict_SetItemString(sizes, type->name, size) < 0) Py_CLEAR(sizes);
        Py_XDECREF(size);
    }
    return sizes;
}

static PyObject *py_vector_width(PyObject *module, PyObject *arguments) {
    (void)module;
    int width = -1;
    if (!PyArg_ParseTuple(arguments, "|i:vector_width", &width)) return NULL;
    if (width >= BASELINE) {
        detect_vector_width();
        if (width < (int)vector_width) vector_width = (enum vector_width)width;
    }
    return PyLong_FromLong(vector_width);
}

/* ---- The module ---- */

static PyMethodDef METHODS[] = {
    {"reduce", py_reduce, METH_VARARGS,
     "reduce(inputs, has_base, reduction, element, length, dtype, out, changes, measured, read_buffer)\n\n"
     "Merge `length` elements from `element` on; returns the largest magnitude before rounding."},
    {"l1_norms", py_l1_norms, METH_VARARGS,
     "l1_norms(inputs, has_base, reduction, element, length, sums, read_buffer)\n\n"
     "Add the L1 norm of each input, and of what is kept of it."},
    {"kept_squares", py_kept_squares, METH_VARARGS,
     "kept_squares(inputs, has_base, reduction, element, length, sums, read_buffer)\n\n"
     "Add the squares of what is kept of each input."},
    {"load_values", py_load_values, METH_VARARGS,
     "load_values(inputs, has_base, length, out, read_buffer)\n\nThe first input, minus the base, as float32."},
    {"variances", py_variances, METH_VARARGS,
     "variances(inputs, has_base, length, out, read_buffer)\n\nThe variance over the inputs of each element."},
    {"inner_products", py_inner_products, METH_VARARGS,
     "inner_products(inputs, has_base, length, sums, read_buffer)\n\nAdd the inner products of all pairs of inputs."},
    {"count_magnitudes", py_count_magnitudes, METH_VARARGS,
     "count_magnitudes(inputs, has_base, length, intervals, counts, read_buffer)\n\n"
     "Count magnitudes by their bits; returns how many elements were counted before a buffer was full."},
    {"quantize", py_quantize, METH_VARARGS,
     "quantize(type, rows, importance, columns, out)\n\n"
     "Encode whole rows of float32 in a type of QUANT_TYPES; importance: a weight for each column, or None."},
    {"vector_width", py_vector_width, METH_VARARGS,
     "vector_width(limit=...)\n\nThe vector width in use (0: baseline, 1: AVX2, 2: AVX-512), after limiting it."},
    {NULL, NULL, 0, NULL}};

static int execute(PyObject *module) {
    detect_vector_width();
    ReadError = PyErr_NewException("mergeforge.native._kernels.ReadError", NULL, NULL);
    if (!ReadError || PyModule_AddObjectRef(module, "ReadError", ReadError) < 0) return -1;
    PyObject *sizes = quant_type_sizes();
    int failed = !sizes || PyModule_AddObjectRef(module, "QUANT_TYPES", sizes) < 0;
    Py_XDECREF(sizes);
    return failed ? -1 : PyModule_AddIntConstant(module, "INTERFACE", INTERFACE);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static struct PyModuleDef DEFINITION = {.m_base = PyModuleDef_HEAD_INIT,
                                        .m_name = "mergeforge.native._kernels",
                                        .m_doc = "Merge loops and quantizers in C.",
                                        .m_methods = METHODS,
                                        .m_slots = SLOTS};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&DEFINITION); }
