/* The client's plain call: serialize, send, wait, receive, parse, without a line of Python. Strategy: a Call is the base
 * of `UnaryCall` and does what most calls are, one positional request, perhaps a timeout, a connection that is there, a
 * response. Everything else is handed to that class's methods, which decide. Rules: who is in a call holds the Link, so
 * that its connection is freed under nobody; the call's state is on this thread's stack, so every way out of `attempt`
 * has ended or forgotten it; a call that has begun is counted once, with what it ended with. */
#include "_call.h"
#include "_fast.h"
#include "_link.h"

#include <string.h>
#include <structmember.h>

enum { CANCELLED = 1 };

static const double LONGEST = 1e9; /* seconds; a longer timeout, such as infinity, means this one */

PyTypeObject *mprpc_call_type;
static PyTypeObject *link_type;
static PyObject *name_link, *name_general, *name_connect, *name_failed, *name_error, *name_parsed, *name_status; /* interned */

/* ---- links ---- */

static int link_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Link *k = (Link *)self;
    unsigned long long at;
    PyObject *handle;

    if (!PyArg_ParseTuple(args, "OK", &handle, &at))
        return -1;
    if (kwargs || k->handle || !at) {
        PyErr_SetString(PyExc_TypeError, "Link(handle, address), once");
        return -1;
    }
    Py_INCREF(handle);
    k->handle = handle;
    k->link = (struct mprpc_link *)(uintptr_t)at;
    return 0;
}

static void link_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    Py_XDECREF(((Link *)self)->handle);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMemberDef link_members[] = {
    {"handle", T_OBJECT, offsetof(Link, handle), READONLY, "The struct mprpc_link, as cffi has it."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot link_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)"Link(handle, address): a connection that C calls through."},
    {Py_tp_init, (void *)link_init},
    {Py_tp_dealloc, (void *)link_dealloc},
    {Py_tp_members, link_members},
    {0, NULL},
};
static PyType_Spec link_spec = {"mprpc._fast.Link", sizeof(Link), 0, Py_TPFLAGS_DEFAULT, link_slots};

int mprpc_is_link(PyObject *object)
{
    return Py_TYPE(object) == link_type && ((Link *)object)->link;
}

/* ---- one attempt ---- */

/* 0 when the call has ended, -1 with what a signal's handler raised. */
static int wait_on(struct mprpc_link *k, struct mprpc_call *c, int64_t *outcome)
{
    while (*outcome == MPRPC_CALL_INTERRUPTED) {
        if (PyErr_CheckSignals() < 0) {
            mprpc_link_forget(k, c);
            return -1;
        }
        Py_BEGIN_ALLOW_THREADS
        *outcome = mprpc_link_wait(k, c);
        Py_END_ALLOW_THREADS
    }
    return 0;
}

/* The response. Takes the bytes. */
static PyObject *parsed(Call *self, PyObject *bytes)
{
    PyObject *response = bytes ? PyObject_CallFunctionObjArgs(self->parse, bytes, NULL) : NULL;

    if (!response && bytes) { /* it is Python's to say what is wrong with it */
        PyErr_Clear();
        response = PyObject_CallMethodObjArgs((PyObject *)self, name_parsed, bytes, NULL);
    }
    Py_XDECREF(bytes);
    return response;
}

static PyObject *error_of(Call *self, PyObject *endpoint, Link *link, struct mprpc_call *c, int64_t outcome)
{
    PyObject *at = PyLong_FromVoidPtr(c), *how = PyLong_FromLongLong(outcome), *error = NULL;

    if (at && how)
        error = PyObject_CallMethodObjArgs((PyObject *)self, name_error, endpoint, (PyObject *)link, at, how, NULL);
    Py_XDECREF(at);
    Py_XDECREF(how);
    return error;
}

struct given { /* what one attempt is made with */
    PyObject *endpoint;
    Link *link;
    PyObject *payload; /* NULL when it has been answered: a large one need not be there beside its response */
    uint64_t timeout;
    uint32_t number;
    const struct mprpc_flag *cancelled;
};

