/* The provider's plain turn: receive, parse, handle, serialize, send. Strategy: one Server turns one loop; the
 * interpreter's lock is let go once a turn, and between the loop and the user's handler runs no line of Python. Whatever
 * is not a plain response (an exception, a Future, a failed controller, news of peers) goes to a method of the owner, the
 * `_Loop` of provider.py, which decides. Rules: each request of a batch is answered or given to the owner exactly once;
 * no exception leaves a request; what one turn knows lies in its batch, so that another thread may go on with it.
 *
 * While a handler runs the loop, the batch and the Server belong to nobody: the crew may give them to another thread
 * (`_crew.c`). The thread that comes back touches them only if it still leads; else the response in its hands is all it
 * has, and the owner's `_relieved` sends it. A method that is known to take long goes to the owner's `_queue` instead. */
#define _GNU_SOURCE 1 /* as Python.h does */
#include "_crew.h"
#include "_fast.h"
#include "_fork.h"
#include "_loop.h"

#include <stdatomic.h>
#include <stddef.h>
#include <structmember.h>
#include <time.h>

enum {
    AT_ONCE = 65536,       /* bytes of a reply from which it is sent by itself, not with its turn */
    REPLIES_MAX = 1 << 20, /* bytes that the replies' buffer keeps for the next turn */
    CONTENDED = 100000,    /* ns for the interpreter's lock, from which another thread computes */
    LINGER = 50000,        /* ns that the next request may take to come while the lock is kept */
};

enum { INTERNAL = 13 };

struct method { /* borrowed from the table */
    PyObject *entry, *parse, *handler, *kind, *serialize;
    int blocking; /* declared to take long */
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
    PyObject *running; /* the controller of the handler that runs */
    struct method *methods;
    struct mprpc_pace *paces; /* of each; the owner keeps them alive */
    size_t payload_max, at_once;
    int contended;        /* a thread that leads no loop computes */
    struct mprpc_stint stint; /* what it tells `placement`, which is NULL for the only loop */
    struct mprpc_placement *placement;
    uint64_t since, keep; /* when the interpreter's lock was got, and ns to keep it from such a thread */
    uint32_t index; /* of the request whose handler runs */
    struct batch batch;
} Server;

/* The base of a provider's controllers: C sees by it whether a handler left something in one. */
typedef struct {
    PyObject_HEAD
    PyObject *attributes, *weak;
} Controller;

/* What this thread runs a handler for, as a leader. */
static _Thread_local struct {
    Server *server;
    struct mprpc_member *member;
    PyObject *controller;
    uint32_t index;
} leading;

static _Atomic int wanting; /* threads that lead a loop, but for those that have given up the interpreter's lock */

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

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
    if (!c && (c = PyObject_CallObject(s->controllers, NULL)))
        controller_clear(c); /* some interpreters give a new object a dictionary at once */
    return c;
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

/* 1: it is large. */
static int put(Server *s, uint32_t i, const struct method *m, PyObject *reply)
{
    struct batch *b = &s->batch;
    char *at;
    Py_ssize_t size;

    if (PyBytes_AsStringAndSize(reply, &at, &size) < 0) {
        raised(s, i, m, 0);
        return 0;
    }
    s->stint.bytes += (size_t)size;
    if ((size_t)size > s->payload_max) {
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
    return (size_t)size >= s->at_once;
}

/* Request i's handler has returned that, or NULL with an exception set. Takes both references. 1: the reply is large. */
static int returned(Server *s, uint32_t i, const struct method *m, PyObject *controller, PyObject *response)
{
    int failed = response ? controller_failed(s, controller) : -1, large = 0;

    if (failed < 0) {
        raised(s, i, m, 0);
    } else if (failed || (PyObject *)Py_TYPE(response) != m->kind) {
        settle(s, i, m, controller, response);
    } else {
        PyObject *reply = PyObject_CallFunctionObjArgs(m->serialize, response, NULL);
        Py_DECREF(response);
        response = NULL; /* not beside its bytes, while they are sent */
        if (reply)
            large = put(s, i, m, reply);
        else
            raised(s, i, m, 0);
        Py_XDECREF(reply);
    }
    Py_XDECREF(response);
    controller_done(s, controller);
    return large;
}

/* Once for each request: a large one's buffer goes before anything is made of its copy. */
static PyObject *arguments(Server *s, uint32_t i)
{
    const struct mprpc_record *r = &s->records[i];
    const uint8_t *large = s->batch.slow ? mprpc_loop_large(s->loop, i) : NULL;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)(large ? large : s->bytes + r->offset),
                                                (Py_ssize_t)r->size);

    if (large)
        mprpc_loop_copied(s->loop, i);
    return bytes;
}

