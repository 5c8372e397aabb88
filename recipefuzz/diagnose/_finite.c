/* Reads a loss and its gradients in one go, where they are: `recipefuzz.watch` does so after every backward pass.
 *
 * Between two steps of training torch's own code is out of the processor's caches, so that each of its operations costs
 * several microseconds, however small the tensor. This asks torch only for an address, by DLPack's table of functions:
 * https://dmlc.github.io/dlpack/latest/c_api.html, in torch from 2.10 on. It is optional: without it, or with a tensor
 * that it doesn't read, history.py asks torch.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* --- DLPack 1, what of it is used */

enum { CPU = 1, REAL = 2, BFLOAT = 4, MAJOR = 1 };

typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides; /* strides in elements */
    uint64_t byte_offset;
} Array;

typedef struct {
    uint32_t major, minor;
    void *earlier, *allocate, *own_from_object, *object_from_own;
    int (*from_object)(void *object, Array *out); /* borrowed; 0, or -1 with an exception set */
    void *stream;
} Exchange;

/* --- a number is inf or NaN if all bits of its exponent are set: one more in the last of them reaches the sign's */

enum { LANES = 16 }; /* looked at side by side: a loop of constant length is vectorized at -O2, too */

#define ANY_BAD(NAME, WORD, EXPONENT)                                                                                  \
    static int NAME(const char *data, int64_t count) {                                                                 \
        const WORD sign = (WORD)((WORD)1 << (8 * sizeof(WORD) - 1)), last = (EXPONENT) & -(EXPONENT);                  \
        WORD seen[LANES] = {0}, word;                                                                                  \
        int64_t done = 0;                                                                                              \
        for (; done + LANES <= count; done += LANES)                                                                   \
            for (int lane = 0; lane < LANES; lane++) {                                                                 \
                memcpy(&word, data + (done + lane) * (int64_t)sizeof word, sizeof word);                               \
                seen[lane] |= (WORD)((word & (WORD)~sign) + last);                                                     \
            }                                                                                                          \
        for (; done < count; done++) {                                                                                 \
            memcpy(&word, data + done * (int64_t)sizeof word, sizeof word);                                            \
            seen[0] |= (WORD)((word & (WORD)~sign) + last);                                                            \
        }                                                                                                              \
        for (int lane = 1; lane < LANES; lane++)                                                                       \
            seen[0] |= seen[lane];                                                                                     \
        return (seen[0] & sign) != 0;                                                                                  \
    }

ANY_BAD(any_bad_double, uint64_t, 0x7ff0000000000000u)
ANY_BAD(any_bad_float, uint32_t, 0x7f800000u)
ANY_BAD(any_bad_half, uint16_t, 0x7c00u)
ANY_BAD(any_bad_bfloat, uint16_t, 0x7f80u)

/* --- tensors */

typedef struct {
    PyObject *tensor, *grad, *storage_offset;
    const Exchange *exchange;
} State;

/* Whether a tensor has memory: a view of none, which torch takes for zeros or has freed, has an address, its offset. */
static int has_memory(const State *state, PyObject *tensor, const Array *array) {
    PyObject *offset = PyObject_CallMethodObjArgs(tensor, state->storage_offset, NULL);
    uintptr_t elements = offset ? (uintptr_t)PyLong_AsSize_t(offset) : 0;
    Py_XDECREF(offset);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return 0;
    }
    return (uintptr_t)array->data != elements * (array->bits / 8);
}

/* Whether it is an ordinary tensor in the CPU's memory, without gaps. No exception is left. */
static int borrow(const State *state, PyObject *tensor, Array *array, int64_t *count) {
    if ((PyObject *)Py_TYPE(tensor) != state->tensor)
        return 0;
    if (state->exchange->from_object(tensor, array)) {
        PyErr_Clear();
        return 0;
    }
    int64_t span = 1;
    *count = 1;
    for (int32_t i = 0; i < array->ndim; i++) {
        *count *= array->shape[i];
        span += (array->shape[i] - 1) * array->strides[i];
    }
    return array->device_type == CPU && array->lanes == 1 &&
           (*count == 0 || (span == *count && has_memory(state, tensor, array)));
}