/* The response; else NULL, with what the call failed with in *error, or NULL there and an exception set. */
static PyObject *attempt(Call *self, struct given *g, PyObject **error, uint64_t *deadline)
{
    uint8_t room[MPRPC_CALL_SMALL];
    struct mprpc_call c;
    struct mprpc_link *k = g->link->link;
    const uint8_t *payload = (const uint8_t *)PyBytes_AsString(g->payload);
    const uint8_t *names = (const uint8_t *)PyBytes_AsString(self->names);
    size_t size = (size_t)PyBytes_Size(g->payload), names_size = (size_t)PyBytes_Size(self->names);
    PyObject *response = NULL;
    int64_t outcome;

    memset(&c, 0, sizeof c);
    c.small = room;
    *error = NULL;
    Py_BEGIN_ALLOW_THREADS
    outcome = mprpc_link_call(k, &c, names, names_size, payload, size, g->timeout, g->number, g->cancelled);
    Py_END_ALLOW_THREADS
    if (wait_on(k, &c, &outcome) < 0)
        return NULL;
    *deadline = c.deadline;
    if (outcome >= 0)
        Py_CLEAR(g->payload);
    if (outcome >= 0)
        response = PyBytes_FromStringAndSize((const char *)(c.large ? c.large : room), (Py_ssize_t)outcome);
    else
        *error = error_of(self, g->endpoint, g->link, &c, outcome);
    mprpc_call_clear(&c);
    return outcome >= 0 ? parsed(self, response) : NULL;
}

/* ---- what is counted ---- */

uint64_t mprpc_call_begun(Call *self)
{
    mprpc_tally_begin_shared(self->tally);
    return mprpc_clock();
}

/* What the exception that is set stands for: an RpcError's status; what else ended a call has cancelled it. */
static long status_raised(void)
{
    PyObject *kind, *value, *traceback, *status;
    long number = CANCELLED;

    PyErr_Fetch(&kind, &value, &traceback);
    status = value ? PyObject_GetAttr(value, name_status) : NULL;
    if (status && PyLong_Check(status))
        number = PyLong_AsLong(status);
    Py_XDECREF(status);
    PyErr_Clear();
    PyErr_Restore(kind, value, traceback);
    return number;
}

static PyObject *ended(Call *self, uint64_t began, PyObject *response)
{
    long status = response ? 0 : status_raised();

    mprpc_tally_end_shared(self->tally, status, mprpc_clock() - began);
    return response;
}

/* _begun(): a call of Python's has begun; when, for _ended(when, status). */
static PyObject *call_begun(PyObject *self, PyObject *nothing)
{
    (void)nothing;
    return PyLong_FromUnsignedLongLong(((Call *)self)->tally ? mprpc_call_begun((Call *)self) : 0);
}

static PyObject *call_ended(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    uint64_t began = count == 2 ? PyLong_AsUnsignedLongLong(args[0]) : 0;
    long status = count == 2 ? PyLong_AsLong(args[1]) : 0;

    if (PyErr_Occurred())
        return NULL;
    if (began)
        mprpc_tally_end_shared(((Call *)self)->tally, status, mprpc_clock() - began);
    Py_RETURN_NONE;
}

/* ---- a call ---- */

/* 1: the arguments are those of a plain call; 0: of another one, or wrong. */
static int plain_arguments(PyObject *args, PyObject *kwargs, PyObject **request, PyObject **timeout)
{
    Py_ssize_t count = PyTuple_Size(args), named = kwargs ? PyDict_Size(kwargs) : 0;

    *timeout = NULL;
    if (count < 1 || count + named > 2)
        return 0;
    *request = PyTuple_GetItem(args, 0);
    if (named)
        *timeout = PyDict_GetItemString(kwargs, "timeout");
    else if (count == 2)
        *timeout = PyTuple_GetItem(args, 1);
    return *timeout || count + named == 1;
}

/* 1: ns is how long the call may take; 0: it is for Python to say. */
int mprpc_call_plain_timeout(const Call *self, PyObject *timeout, uint64_t *ns)
{
    *ns = self->timeout;
    if (!timeout || timeout == Py_None)
        return 1;
    if (!PyFloat_CheckExact(timeout) && !PyLong_CheckExact(timeout))
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred()) {
        PyErr_Clear(); /* a whole number beyond any float */
        return 0;
    }
    if (!(seconds <= LONGEST))
        return 0; /* infinity, or no number at all */
    *ns = seconds > 0.0 ? (uint64_t)(seconds * 1e9) : 0;
    return 1;
}

static PyObject *general(Call *self, PyObject *args, PyObject *kwargs)
{
    PyObject *method = PyObject_GetAttr((PyObject *)self, name_general);
    PyObject *response = method ? PyObject_Call(method, args, kwargs) : NULL;

    Py_XDECREF(method);
    return response;
}