static PyObject *parsed(Server *s, uint32_t i, const struct method *m)
{
    PyObject *bytes = arguments(s, i);
    PyObject *request = bytes ? PyObject_CallFunctionObjArgs(m->parse, bytes, NULL) : NULL;

    Py_XDECREF(bytes);
    return request;
}

/* ---- what takes long ---- */

static void queue(Server *s, uint32_t i, const struct method *m)
{
    PyObject *bytes = arguments(s, i);
    PyObject *done = bytes ? PyObject_CallMethod(s->owner, "_queue", "IIOO", i, s->records[i].method, m->entry, bytes)
                           : NULL;

    if (!done)
        raised(s, i, m, 0);
    Py_XDECREF(done);
    Py_XDECREF(bytes);
}

/* Another thread leads now. Takes both references, the response's or an exception that is set. */
static void relieved(Server *s, const struct method *m, PyObject *controller, PyObject *response)
{
    PyObject *error = response ? NULL : caught();
    PyObject *done = PyObject_CallMethod(s->owner, "_relieved", "OOOO", m->entry, controller,
                                         response ? response : Py_None, error ? error : Py_None);

    if (!done)
        PyErr_WriteUnraisable(s->owner);
    Py_XDECREF(done);
    Py_XDECREF(error);
    Py_XDECREF(response);
    Py_DECREF(controller);
}

/* This thread leads now: what the one before it runs is answered by that one, and what it has answered is sent. */
static void take_over(Server *s)
{
    struct batch *b = &s->batch;
    PyObject *controller = s->running, *done;

    s->running = NULL;
    mprpc_pace_add(&s->paces[s->records[s->index].method], MPRPC_PACE_SURE);
    done = PyObject_CallMethod(s->owner, "_take_over", "IOO", s->index,
                               s->methods[s->records[s->index].method].entry, controller);
    if (!done)
        PyErr_WriteUnraisable(s->owner);
    Py_XDECREF(done);
    Py_DECREF(controller);
    Py_BEGIN_ALLOW_THREADS
    mprpc_loop_flush(s->loop, b->replies.at, b->sizes, b->next);
    Py_END_ALLOW_THREADS
    mprpc_loop_begin(s->loop);
    b->replies.size = 0;
    for (uint32_t i = 0; i < b->next; i++)
        b->sizes[i] = -1;
}

/* ---- the handler ---- */

enum end { RELIEVED, RAN, RAN_LARGE, NOT_RUN };

/* Runs it: 1, this thread leads as before; 0, it was relieved. *response: NULL with an exception set. */
static int lead_handler(Server *s, uint32_t i, struct mprpc_member *member, PyObject *request, PyObject *controller,
                        PyObject **response)
{
    PyObject *outer = mprpc_handling, *handler = s->methods[s->records[i].method].handler;

    Py_INCREF(controller);
    s->running = controller;
    s->index = i;
    leading.server = s;
    leading.member = member;
    leading.controller = mprpc_handling = controller;
    leading.index = i;
    mprpc_leader_begins(member);
    *response = PyObject_CallFunctionObjArgs(handler, request, controller, NULL);
    int leads = mprpc_leader_ends(member);
    leading.controller = NULL;
    mprpc_handling = outer;
    if (leads) {
        s->running = NULL;
        Py_DECREF(controller);
    }
    return leads;
}

/* Where it takes long to parse or to serialize, that is not the handler's doing, and no thread would make it faster. */
static enum end handle(Server *s, uint32_t i, struct mprpc_member *member)
{
    const struct mprpc_record *r = &s->records[i];
    const struct method *m = &s->methods[r->method];
    PyObject *response;

    s->batch.sizes[i] = -1;
    if (s->batch.timed && mprpc_loop_expired(s->loop, i))
        return NOT_RUN;
    if (m->blocking || mprpc_pace_slow(&s->paces[r->method])) {
        queue(s, i, m);
        return NOT_RUN;
    }
    PyObject *request = parsed(s, i, m);
    PyObject *controller = request ? controller_for(s) : NULL;
    if (!controller) {
        raised(s, i, m, request == NULL);
        Py_XDECREF(request);
        return NOT_RUN;
    }
    int large = r->size >= AT_ONCE, leads = lead_handler(s, i, member, request, controller, &response);
    Py_DECREF(request);
    if (leads)
        large |= returned(s, i, m, controller, response);
    else
        relieved(s, m, controller, response);
    return leads ? large ? RAN_LARGE : RAN : RELIEVED;
}

