/* The provider's plain turn: receive, parse, handle, serialize, send. Strategy: one Server turns one loop; the
 * interpreter's lock is let go once a turn, and between the loop and the user's handler runs no line of Python. Whatever
 * is not a plain response (an exception, a Future, a failed controller, news of peers) goes to a method of the owner, the
 * `_Loop` of provider.py, which decides. Rules: each request of a batch is answered or given to the owner exactly once;
 * no exception leaves a request; what one turn knows lies in its batch, so that another thread may go on with it. */
#include "_fast.h"
#include "_loop.h"

#include <stddef.h>
#include <structmember.h>

enum {
    AT_ONCE = 65536,      /* bytes of a reply from which it is sent by itself, not with its turn */
    REPLIES_MAX = 1 << 20 /* bytes that the replies' buffer keeps for the next turn */
};

enum { INTERNAL = 13 };

struct method { /* borrowed from the table */
    PyObject *entry, *parse, *handler, *kind, *serialize;
};

/* One turn's requests and what is to be sent for them. */
struct batch {
    uint32_t count, next; /* requests; the first one whose handler has not been started */
    int slow, timed;      /* arguments may lie outside of the turn's bytes; there are deadlines */
    struct mprpc_bytes replies;
    int32_t sizes[MPRPC_BATCH_MAX]; /* of each one's reply; below 0: it is answered otherwise */
};

typedef struct {
    PyObject_HEAD
    struct mprpc_loop *loop; /* the owner keeps it alive */
    const struct mprpc_record *records;
    const uint8_t *bytes;
    PyObject *owner, *table, *controllers, *ok, *status_name;
    PyObject *spare;   /* a controller that nobody has kept */
    PyObject *running; /* borrowed: the controller of the handler that runs */
    struct method *methods;
    size_t payload_max, at_once;
    unsigned long thread; /* that is in run(), or 0 */
    uint32_t index;       /* of the request whose handler runs */
    struct batch batch;
} Server;

/* The base of a provider's controllers: C sees by it whether a handler left something in one. */
typedef struct {
    PyObject_HEAD
    PyObject *attributes, *weak;
} Controller;

/* ---- controllers ---- */

static int controller_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((Controller *)self)->attributes);
    return 0;
}

static int controller_clear(PyObject *self)
{
    Py_CLEAR(((Controller *)self)->attributes);
    return 0;
}

static void controller_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    if (((Controller *)self)->weak)
        PyObject_ClearWeakRefs(self);
    controller_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMemberDef controller_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(Controller, attributes), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Controller, weak), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot controller_slots[] = {
    {Py_tp_traverse, (void *)controller_traverse},
    {Py_tp_clear, (void *)controller_clear},
    {Py_tp_dealloc, (void *)controller_dealloc},
    {Py_tp_members, controller_members},
    {0, NULL},
};

static PyType_Spec controller_spec = {"mprpc._fast.Controller", sizeof(Controller), 0,
                                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, controller_slots};

/* One for a request, a new reference. The last one is as good as new if no handler wrote to it or holds it. */
static PyObject *controller_for(Server *s)
{
    PyObject *c = s->spare;

    s->spare = NULL;
    return c ? c : PyObject_CallObject(s->controllers, NULL);
}

/* Takes the reference. A count that an interpreter keeps in another way than one word for it is never 1 here. */
static void controller_done(Server *s, PyObject *controller)
{
    Controller *c = (Controller *)controller;

    if (Py_REFCNT(controller) == 1 && !c->attributes && !c->weak && !s->spare)
        s->spare = controller;
    else
        Py_DECREF(controller);
}

/* 1, 0, or -1 with an exception set. */
static int controller_failed(Server *s, PyObject *controller)
{
    if (!((Controller *)controller)->attributes)
        return 0;
    PyObject *status = PyObject_GetAttr(controller, s->status_name);
    Py_XDECREF(status);
    return status ? status != s->ok : -1;
}

/* ---- what is not plain ---- */