/* The connection of whose turn it is; NULL, with nothing set, where Python has to find one. */
Link *mprpc_call_connected(Call *self, PyObject **endpoint)
{
    PyObject *link = NULL;

    *endpoint = self->next ? PyObject_CallFunctionObjArgs(self->next, NULL) : self->endpoint;
    if (!self->next)
        Py_XINCREF(*endpoint);
    if (*endpoint && *endpoint != Py_None)
        link = PyObject_GetAttr(*endpoint, name_link);
    if (link && mprpc_is_link(link))
        return (Link *)link;
    Py_XDECREF(link);
    PyErr_Clear();
    return NULL;
}

/* Whose turn it was is told, so that the next one is not called in its place. */
static PyObject *unconnected(Call *self, PyObject *request, PyObject *timeout, PyObject *endpoint)
{
    return PyObject_CallMethodObjArgs((PyObject *)self, name_connect, request, timeout ? timeout : Py_None,
                                      endpoint ? endpoint : Py_None, NULL);
}

/* Tried once, on a connection that was there: Python decides what becomes of the call. */
static PyObject *failed(Call *self, const struct given *g, PyObject *error, uint64_t deadline)
{
    PyObject *until = PyLong_FromUnsignedLongLong(deadline), *response = NULL;

    if (until)
        response = PyObject_CallMethodObjArgs((PyObject *)self, name_failed, error, g->endpoint, g->payload, until,
                                              NULL);
    Py_XDECREF(until);
    return response;
}

static PyObject *call_plainly(Call *self, struct given *g)
{
    PyObject *error;
    uint64_t deadline;
    PyObject *response = attempt(self, g, &error, &deadline);

    if (error) {
        response = failed(self, g, error, deadline);
        Py_DECREF(error);
    }
    return response;
}

static PyObject *call(PyObject *object, PyObject *args, PyObject *kwargs)
{
    Call *self = (Call *)object;
    struct given g = {0};
    PyObject *request, *timeout, *response = NULL;
    uint64_t began;

    if (!self->plain || mprpc_inherits() || !plain_arguments(args, kwargs, &request, &timeout) ||
        (PyObject *)Py_TYPE(request) != self->kind || !mprpc_call_plain_timeout(self, timeout, &g.timeout))
        return general(self, args, kwargs);
    self->calls++;
    g.link = mprpc_call_connected(self, &g.endpoint);
    if (g.link)
        g.payload = PyObject_CallFunctionObjArgs(self->serialize, request, NULL);
    if (!g.link) {
        began = mprpc_call_begun(self);
        response = ended(self, began, unconnected(self, request, timeout, g.endpoint));
    } else if (g.payload && PyBytes_Size(g.payload) <= self->payload_max) {
        began = mprpc_call_begun(self);
        response = ended(self, began, call_plainly(self, &g));
    } else { /* Python serializes it again, to say what is wrong with it */
        PyErr_Clear();
        response = general(self, args, kwargs);
    }
    Py_XDECREF(g.payload);
    Py_XDECREF(g.link);
    Py_XDECREF(g.endpoint);
    return response;
}

/* _send(endpoint, link, payload, timeout, attempt, flag's address): for Python, which has decided where. */
static PyObject *call_send(PyObject *object, PyObject *args)
{
    unsigned long long timeout, flag;
    unsigned long number;
    uint64_t deadline;
    struct given g = {0};
    PyObject *link, *error;

    if (!PyArg_ParseTuple(args, "OO!SKkK", &g.endpoint, link_type, &link, &g.payload, &timeout, &number, &flag))
        return NULL;
    g.link = (Link *)link;
    if (!((Call *)object)->names || !g.link->link) {
        PyErr_SetString(PyExc_TypeError, "_send() of a call or a link that was not initialised");
        return NULL;
    }
    g.timeout = timeout;
    g.number = (uint32_t)number;
    g.cancelled = (const struct mprpc_flag *)(uintptr_t)flag;
    Py_INCREF(g.payload);
    PyObject *response = attempt((Call *)object, &g, &error, &deadline);
    Py_XDECREF(g.payload);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return response;
}

/* ---- the type ---- */

static int call_traverse(PyObject *self, visitproc visit, void *arg)
{
    Call *c = (Call *)self;

    Py_VISIT(Py_TYPE(self));
    Py_VISIT(c->kind);
    Py_VISIT(c->serialize);
    Py_VISIT(c->parse);
    Py_VISIT(c->next);
    Py_VISIT(c->endpoint);
    Py_VISIT(c->counts);
    return 0;
}