/* ---- the turns ---- */

static void begin(Server *s, int64_t told)
{
    struct batch *b = &s->batch;

    b->count = (uint32_t)(told & MPRPC_TURN_COUNT);
    b->next = 0;
    b->slow = (told & MPRPC_TURN_SLOW) != 0;
    s->stint.requests += b->count;
    b->timed = mprpc_loop_expiry(s->loop) != UINT64_MAX;
    if (b->replies.room > REPLIES_MAX)
        mprpc_bytes_free(&b->replies);
    b->replies.size = 0;
    if (!b->slow)
        return;
    PyObject *done = PyObject_CallMethod(s->owner, "_notice", NULL);
    if (!done)
        PyErr_WriteUnraisable(s->owner);
    Py_XDECREF(done);
}

/* Sends the last turn's replies and takes the next one's requests. Whoever lets go of the interpreter's lock beside a
 * thread that computes waits a switch interval for it: so the lock is kept while requests keep coming, for about as long
 * as that thread has kept it. It is kept from no other loop. */
static int64_t turn(Server *s)
{
    struct batch *b = &s->batch;
    int64_t told = 0;
    int alone;

    if (s->contended && atomic_load(&wanting) == 1 && mprpc_loop_time(s->loop) - s->since < s->keep) {
        told = mprpc_loop_turn_within(s->loop, b->replies.at, b->replies.size, b->sizes, b->count, LINGER);
        b->count = 0;
        mprpc_loop_begin(s->loop);
    }
    if (told)
        return told;
    s->stint.held += mprpc_loop_time(s->loop) - s->since;
    atomic_fetch_sub(&wanting, 1);
    Py_BEGIN_ALLOW_THREADS
    told = mprpc_loop_turn(s->loop, b->replies.at, b->replies.size, b->sizes, b->count);
    alone = atomic_fetch_add(&wanting, 1) == 0;
    Py_END_ALLOW_THREADS
    uint64_t waited = mprpc_loop_begin(s->loop);
    s->contended = waited > CONTENDED && alone;
    s->since = mprpc_loop_time(s->loop);
    s->stint.waited += waited;
    if (s->placement)
        mprpc_placement_tell(s->placement, &s->stint, s->since);
    return told;
}

/* Turns the loop until it has stopped, 1, or another thread leads it, 0. */
static int lead(Server *s, struct mprpc_member *member)
{
    struct batch *b = &s->batch;
    unsigned forks = mprpc_forks;

    s->placement = mprpc_loop_placement(s->loop);
    s->stint.processor = 0; /* another thread's */
    if (s->running)
        take_over(s);
    for (;;) {
        while (b->next < b->count) {
            uint32_t i = b->next++;
            enum end end = handle(s, i, member);
            if (forks != mprpc_forks) {
                atomic_store(&wanting, 1);
                return 1; /* the handler has forked, and this is the child, which serves nobody */
            }
            if (end == RELIEVED)
                return 0;
            uint64_t took = mprpc_loop_ran(s->loop, i, b->sizes[i] >= 0);
            s->stint.long_runs += took >= MPRPC_STINT_LONG;
            s->stint.bytes += s->records[i].size;
            if (end == RAN)
                mprpc_pace_add(&s->paces[s->records[i].method],
                               took < MPRPC_PACE_SLOW ? MPRPC_PACE_FAST : MPRPC_PACE_LONG);
        }
        mprpc_leader_rests(member);
        int64_t told = turn(s);
        if (told < 0)
            return 1;
        begin(s, told);
    }
}

static PyObject *server_lead(PyObject *self, PyObject *address)
{
    struct mprpc_member *member = PyLong_AsVoidPtr(address);

    if (!member)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no member of a crew");
    atomic_fetch_add(&wanting, 1);
    int stopped = lead((Server *)self, member);
    atomic_fetch_sub(&wanting, 1);
    return PyBool_FromLong(stopped);
}

