/* The replay's inner loop: what CachingAllocator.play does with plain settings, twenty to fifty times faster.

   planner/allocator.py is the description and does the same wherever this file was not compiled, where other settings
   are wanted, or where the driver has no more to give. tests/planner/test_compiled_replay.py compares the two. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define EDITION 1 /* as in planner/allocator.py: what was compiled from other rules is not used */
#define MIB ((int64_t)1 << 20)
#define MIN_BLOCK 512
#define SMALL_LIMIT (1 * MIB)
#define SMALL_SEGMENT (2 * MIB)
#define OWN_SEGMENT_FROM (10 * MIB)
#define ROUND_LARGE (2 * MIB)

typedef struct Block {
    int64_t address, size;
    struct Block *before, *after; /* neighbours within the segment */
    struct Block *next;           /* in the chain of spare ones */
    struct Pool *pool;
    int free;
} Block;

typedef struct {
    int64_t size;
    Block **blocks;
    Py_ssize_t count, room;
} Equals; /* free blocks of one size, the lowest address last */

typedef struct Pool {
    Equals *sizes; /* rising; an empty one is taken out */
    Py_ssize_t count, room;
    int64_t least_rest;
} Pool;

typedef struct Chunk {
    struct Chunk *next;
    Block blocks[256];
} Chunk;

typedef struct {
    Pool small, large;
    Block **living;
    Py_ssize_t n_slots;
    Block *spare;
    Chunk *chunks;
    int64_t next_address, large_segment, cap;
    int64_t allocated, peak_allocated, reserved;
} Allocator;

typedef enum { DONE, FULL, FAILED } Outcome;