/* Takes the exception that is set, with its traceback. */
static PyObject *caught(void)
{
    PyObject *kind, *value, *traceback;

    PyErr_Fetch(&kind, &value, &traceback);
    PyErr_NormalizeException(&kind, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(kind);
    Py_XDECREF(traceback);
    return value;
}

/* An exception is set: what request i's caller hears of it is the owner's to say. */
static void raised(Server *s, uint32_t i, const struct method *m, int parsing)
{
    static const char text[] = "the provider failed to say why the call failed";
    PyObject *error = caught();
    PyObject *done = PyObject_CallMethod(s->owner, "_raised", "IOOi", i, m->entry, error, parsing);

    Py_XDECREF(error);
    if (!done) {
        PyErr_WriteUnraisable(s->owner);
        mprpc_loop_fail(s->loop, i, INTERNAL, 0, (const uint8_t *)text, sizeof text - 1, NULL, 0);
    }
    Py_XDECREF(done);
}

static void settle(Server *s, uint32_t i, const struct method *m, PyObject *controller, PyObject *response)
{
    PyObject *done = PyObject_CallMethod(s->owner, "_settle", "IOOO", i, m->entry, controller, response);

    if (!done)
        raised(s, i, m, 0);
    Py_XDECREF(done);
}

static void refuse(Server *s, uint32_t i, const struct method *m, Py_ssize_t size)
{
    PyObject *done = PyObject_CallMethod(s->owner, "_refuse", "In", i, size);

    if (!done)
        raised(s, i, m, 0);
    Py_XDECREF(done);
}

/* ---- one request ---- */

static void put(Server *s, uint32_t i, const struct method *m, PyObject *reply)
{
    struct batch *b = &s->batch;
    char *at;
    Py_ssize_t size;

    if (PyBytes_AsStringAndSize(reply, &at, &size) < 0) {
        raised(s, i, m, 0);
    } else if ((size_t)size > s->payload_max) {
        refuse(s, i, m, size);
    } else if ((size_t)size >= s->at_once) {
        Py_BEGIN_ALLOW_THREADS
        mprpc_loop_reply(s->loop, i, (const uint8_t *)at, (size_t)size);
        Py_END_ALLOW_THREADS
    } else if (mprpc_bytes_add(&b->replies, at, (size_t)size)) {
        PyErr_NoMemory();
        raised(s, i, m, 0);
    } else {
        b->sizes[i] = (int32_t)size;
    }
}

/* Request i's handler has returned that, or NULL with an exception set. Takes both references. */
static void returned(Server *s, uint32_t i, const struct method *m, PyObject *controller, PyObject *response)
{
    int failed = response ? controller_failed(s, controller) : -1;

    if (failed < 0) {
        raised(s, i, m, 0);
    } else if (failed || (PyObject *)Py_TYPE(response) != m->kind) {
        settle(s, i, m, controller, response);
    } else {
        PyObject *reply = PyObject_CallFunctionObjArgs(m->serialize, response, NULL);
        if (reply)
            put(s, i, m, reply);
        else
            raised(s, i, m, 0);
        Py_XDECREF(reply);
    }
    s->running = NULL;
    Py_XDECREF(response);
    controller_done(s, controller);
}

static PyObject *parsed(Server *s, uint32_t i, const struct method *m)
{
    const struct mprpc_record *r = &s->records[i];
    const uint8_t *large = s->batch.slow ? mprpc_loop_large(s->loop, i) : NULL;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)(large ? large : s->bytes + r->offset),
                                                (Py_ssize_t)r->size);
    PyObject *request = bytes ? PyObject_CallFunctionObjArgs(m->parse, bytes, NULL) : NULL;

    Py_XDECREF(bytes);
    return request;
}

static void handle(Server *s, uint32_t i)
{
    const struct method *m = &s->methods[s->records[i].method];

    s->batch.sizes[i] = -1;
    if (s->batch.timed && mprpc_loop_expired(s->loop, i))
        return;
    PyObject *request = parsed(s, i, m);
    PyObject *controller = request ? controller_for(s) : NULL;
    if (!controller) {
        raised(s, i, m, request == NULL);
        Py_XDECREF(request);
        return;
    }
    s->running = controller;
    s->index = i;
    mprpc_handling = controller;
    PyObject *response = PyObject_CallFunctionObjArgs(m->handler, request, controller, NULL);
    mprpc_handling = NULL;
    Py_DECREF(request);
    returned(s, i, m, controller, response);
}

/* ---- the turns ---- */

static void begin(Server *s, int64_t told)
{
    struct batch *b = &s->batch;

    b->count = (uint32_t)(told & MPRPC_TURN_COUNT);
    b->next = 0;
    b->slow = (told & MPRPC_TURN_SLOW) != 0;
    b->timed = mprpc_loop_expiry(s->loop) != UINT64_MAX;
    if (b->replies.room > REPLIES_MAX)
        mprpc_bytes_free(&b->replies);
    b->replies.size = 0;
    mprpc_loop_begin(s->loop);
    if (!b->slow)
        return;
    PyObject *done = PyObject_CallMethod(s->owner, "_notice", NULL);
    if (!done)
        PyErr_WriteUnraisable(s->owner);
    Py_XDECREF(done);
}