static PyObject *server_run_job(PyObject *self, PyObject *args)
{
    Server *s = (Server *)self;
    PyObject *outer = mprpc_handling, *request, *controller;
    unsigned method;

    if (!PyArg_ParseTuple(args, "IOO", &method, &request, &controller))
        return NULL;
    if ((Py_ssize_t)method >= PyTuple_Size(s->table))
        return PyErr_Format(PyExc_IndexError, "no method has that index");
    mprpc_handling = controller;
    uint64_t began = clock_ns();
    PyObject *response = PyObject_CallFunctionObjArgs(s->methods[method].handler, request, controller, NULL);
    mprpc_pace_add(&s->paces[method], clock_ns() - began < MPRPC_PACE_SLOW ? MPRPC_PACE_FAST : MPRPC_PACE_SURE);
    mprpc_handling = outer;
    return response;
}

/* ---- what a handler asks through its controller ---- */

/* Takes the loop back for a moment: 1, or 0 and what Python is told. */
static int take_back(PyObject *controller, PyObject **answer)
{
    *answer = Py_None;
    if (leading.controller != controller)
        return 0;
    *answer = Py_False;
    return mprpc_leader_ends(leading.member);
}

static PyObject *answer_instead(PyObject *answer)
{
    Py_INCREF(answer);
    return answer;
}

static PyObject *server_peer(PyObject *self, PyObject *controller)
{
    char name[MPRPC_PEER_MAX];
    PyObject *answer;

    (void)self;
    if (!take_back(controller, &answer))
        return answer_instead(answer);
    mprpc_loop_peer(leading.server->loop, leading.index, name);
    mprpc_leader_goes_on(leading.member);
    return PyUnicode_FromString(name);
}

static PyObject *server_deadline(PyObject *self, PyObject *controller)
{
    PyObject *answer;

    (void)self;
    if (!take_back(controller, &answer))
        return answer_instead(answer);
    uint64_t deadline = mprpc_loop_deadline(leading.server->loop, leading.index);
    mprpc_leader_goes_on(leading.member);
    return PyLong_FromUnsignedLongLong(deadline);
}

static PyObject *server_attempt(PyObject *self, PyObject *controller)
{
    PyObject *answer;

    (void)self;
    if (!take_back(controller, &answer))
        return answer_instead(answer);
    uint32_t attempt = mprpc_loop_attempt(leading.server->loop, leading.index);
    mprpc_leader_goes_on(leading.member);
    return PyLong_FromUnsignedLong(attempt);
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
        if (!PyArg_ParseTuple(row, "OOOOOp", &m->entry, &m->parse, &m->handler, &m->kind, &m->serialize,
                              &m->blocking))
            return -1;
    }
    return 0;
}

/* Server(owner, loop, paces, methods, controllers, ok, payload_max, keep). loop, paces: the addresses of the owner's struct
 * mprpc_loop and of as many struct mprpc_pace as there are methods, which all loops share. methods: (entry, parse,
 * handler, response's class, serialize, blocking) for each index of mprpc_services_add. */
static PyObject *server_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *owner, *table, *controllers, *ok;
    unsigned long long loop, paces, keep;
    Py_ssize_t payload_max;

    if (keywords && PyDict_Size(keywords)) {
        PyErr_SetString(PyExc_TypeError, "Server() takes no keyword arguments");
        return NULL;
    }
    if (!PyArg_ParseTuple(args, "OKKO!OOnK", &owner, &loop, &paces, &PyTuple_Type, &table, &controllers, &ok,
                          &payload_max, &keep))
        return NULL;
    Server *s = (Server *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!s)
        return NULL;
    Py_INCREF(s->owner = owner);
    Py_INCREF(s->table = table);
    Py_INCREF(s->controllers = controllers);
    Py_INCREF(s->ok = ok);
    s->loop = (struct mprpc_loop *)(uintptr_t)loop;
    s->paces = (struct mprpc_pace *)(uintptr_t)paces;
    s->records = mprpc_loop_records(s->loop);
    s->bytes = mprpc_loop_bytes(s->loop);
    s->payload_max = (size_t)payload_max;
    s->at_once = AT_ONCE;
    s->keep = keep;
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
    Py_VISIT(s->running);
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
    Py_CLEAR(s->running);
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
    {"lead", server_lead, METH_O,
     "Turns the loop on this thread, a member of the crew by its address: True when the loop has stopped, False when\n"
     "another thread leads it."},
    {"run_job", server_run_job, METH_VARARGS, "Calls the method's handler on a thread that leads no loop."},
    {"peer", server_peer, METH_O,
     "Who called, if this thread runs its handler and leads: else None, or False for one that leads no more."},
    {"deadline", server_deadline, METH_O, "The same for its deadline, monotonic ns, 0 for none."},
    {"attempt", server_attempt, METH_O, "The same for which attempt it is."},
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