static Block *new_block(Allocator *a)
{
    if (a->spare == NULL) {
        Chunk *chunk = PyMem_Malloc(sizeof(Chunk));
        if (chunk == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
        chunk->next = a->chunks;
        a->chunks = chunk;
        for (int i = 0; i < 256; i++) {
            chunk->blocks[i].next = a->spare;
            a->spare = &chunk->blocks[i];
        }
    }
    Block *block = a->spare;
    a->spare = block->next;
    return block;
}

static void drop_block(Allocator *a, Block *block)
{
    block->next = a->spare;
    a->spare = block;
}

/* room for one element more */
static void *grown(void *items, Py_ssize_t count, Py_ssize_t *room, size_t size)
{
    if (count < *room)
        return items;
    Py_ssize_t wanted = *room ? 2 * *room : 8;
    void *larger = PyMem_Realloc(items, (size_t)wanted * size);
    if (larger == NULL)
        PyErr_NoMemory();
    else
        *room = wanted;
    return larger;
}

/* the first size that is not below the wanted one */
static Py_ssize_t fitting(const Pool *pool, int64_t size)
{
    Py_ssize_t low = 0, high = pool->count;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (pool->sizes[middle].size < size)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static Py_ssize_t above(const Equals *equals, int64_t address)
{
    Py_ssize_t low = 0, high = equals->count;
    while (low < high) {
        Py_ssize_t middle = (low + high) / 2;
        if (equals->blocks[middle]->address > address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static Block *take_out(Pool *pool, Py_ssize_t size_at, Py_ssize_t at)
{
    Equals *equals = &pool->sizes[size_at];
    Block *block = equals->blocks[at];
    equals->count--;
    memmove(equals->blocks + at, equals->blocks + at + 1, (size_t)(equals->count - at) * sizeof(Block *));
    if (equals->count == 0) {
        PyMem_Free(equals->blocks);
        pool->count--;
        memmove(equals, equals + 1, (size_t)(pool->count - size_at) * sizeof(Equals));
    }
    return block;
}

static void unlist(Block *block)
{
    Py_ssize_t size_at = fitting(block->pool, block->size);
    take_out(block->pool, size_at, above(&block->pool->sizes[size_at], block->address));
}

static int list(Block *block)
{
    Pool *pool = block->pool;
    Py_ssize_t size_at = fitting(pool, block->size);
    if (size_at == pool->count || pool->sizes[size_at].size != block->size) {
        Equals *sizes = grown(pool->sizes, pool->count, &pool->room, sizeof(Equals));
        if (sizes == NULL)
            return -1;
        pool->sizes = sizes;
        memmove(sizes + size_at + 1, sizes + size_at, (size_t)(pool->count - size_at) * sizeof(Equals));
        sizes[size_at] = (Equals){.size = block->size};
        pool->count++;
    }
    Equals *equals = &pool->sizes[size_at];
    Block **blocks = grown(equals->blocks, equals->count, &equals->room, sizeof(Block *));
    if (blocks == NULL)
        return -1;
    equals->blocks = blocks;
    Py_ssize_t at = above(equals, block->address);
    memmove(blocks + at + 1, blocks + at, (size_t)(equals->count - at) * sizeof(Block *));
    blocks[at] = block;
    equals->count++;
    block->free = 1;
    return 0;
}

static void clear(Pool *pool)
{
    for (Py_ssize_t i = 0; i < pool->count; i++)
        PyMem_Free(pool->sizes[i].blocks);
    PyMem_Free(pool->sizes);
}

static Outcome allocate(Allocator *a, int64_t n_bytes, Block **out)
{
    int64_t size = (n_bytes + MIN_BLOCK - 1) / MIN_BLOCK * MIN_BLOCK;
    Pool *pool = size <= SMALL_LIMIT ? &a->small : &a->large;
    Py_ssize_t size_at = fitting(pool, size);
    Block *block;
    if (size_at < pool->count) {
        block = take_out(pool, size_at, pool->sizes[size_at].count - 1);
    } else {
        int64_t segment = pool == &a->small        ? SMALL_SEGMENT
                          : size < OWN_SEGMENT_FROM ? a->large_segment
                                                    : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
        if (segment > a->cap - a->reserved)
            return FULL;
        if ((block = new_block(a)) == NULL)
            return FAILED;
        *block = (Block){.address = a->next_address, .size = segment, .pool = pool};
        a->next_address += segment;
        a->reserved += segment;
    }
    int64_t left = block->size - size;
    if (left >= pool->least_rest) {
        Block *rest = new_block(a);
        if (rest == NULL)
            return FAILED;
        *rest = (Block){block->address + size, left, block, block->after, NULL, pool, 1};
        if (rest->after != NULL)
            rest->after->before = rest;
        block->size = size;
        block->after = rest;
        if (list(rest) < 0)
            return FAILED;
    }
    block->free = 0;
    a->allocated += block->size;
    if (a->allocated > a->peak_allocated)
        a->peak_allocated = a->allocated;
    *out = block;
    return DONE;
}

static int give_back(Allocator *a, Block *block)
{
    Block *before = block->before, *after = block->after;
    a->allocated -= block->size;
    if (before != NULL && before->free) {
        unlist(before);
        before->size += block->size;
        before->after = after;
        if (after != NULL)
            after->before = before;
        drop_block(a, block);
        block = before;
    }
    if (after != NULL && after->free) {
        unlist(after);
        block->size += after->size;
        block->after = after->after;
        if (after->after != NULL)
            after->after->before = block;
        drop_block(a, after);
    }
    return list(block);
}

static Outcome play_one(Allocator *a, const int64_t *entries, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t n_bytes = entries[2 * i], number = entries[2 * i + 1];
        if (n_bytes < 0 || n_bytes > INT64_MAX / 4 || number < 0 || number >= a->n_slots) {
            PyErr_Format(PyExc_ValueError, "entry %zd is out of range", i);
            return FAILED;
        }
        Block **place = &a->living[number];
        if (n_bytes > 0) {
            Outcome outcome = allocate(a, n_bytes, place);
            if (outcome != DONE)
                return outcome;
        } else if (*place != NULL) {
            Block *block = *place;
            *place = NULL;
            if (give_back(a, block) < 0)
                return FAILED;
        }
    }
    return DONE;
}

static Outcome play_array(Allocator *a, PyObject *program)
{
    Py_buffer view;
    if (PyObject_GetBuffer(program, &view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) < 0)
        return FAILED;
    Outcome outcome = FAILED;
    int whole = view.format != NULL && (strcmp(view.format, "l") == 0 || strcmp(view.format, "q") == 0);
    if (!whole || view.itemsize != sizeof(int64_t) || view.ndim != 2 || view.shape[1] != 2)
        PyErr_SetString(PyExc_TypeError, "a program is an int64 array of two columns");
    else
        outcome = play_one(a, view.buf, view.shape[0]);
    PyBuffer_Release(&view);
    return outcome;
}

PyDoc_STRVAR(play_doc,
"play(programs, settled, n_blocks, large_segment_bytes, cap_bytes)\n--\n\n"
"Play arrays of (bytes, block), block < n_blocks, until one from number `settled` on reserves nothing new.\n"
"Returns the bytes allocated at the end and the peaks of allocated and reserved ones, or None at the cap.");

static PyObject *play(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *programs;
    Py_ssize_t settled;
    long long large_segment, cap, most = 1LL << 62;
    Allocator a = {.small.least_rest = MIN_BLOCK, .large.least_rest = SMALL_LIMIT + 1};
    if (!PyArg_ParseTuple(args, "O!nnLL:play", &PyTuple_Type, &programs, &settled, &a.n_slots, &large_segment, &cap))
        return NULL;
    if (a.n_slots < 0 || large_segment < OWN_SEGMENT_FROM || large_segment > most || cap < 0 || cap > most) {
        PyErr_SetString(PyExc_ValueError, "the number of blocks, the large segment or the cap is out of range");
        return NULL;
    }
    a.large_segment = large_segment;
    a.cap = cap;
    a.living = PyMem_Calloc((size_t)a.n_slots + 1, sizeof(Block *));
    if (a.living == NULL)
        return PyErr_NoMemory();
    Outcome outcome = DONE;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(programs) && outcome == DONE; i++) {
        int64_t before = a.reserved;
        outcome = play_array(&a, PyTuple_GET_ITEM(programs, i));
        if (i >= settled && a.reserved == before)
            break;
    }
    while (a.chunks != NULL) {
        Chunk *next = a.chunks->next;
        PyMem_Free(a.chunks);
        a.chunks = next;
    }
    clear(&a.small);
    clear(&a.large);
    PyMem_Free(a.living);
    if (outcome == FAILED)
        return NULL;
    if (outcome == FULL)
        Py_RETURN_NONE;
    return Py_BuildValue("LLL", (long long)a.allocated, (long long)a.peak_allocated, (long long)a.reserved);
}

static PyMethodDef methods[] = {{"play", play, METH_VARARGS, play_doc}, {NULL, NULL, 0, NULL}};

static int add_constants(PyObject *module) { return PyModule_AddIntConstant(module, "EDITION", EDITION); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, add_constants},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* nothing is shared between calls */
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_replay", "The replay's inner loop, compiled.", 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__replay(void) { return PyModuleDef_Init(&module); }