static int call_clear(PyObject *self)
{
    Call *c = (Call *)self;

    c->plain = 0;
    Py_CLEAR(c->kind);
    Py_CLEAR(c->serialize);
    Py_CLEAR(c->parse);
    Py_CLEAR(c->names);
    Py_CLEAR(c->next);
    Py_CLEAR(c->endpoint);
    c->tally = NULL;
    Py_CLEAR(c->counts);
    return 0;
}

static void call_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_GC_UnTrack(self);
    call_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static int call_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Call *c = (Call *)self;
    PyObject *request_class, *response_class, *names, *next, *endpoint, *counts;
    unsigned long long timeout, tally;
    Py_ssize_t payload_max, pending_max;

    call_clear(self);
    if (!PyArg_ParseTuple(args, "OOSKnnOKOO", &request_class, &response_class, &names, &timeout, &payload_max,
                          &pending_max, &counts, &tally, &next, &endpoint))
        return -1;
    if (kwargs || !tally) {
        PyErr_SetString(PyExc_TypeError, "Call() takes no keywords, and a tally");
        return -1;
    }
    Py_INCREF(counts);
    c->counts = counts;
    c->tally = (struct mprpc_tally *)(uintptr_t)tally;
    Py_INCREF(request_class);
    c->kind = request_class;
    Py_INCREF(names);
    c->names = names;
    Py_INCREF(endpoint);
    c->endpoint = endpoint;
    if (next != Py_None) {
        Py_INCREF(next);
        c->next = next;
    }
    c->timeout = timeout;
    c->payload_max = payload_max;
    c->pending_max = pending_max;
    c->serialize = PyObject_GetAttrString(request_class, "SerializeToString");
    c->parse = PyObject_GetAttrString(response_class, "FromString");
    c->plain = c->serialize && c->parse;
    return c->plain ? 0 : -1;
}

static PyMethodDef call_methods[] = {
    {"_send", call_send, METH_VARARGS, NULL},
    {"_begun", call_begun, METH_NOARGS, NULL},
    {"_ended", (PyCFunction)(void (*)(void))call_ended, METH_FASTCALL, NULL},
    {"future", (PyCFunction)(void (*)(void))mprpc_call_future, METH_FASTCALL | METH_KEYWORDS,
     "Starts the call and returns its future at once. Any thread.\n\n"
     "It is a `concurrent.futures.Future`; `cancel()` tells the provider. Raises ResourceExhausted when the key\n"
     "`max_pending` such calls of this process are in flight and none ends within this call's deadline."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef call_members[] = {
    {"_calls", T_ULONGLONG, offsetof(Call, calls), 0, NULL},
    {"_plain", T_BOOL, offsetof(Call, plain), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot call_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)"The base of UnaryCall: what a plain call is."},
    {Py_tp_init, (void *)call_init},
    {Py_tp_call, (void *)call},
    {Py_tp_dealloc, (void *)call_dealloc},
    {Py_tp_traverse, (void *)call_traverse},
    {Py_tp_clear, (void *)call_clear},
    {Py_tp_methods, call_methods},
    {Py_tp_members, call_members},
    {0, NULL},
};
static PyType_Spec call_spec = {"mprpc._fast.Call", sizeof(Call), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, call_slots};

static int intern(PyObject **to, const char *name)
{
    return *to || (*to = PyUnicode_InternFromString(name)) ? 0 : -1;
}

int mprpc_add_type(PyObject *module, PyType_Spec *spec, const char *name, PyTypeObject **keep)
{
    PyObject *type = PyType_FromSpec(spec);

    if (keep && !*keep) {
        Py_XINCREF(type);
        *keep = (PyTypeObject *)type;
    }
    if (type && PyModule_AddObject(module, name, type) == 0)
        return 0;
    Py_XDECREF(type);
    return -1;
}

int mprpc_add_call(PyObject *module)
{
    if (intern(&name_link, "link") < 0 || intern(&name_general, "_general") < 0 ||
        intern(&name_connect, "_connect_and_call") < 0 || intern(&name_failed, "_failed") < 0 ||
        intern(&name_error, "_error") < 0 ||
        intern(&name_parsed, "_parsed") < 0 || intern(&name_status, "status") < 0)
        return -1;
    if (mprpc_add_type(module, &link_spec, "Link", &link_type) < 0)
        return -1;
    return mprpc_add_type(module, &call_spec, "Call", &mprpc_call_type);
}