/* 1 and 0: whether all its numbers are finite; -1: it can't be read. */
static int is_finite(const State *state, PyObject *tensor) {
    Array array;
    int64_t count;
    if (!borrow(state, tensor, &array, &count))
        return -1;
    const char *data = (const char *)array.data + array.byte_offset;
    switch (array.code << 8 | array.bits) {
    case REAL << 8 | 64:
        return !any_bad_double(data, count);
    case REAL << 8 | 32:
        return !any_bad_float(data, count);
    case REAL << 8 | 16:
        return !any_bad_half(data, count);
    case BFLOAT << 8 | 16:
        return !any_bad_bfloat(data, count);
    default:
        return -1;
    }
}

/* The one number that a loss is; NaN if it can't be read. */
static double number(const State *state, PyObject *loss) {
    Array array;
    int64_t count;
    float single;
    double value = Py_NAN;
    if (!borrow(state, loss, &array, &count) || count != 1 || array.code != REAL)
        return value;
    const char *data = (const char *)array.data + array.byte_offset;
    if (array.bits == 64) {
        memcpy(&value, data, sizeof value);
    } else if (array.bits == 32) {
        memcpy(&single, data, sizeof single);
        value = single;
    }
    return value;
}

static PyObject *finite_loss(PyObject *module, PyObject *const *args, Py_ssize_t given) {
    if (given != 3 || !PyList_Check(args[1]) || !PyList_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "finite_loss(loss, parameters, gradients): the last two are lists");
        return NULL;
    }
    const State *state = PyModule_GetState(module);
    PyObject *parameters = args[1], *gradients = args[2];
    int readable = 1;
    for (Py_ssize_t i = 0; i < PyList_Size(parameters); i++) {
        PyObject *gradient = PyObject_GetAttr(PyList_GetItem(parameters, i), state->grad);
        if (!gradient)
            return NULL;
        int failed = 0;
        if (gradient != Py_None) {
            failed = PyList_Append(gradients, gradient);
            readable = readable && is_finite(state, gradient) == 1;
        }
        Py_DECREF(gradient);
        if (failed)
            return NULL;
    }
    double value = args[0] == Py_None ? 0.0 : number(state, args[0]);
    if (readable && value - value == 0)
        return PyFloat_FromDouble(value);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(finite_loss_doc, "A loss' value (0 for None) if it and the parameters' gradients are finite numbers on the CPU, else None.\n\n"
                              "Appends the gradients to the third argument.");

/* --- the module */

static int load(PyObject *module) {
    State *state = PyModule_GetState(module);
    PyObject *torch = PyImport_ImportModule("torch");
    if (!torch)
        return -1;
    state->tensor = PyObject_GetAttrString(torch, "Tensor");
    Py_DECREF(torch);
    state->grad = PyUnicode_InternFromString("grad");
    state->storage_offset = PyUnicode_InternFromString("storage_offset");
    if (!state->tensor || !state->grad || !state->storage_offset)
        return -1;
    PyObject *table = PyObject_GetAttrString(state->tensor, "__dlpack_c_exchange_api__");
    if (table) {
        state->exchange = PyCapsule_GetPointer(table, "dlpack_exchange_api"); /* it lives as long as torch */
        Py_DECREF(table);
    }
    if (!state->exchange || state->exchange->major != MAJOR || !state->exchange->from_object) {
        PyErr_SetString(PyExc_ImportError, "this torch has no DLPack 1 exchange of borrowed tensors");
        return -1;
    }
    return 0;
}

static int visit_state(PyObject *module, visitproc visit, void *arg) {
    State *state = PyModule_GetState(module);
    Py_VISIT(state->tensor);
    return 0;
}

static int clear_state(PyObject *module) {
    State *state = PyModule_GetState(module);
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->grad);
    Py_CLEAR(state->storage_offset);
    return 0;
}

static PyMethodDef methods[] = {
    {"finite_loss", (PyCFunction)(void (*)(void))finite_loss, METH_FASTCALL, finite_loss_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, load}, {0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_finite",
    .m_size = sizeof(State),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = visit_state,
    .m_clear = clear_state,
};

PyMODINIT_FUNC PyInit__finite(void) { return PyModuleDef_Init(&definition); }