static PyObject *server_run(PyObject *self, PyObject *nothing)
{
    Server *s = (Server *)self;
    struct batch *b = &s->batch;
    int64_t told;

    (void)nothing;
    if (s->thread) {
        PyErr_SetString(PyExc_RuntimeError, "the loop is turned by another thread already");
        return NULL;
    }
    s->thread = PyThread_get_thread_ident();
    for (;;) {
        Py_BEGIN_ALLOW_THREADS
        told = mprpc_loop_turn(s->loop, b->replies.at, b->replies.size, b->sizes, b->count);
        Py_END_ALLOW_THREADS
        if (told < 0)
            break;
        begin(s, told);
        while (b->next < b->count) {
            uint32_t i = b->next++;
            handle(s, i);
            mprpc_loop_ran(s->loop, i, b->sizes[i] >= 0);
        }
    }
    s->thread = 0;
    Py_RETURN_NONE;
}

static PyObject *server_index_of(PyObject *self, PyObject *controller)
{
    Server *s = (Server *)self;
    int now = s->running == controller && s->thread == PyThread_get_thread_ident();

    return PyLong_FromLong(now ? (long)s->index : -1);
}

/* ---- the type ---- */

static int fill_methods(Server *s)
{
    Py_ssize_t n = PyTuple_Size(s->table);

    s->methods = PyMem_Calloc((size_t)n + 1, sizeof *s->methods);
    if (!s->methods) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        struct method *m = &s->methods[i];
        PyObject *row = PyTuple_GetItem(s->table, i);
        if (!PyTuple_Check(row)) {
            PyErr_SetString(PyExc_TypeError, "a method is a tuple");
            return -1;
        }
        if (!PyArg_ParseTuple(row, "OOOOO", &m->entry, &m->parse, &m->handler, &m->kind, &m->serialize))
            return -1;
    }
    return 0;
}

/* Server(owner, loop, methods, controllers, ok, payload_max). loop: the address of the owner's struct mprpc_loop.
 * methods: (entry, parse, handler, response's class, serialize) for each index of mprpc_services_add. */
static PyObject *server_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *owner, *table, *controllers, *ok;
    unsigned long long loop;
    Py_ssize_t payload_max;

    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Server() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OKO!OOn", &owner, &loop, &PyTuple_Type, &table, &controllers, &ok, &payload_max))
        return NULL;
    Server *s = (Server *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!s)
        return NULL;
    Py_INCREF(s->owner = owner);
    Py_INCREF(s->table = table);
    Py_INCREF(s->controllers = controllers);
    Py_INCREF(s->ok = ok);
    s->loop = (struct mprpc_loop *)(uintptr_t)loop;
    s->records = mprpc_loop_records(s->loop);
    s->bytes = mprpc_loop_bytes(s->loop);
    s->payload_max = (size_t)payload_max;
    s->at_once = AT_ONCE;
    s->status_name = PyUnicode_InternFromString("_status");
    if (s->status_name && fill_methods(s) == 0 && mprpc_bytes_reserve(&s->batch.replies, 1) == 0)
        return (PyObject *)s;
    if (!PyErr_Occurred())
        PyErr_NoMemory();
    Py_DECREF(s);
    return NULL;
}

static int server_traverse(PyObject *self, visitproc visit, void *arg)
{
    Server *s = (Server *)self;

    Py_VISIT(Py_TYPE(self));
    Py_VISIT(s->owner);
    Py_VISIT(s->table);
    Py_VISIT(s->controllers);
    Py_VISIT(s->ok);
    Py_VISIT(s->spare);
    return 0;
}

static int server_clear(PyObject *self)
{
    Server *s = (Server *)self;

    Py_CLEAR(s->owner);
    Py_CLEAR(s->table);
    Py_CLEAR(s->controllers);
    Py_CLEAR(s->ok);
    Py_CLEAR(s->spare);
    return 0;
}

static void server_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Server *s = (Server *)self;

    PyObject_GC_UnTrack(self);
    server_clear(self);
    Py_CLEAR(s->status_name);
    PyMem_Free(s->methods);
    mprpc_bytes_free(&s->batch.replies);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef server_methods[] = {
    {"run", server_run, METH_NOARGS, "Turns the loop on this thread until it has stopped."},
    {"index_of", server_index_of, METH_O, "Which request of the turn this thread runs with that controller, or -1."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot server_slots[] = {
    {Py_tp_new, (void *)server_new},           {Py_tp_methods, server_methods},
    {Py_tp_traverse, (void *)server_traverse}, {Py_tp_clear, (void *)server_clear},
    {Py_tp_dealloc, (void *)server_dealloc},   {0, NULL},
};

static PyType_Spec server_spec = {"mprpc._fast.Server", sizeof(Server), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                                  server_slots};

static int add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    int added = type ? PyModule_AddType(module, (PyTypeObject *)type) : -1;

    Py_XDECREF(type);
    return added;
}

int mprpc_add_serve(PyObject *module)
{
    return add_type(module, &controller_spec) < 0 || add_type(module, &server_spec) < 0 ? -1 : 0;
}
