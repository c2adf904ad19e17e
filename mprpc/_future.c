/* The plain future: from `.future()` to the frame, and from the response's bytes to the result, without a line of Python.
 * Strategy: a request in flight is a mail to come whose token is the future itself; the reader's thread waits for mail
 * without the interpreter's lock and ends all futures of one batch under one lock. Whatever is not plain, an error, a
 * controller, a hedge, a call that has to wait, goes to methods of futures.py, which decide. Rules: who expects a mail
 * holds a reference to its future, dropped once: when the mail is taken, or when there will be none; nothing here waits
 * for a connection with the interpreter's lock held, nor runs a user's code with the futures' lock held. */
#include "_call.h"
#include "_fast.h"
#include "_fork.h"
#include "_link.h"

#include <string.h>
#include <structmember.h>

enum {
    SMALL = 4096, /* bytes of a request that is not counted: futures.py's _SMALL */
    BATCH = 256,  /* futures ended at a time; between batches other threads may run */
};

typedef struct Pending {
    PyObject_HEAD
    PyObject *call, *controller, *outer, *endpoint;
    PyObject *state, *result, *exception, *waiters, *callbacks;
    PyObject *payload; /* bytes, as long as it may be sent again */
    Link *link;        /* while posted */
    struct Pending *before, *after; /* those that are posted */
    uint64_t deadline, counted, began;
    Py_ssize_t weight;
    int64_t id;     /* the call's on its link, 0: not known yet */
    uint32_t round; /* counts its requests */
    char posted;    /* a mail will end it */
    char old;       /* the link was there before */
} Pending;

typedef struct {
    PyObject_HEAD
    PyObject *kind;  /* the class of plain futures */
    PyObject *mutex; /* of their states */
    PyObject *queued, *paused, *thread; /* dicts of those that are not posted; or None */
    struct mprpc_mailbox *box;
    unsigned born; /* mprpc_forks then */
} Reader;

static PyTypeObject *pending_type;
static PyObject *word_pending, *word_finished; /* concurrent.futures' states */
static PyObject *name_acquire, *name_release, *name_add_result, *name_run_callbacks, *name_end, *name_future, *name_outcome,
    *name_start_thread, *name_begin, *name_queue, *name_refused, *name_failed, *name_misread;

/* Under the interpreter's lock: */
static Reader *current; /* this process's, or its parent's */
static Pending *first;  /* posted */
static Py_ssize_t flying;

/* ---- what is in flight ---- */

static void enlist(Pending *f)
{
    f->posted = 1;
    f->before = NULL;
    f->after = first;
    if (first)
        first->before = f;
    first = f;
    flying++;
}

/* Nobody expects its mail any more; 0 if nobody did. The link is the caller's, unless NULL. */
static int unlist(Pending *f, Link **link)
{
    if (!f->posted)
        return 0;
    *(f->before ? &f->before->after : &first) = f->after;
    if (f->after)
        f->after->before = f->before;
    f->posted = 0;
    flying--;
    *link = f->link;
    f->link = NULL;
    return 1;
}

/* CANCEL to the provider. The mail's reference goes if there will be no mail. */
static void call_off(Pending *f, Link *link, int64_t id)
{
    int none;

    Py_BEGIN_ALLOW_THREADS
    none = mprpc_link_cancel(link->link, (uint64_t)id);
    Py_END_ALLOW_THREADS
    if (none)
        Py_DECREF(f);
}

static void attach(Link *link)
{
    struct mprpc_mailbox *box = current->box;

    Py_BEGIN_ALLOW_THREADS
    mprpc_link_attach(link->link, box, 0);
    Py_END_ALLOW_THREADS
    link->mailed = 1;
}

/* The interpreter's lock goes only where that call would wait, or write. */
static int64_t send_off(const Pending *f, struct mprpc_link *k, uint64_t timeout, uint32_t attempt)
{
    PyObject *names = ((Call *)f->call)->names, *payload = f->payload;
    struct mprpc_letter l = {(uint64_t)(uintptr_t)f, (const uint8_t *)PyBytes_AsString(names), (size_t)PyBytes_Size(names),
                             (const uint8_t *)PyBytes_AsString(payload), (size_t)PyBytes_Size(payload), timeout, attempt};
    int due = 0;
    int64_t id = MPRPC_CALL_BUSY;

    if (l.size <= SMALL)
        id = mprpc_link_post(k, &l, 0, &due);
    if (id != MPRPC_CALL_BUSY && !due)
        return id;
    Py_INCREF(payload); /* the future may end meanwhile */
    Py_BEGIN_ALLOW_THREADS
    if (id != MPRPC_CALL_BUSY)
        mprpc_link_push(k);
    else
        id = mprpc_link_submit(k, l.token, l.names, l.names_size, l.payload, l.size, timeout, attempt, 1, NULL);
    Py_END_ALLOW_THREADS
    Py_DECREF(payload);
    return id;
}

/* Gives the call to a connection: above 0, or an mprpc_outcome. The caller has a reference to both. */
static int64_t post(Pending *f, Link *link, uint64_t timeout, uint32_t attempt)
{
    uint32_t round = ++f->round;
    Link *held = NULL;

    if (!link->mailed)
        attach(link);
    Py_INCREF(f); /* the mail's */
    Py_INCREF(link);
    f->link = link;
    f->id = 0;
    enlist(f);
    int64_t id = send_off(f, link->link, timeout, attempt);
    if (id > 0) {
        if (f->posted && f->round == round)
            f->id = id;
        else if (f->round == round) /* it has ended, or been withdrawn by who did not know its id */
            call_off(f, link, id);
        return id;
    }
    if (f->round == round)
        unlist(f, &held);
    Py_XDECREF(held);
    Py_DECREF(f);
    return id;
}

/* _post(link, timeout, attempt): for Python, which has decided where; 0 when it has ended: its payload is no request any
 * more. */
static PyObject *pending_post(PyObject *object, PyObject *args)
{
    Pending *f = (Pending *)object;
    PyObject *link;
    unsigned long long timeout;
    unsigned long attempt;

    if (!PyArg_ParseTuple(args, "OKk", &link, &timeout, &attempt))
        return NULL;
    if (!mprpc_is_link(link) || !f->call || !f->payload || !PyBytes_Check(f->payload) || f->posted || !current ||
        current->born != mprpc_forks) {
        PyErr_SetString(PyExc_TypeError, "_post() of a future or a link that was not initialised");
        return NULL;
    }
    if (f->state != word_pending)
        return PyLong_FromLong(0);
    return PyLong_FromLongLong(post(f, (Link *)link, timeout, (uint32_t)attempt));
}

/* _withdraw(): no mail shall end it; if one was to, CANCEL goes to the provider. */
static PyObject *pending_withdraw(PyObject *object, PyObject *nothing)
{
    Pending *f = (Pending *)object;
    int64_t id = f->id;
    Link *link = NULL;

    (void)nothing;
    if (unlist(f, &link) && id)
        call_off(f, link, id);
    Py_XDECREF(link);
    Py_RETURN_NONE;
}

/* _forget(): in a forked child, where its mail never comes. */
static PyObject *pending_forget(PyObject *object, PyObject *nothing)
{
    Pending *f = (Pending *)object;
    Link *link = NULL;

    (void)nothing;
    if (unlist(f, &link))
        Py_DECREF(f);
    Py_XDECREF(link);
    Py_RETURN_NONE;
}

/* ---- results ---- */

/* An attribute of object, called with what a fast call was given. */
static PyObject *called(PyObject *object, PyObject *name, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    PyObject *method = PyObject_GetAttr(object, name), *positional = PyTuple_New(count), *others = PyDict_New();
    PyObject *result = NULL;
    int failed = !method || !positional || !others;

    for (Py_ssize_t i = 0; !failed && i < count; i++) {
        Py_INCREF(args[i]);
        failed = PyTuple_SetItem(positional, i, args[i]) < 0;
    }
    for (Py_ssize_t i = 0; !failed && i < named; i++)
        failed = PyDict_SetItem(others, PyTuple_GetItem(names, i), args[count + i]) < 0;
    if (!failed)
        result = PyObject_Call(method, positional, others);
    Py_XDECREF(method);
    Py_XDECREF(positional);
    Py_XDECREF(others);
    return result;
}

static PyObject *pending_result(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Pending *f = (Pending *)object;

    if (f->state != word_finished || (f->exception && f->exception != Py_None) || count > 1 || names)
        return called(object, name_outcome, args, count, names);
    PyObject *result = f->result ? f->result : Py_None;
    Py_INCREF(result);
    return result;
}

/* Whether its end is nobody else's business than of who waits for it. */
static int plain_end(const Pending *f)
{
    return (PyObject *)Py_TYPE(f) == current->kind && !f->controller && !f->outer && !f->began && !f->weight;
}

/* With the futures' lock held. 1: it has ended with that. */
static int resolve(Pending *f, PyObject *response)
{
    if (f->state != word_pending)
        return 0;
    PyObject *was = f->result;
    Py_INCREF(response);
    f->result = response;
    Py_XDECREF(was);
    Py_INCREF(word_finished);
    f->state = word_finished;
    Py_DECREF(word_pending);
    for (Py_ssize_t i = 0; f->waiters && i < PyList_Size(f->waiters); i++) {
        PyObject *waiter = PyList_GetItem(f->waiters, i);
        PyObject *told = PyObject_CallMethodObjArgs(waiter, name_add_result, (PyObject *)f, NULL);
        if (!told)
            PyErr_WriteUnraisable(waiter);
        Py_XDECREF(told);
    }
    return 1;
}

/* What Python makes of it. */
static void ask(PyObject *object, PyObject *name, PyObject *a, PyObject *b, PyObject *c, PyObject *d)
{
    PyObject *said = PyObject_CallMethodObjArgs(object, name, a, b, c, d, NULL);

    if (!said)
        PyErr_WriteUnraisable(object);
    Py_XDECREF(said);
}

static void failed(Reader *self, Pending *f, Link *link, const struct mprpc_mail *m, const uint8_t *bytes)
{
    PyObject *mail = Py_BuildValue("(KLLKIIiBB)", (unsigned long long)0, (long long)m->outcome, (long long)m->reason,
                                   (unsigned long long)0, m->text_size, m->details_size, (int)m->status, m->not_run,
                                   m->sent);
    PyObject *words = PyBytes_FromStringAndSize((const char *)(bytes ? bytes + m->offset : NULL),
                                                (Py_ssize_t)(bytes ? m->text_size + m->details_size : 0));

    if (mail && words)
        ask((PyObject *)self, name_failed, (PyObject *)f, (PyObject *)link, mail, words);
    else
        PyErr_WriteUnraisable((PyObject *)self);
    Py_XDECREF(mail);
    Py_XDECREF(words);
}

static PyObject *data_of(const struct mprpc_mail *m, const uint8_t *bytes)
{
    return PyBytes_FromStringAndSize((const char *)(m->outcome > 0 ? bytes + m->offset : NULL), m->outcome);
}

/* NULL, with nothing set: it is none, or the call has failed. */
static PyObject *response_of(const Pending *f, const struct mprpc_mail *m, const uint8_t *bytes)
{
    PyObject *data = m->outcome >= 0 ? data_of(m, bytes) : NULL;
    PyObject *response = data ? PyObject_CallFunctionObjArgs(((Call *)f->call)->parse, data, NULL) : NULL;

    Py_XDECREF(data);
    if (!response)
        PyErr_Clear();
    return response;
}

/* An end that is not plain is Python's to see to. Takes the mail's reference, and the response. */
static void pass_on(Reader *self, Pending *f, const struct mprpc_mail *m, const uint8_t *bytes, PyObject *response)
{
    Link *link = NULL;

    if (!unlist(f, &link)) {
        Py_XDECREF(response);
        Py_DECREF(f);
        return;
    }
    if (response) {
        ask((PyObject *)f, name_end, response, Py_None, NULL, NULL);
        Py_DECREF(response);
    } else if (m->outcome < 0) {
        failed(self, f, link, m, bytes);
    } else {
        PyObject *data = data_of(m, bytes);
        if (!data)
            PyErr_Clear();
        ask((PyObject *)self, name_misread, (PyObject *)f, data ? data : Py_None, NULL, NULL);
        Py_XDECREF(data);
    }
    Py_XDECREF(link);
    Py_DECREF(f);
}

/* After its end, without the lock. */
static void leave(Pending *f, uint64_t now)
{
    mprpc_tally_end_shared(((Call *)f->call)->tally, 0, now - f->counted);
    Py_CLEAR(f->payload);
    if (f->callbacks && PyList_Size(f->callbacks))
        ask((PyObject *)f, name_run_callbacks, NULL, NULL, NULL, NULL);
}

static void lock(Reader *self, PyObject *name)
{
    PyObject *said = PyObject_CallMethodObjArgs(self->mutex, name, NULL);

    if (!said)
        PyErr_WriteUnraisable(self->mutex);
    Py_XDECREF(said);
}

/* One whose mail was taken stays posted until it has its result, for a fork meanwhile. In a child that a callback has
 * forked what is left here is the parent's. */
static void deliver(Reader *self, const struct mprpc_mail *mail, size_t count, const uint8_t *bytes)
{
    Pending *plain[BATCH];
    PyObject *responses[BATCH];
    Link *links[BATCH];
    char ended[BATCH]; /* else it was cancelled */
    size_t kept = 0;

    for (size_t i = 0; i < count && self->born == mprpc_forks; i++) {
        Pending *f = (Pending *)(uintptr_t)mail[i].token;
        PyObject *response = f->posted ? response_of(f, &mail[i], bytes) : NULL;
        if (!response || !plain_end(f)) {
            pass_on(self, f, &mail[i], bytes, response);
            continue;
        }
        plain[kept] = f;
        responses[kept++] = response;
    }
    if (!kept || self->born != mprpc_forks)
        return;
    lock(self, name_acquire);
    for (size_t i = 0; i < kept; i++) {
        links[i] = NULL;
        ended[i] = (char)(unlist(plain[i], &links[i]) && resolve(plain[i], responses[i]));
    }
    lock(self, name_release);
    uint64_t now = mprpc_clock();
    for (size_t i = 0; i < kept && self->born == mprpc_forks; i++) {
        Py_DECREF(responses[i]);
        Py_XDECREF(links[i]);
        if (ended[i])
            leave(plain[i], now);
        Py_DECREF(plain[i]); /* the mail's */
    }
}

/* _receive(patience): waits so many ns for mail, and ends the futures that it is for. Whether there was any; None: a
 * callback has forked, and this is the child. */
static PyObject *reader_receive(PyObject *object, PyObject *patience)
{
    Reader *self = (Reader *)object;
    unsigned long long ns = PyLong_AsUnsignedLongLong(patience);
    struct mprpc_mail *mail = NULL;
    uint8_t *bytes = NULL;
    size_t size, count = 0;
    int arrived;

    if (PyErr_Occurred())
        return NULL;
    if (self->born != mprpc_forks)
        Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS
    arrived = mprpc_mailbox_wait(self->box, ns);
    if (arrived && self->born == mprpc_forks)
        count = mprpc_mailbox_take(self->box, &mail, &bytes, &size);
    Py_END_ALLOW_THREADS
    for (size_t at = 0; at < count; at += BATCH) {
        if (at) {
            Py_BEGIN_ALLOW_THREADS
            Py_END_ALLOW_THREADS
        }
        deliver(self, mail + at, count - at < BATCH ? count - at : BATCH, bytes);
        if (self->born != mprpc_forks)
            Py_RETURN_NONE;
    }
    return PyBool_FromLong(arrived);
}

/* ---- a call ---- */

/* 1: the arguments are those of a plain call; 0: of another one, or wrong. */
static int plain_arguments(PyObject *const *args, Py_ssize_t count, PyObject *names, PyObject **timeout)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;

    *timeout = count + named == 2 ? args[1] : NULL;
    if (count < 1 || count + named > 2)
        return 0;
    return !named || PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), "timeout") == 0;
}

static int has_room(const Call *call, const Reader *reader)
{
    Py_ssize_t others = reader->queued && reader->paused ? PyDict_Size(reader->queued) + PyDict_Size(reader->paused) : 0;

    return flying + others < call->pending_max;
}

/* Nothing of it has been sent yet: what the reader's Python makes of it, a reference or NULL. Takes the future. */
static PyObject *hand_over(Reader *reader, Pending *f, PyObject *name, PyObject *with)
{
    PyObject *said = PyObject_CallMethodObjArgs((PyObject *)reader, name, (PyObject *)f, with, NULL);

    if (!said) {
        Py_DECREF(f);
        return NULL;
    }
    Py_DECREF(said);
    return (PyObject *)f;
}

/* To whose turn it is. Takes the future. */
static PyObject *launch(Reader *reader, Pending *f, uint64_t ns)
{
    Call *call = (Call *)f->call;
    Link *link = mprpc_call_connected(call, &f->endpoint);

    if (!link)
        return hand_over(reader, f, name_queue, NULL);
    f->old = 1;
    int64_t outcome = post(f, link, ns, 0);
    if (outcome < 0) {
        PyObject *why = PyLong_FromLongLong(outcome), *refused = PyTuple_Pack(2, (PyObject *)link, why ? why : Py_None);
        Py_XDECREF(why);
        Py_DECREF(link);
        PyObject *future = refused ? hand_over(reader, f, name_refused, refused) : NULL;
        if (!refused)
            Py_DECREF(f);
        Py_XDECREF(refused);
        return future;
    }
    Py_DECREF(link);
    if (!reader->thread || reader->thread == Py_None)
        return hand_over(reader, f, name_start_thread, NULL);
    return (PyObject *)f;
}

static Pending *new_pending(Reader *reader, Call *call, PyObject *payload, uint64_t ns)
{
    Pending *f = (Pending *)PyType_GenericAlloc((PyTypeObject *)reader->kind, 0);

    if (!f)
        return NULL;
    Py_INCREF(call);
    f->call = (PyObject *)call;
    Py_INCREF(word_pending);
    f->state = word_pending;
    Py_INCREF(payload);
    f->payload = payload;
    f->counted = mprpc_call_begun(call);
    f->deadline = f->counted + ns;
    return f;
}

PyObject *mprpc_call_future(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names)
{
    Call *call = (Call *)object;
    Reader *reader = current;
    PyObject *timeout, *payload = NULL, *future = NULL;
    uint64_t ns;

    if (!call->plain || !reader || reader->born != mprpc_forks || mprpc_inherits() ||
        !plain_arguments(args, count, names, &timeout) || (PyObject *)Py_TYPE(args[0]) != call->kind ||
        !mprpc_call_plain_timeout(call, timeout, &ns))
        return called(object, name_future, args, count, names);
    payload = PyObject_CallFunctionObjArgs(call->serialize, args[0], NULL);
    if (!payload || PyBytes_Size(payload) > call->payload_max) { /* Python says what is wrong with it */
        PyErr_Clear();
        Py_XDECREF(payload);
        return called(object, name_future, args, count, names);
    }
    Py_INCREF(reader);
    Pending *f = new_pending(reader, call, payload, ns);
    if (f && PyBytes_Size(payload) <= SMALL && has_room(call, reader)) {
        call->calls++;
        future = launch(reader, f, ns);
    } else if (f) {
        PyObject *left = PyLong_FromUnsignedLongLong(ns);
        future = left ? hand_over(reader, f, name_begin, left) : NULL;
        if (!left)
            Py_DECREF(f);
        Py_XDECREF(left);
    }
    Py_DECREF(payload);
    Py_DECREF(reader);
    return future;
}

/* ---- the type of futures ---- */

static int pending_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    Pending *f = (Pending *)object;
    PyObject *call, *controller;

    if (!PyArg_ParseTuple(args, "OO", &call, &controller))
        return -1;
    if (kwargs || f->call || !PyObject_TypeCheck(call, mprpc_call_type) || !((Call *)call)->tally) {
        PyErr_SetString(PyExc_TypeError, "a future is made by UnaryCall.future()");
        return -1;
    }
    Py_INCREF(call);
    f->call = call;
    if (controller != Py_None) {
        Py_INCREF(controller);
        f->controller = controller;
    }
    Py_INCREF(word_pending);
    f->state = word_pending;
    return 0;
}

static int pending_traverse(PyObject *self, visitproc visit, void *arg)
{
    Pending *f = (Pending *)self;

    Py_VISIT(Py_TYPE(self));
    Py_VISIT(f->call);
    Py_VISIT((PyObject *)f->link);
    Py_VISIT(f->controller);
    Py_VISIT(f->outer);
    Py_VISIT(f->endpoint);
    Py_VISIT(f->result);
    Py_VISIT(f->exception);
    Py_VISIT(f->waiters);
    Py_VISIT(f->callbacks);
    return 0;
}

static int pending_clear(PyObject *self)
{
    Pending *f = (Pending *)self;

    Py_CLEAR(f->controller);
    Py_CLEAR(f->outer);
    Py_CLEAR(f->endpoint);
    Py_CLEAR(f->result);
    Py_CLEAR(f->exception);
    Py_CLEAR(f->waiters);
    Py_CLEAR(f->callbacks);
    return 0;
}

static void pending_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Pending *f = (Pending *)self;

    PyObject_GC_UnTrack(self);
    pending_clear(self);
    Py_CLEAR(f->call);
    Py_CLEAR(f->state);
    Py_CLEAR(f->payload);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* A list that most futures do without. */
static PyObject *list_of(PyObject **list)
{
    if (!*list)
        *list = PyList_New(0);
    Py_XINCREF(*list);
    return *list;
}

static PyObject *get_waiters(PyObject *self, void *closure)
{
    (void)closure;
    return list_of(&((Pending *)self)->waiters);
}

static PyObject *get_callbacks(PyObject *self, void *closure)
{
    (void)closure;
    return list_of(&((Pending *)self)->callbacks);
}

static int set_callbacks(PyObject *self, PyObject *list, void *closure)
{
    PyObject *was = ((Pending *)self)->callbacks;

    (void)closure;
    Py_XINCREF(list);
    ((Pending *)self)->callbacks = list;
    Py_XDECREF(was);
    return 0;
}

static PyMethodDef pending_methods[] = {
    {"result", (PyCFunction)(void (*)(void))pending_result, METH_FASTCALL | METH_KEYWORDS,
     "The response. Raises what the call failed with, CancelledError, or after `timeout` seconds TimeoutError."},
    {"_post", pending_post, METH_VARARGS, NULL},
    {"_withdraw", pending_withdraw, METH_NOARGS, NULL},
    {"_forget", pending_forget, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

#define OBJECT(name) {"_" #name, T_OBJECT, offsetof(Pending, name), 0, NULL}
#define NUMBER(name) {"_" #name, T_ULONGLONG, offsetof(Pending, name), 0, NULL}
static PyMemberDef pending_members[] = {
    {"_call", T_OBJECT, offsetof(Pending, call), READONLY, NULL},
    OBJECT(controller),
    OBJECT(outer),
    OBJECT(endpoint),
    OBJECT(state),
    OBJECT(result),
    OBJECT(exception),
    OBJECT(payload),
    NUMBER(deadline),
    NUMBER(counted),
    NUMBER(began),
    {"_weight", T_PYSSIZET, offsetof(Pending, weight), 0, NULL},
    {"_old", T_BOOL, offsetof(Pending, old), 0, NULL},
    {"_posted", T_BOOL, offsetof(Pending, posted), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef pending_getset[] = {
    {"_waiters", get_waiters, NULL, NULL, NULL},
    {"_done_callbacks", get_callbacks, set_callbacks, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pending_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)"The base of CallFuture: what a plain one is."},
    {Py_tp_init, (void *)pending_init},
    {Py_tp_dealloc, (void *)pending_dealloc},
    {Py_tp_traverse, (void *)pending_traverse},
    {Py_tp_clear, (void *)pending_clear},
    {Py_tp_methods, (void *)pending_methods},
    {Py_tp_members, (void *)pending_members},
    {Py_tp_getset, (void *)pending_getset},
    {0, NULL},
};
static PyType_Spec pending_spec = {"mprpc._fast.Pending", sizeof(Pending), 0,
                                   Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, pending_slots};

/* ---- the type of their reader ---- */

static int reader_init(PyObject *object, PyObject *args, PyObject *kwargs)
{
    Reader *self = (Reader *)object;
    PyObject *kind, *mutex;
    unsigned long long box;

    if (!PyArg_ParseTuple(args, "KO!O", &box, &PyType_Type, &kind, &mutex))
        return -1;
    if (kwargs || self->box || !box || !PyType_IsSubtype((PyTypeObject *)kind, pending_type)) {
        PyErr_SetString(PyExc_TypeError, "Reader(mailbox's address, class, lock), once");
        return -1;
    }
    Py_INCREF(kind);
    self->kind = kind;
    Py_INCREF(mutex);
    self->mutex = mutex;
    self->box = (struct mprpc_mailbox *)(uintptr_t)box;
    self->born = mprpc_forks;
    Reader *was = current;
    Py_INCREF(self);
    current = self; /* for as long as the process lives */
    Py_XDECREF(was);
    return 0;
}

static int reader_traverse(PyObject *self, visitproc visit, void *arg)
{
    Reader *r = (Reader *)self;

    Py_VISIT(Py_TYPE(self));
    Py_VISIT(r->kind);
    Py_VISIT(r->queued);
    Py_VISIT(r->paused);
    Py_VISIT(r->thread);
    return 0;
}

static int reader_clear(PyObject *self)
{
    Reader *r = (Reader *)self;

    Py_CLEAR(r->queued);
    Py_CLEAR(r->paused);
    Py_CLEAR(r->thread);
    return 0;
}

static void reader_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Reader *r = (Reader *)self;

    PyObject_GC_UnTrack(self);
    reader_clear(self);
    Py_CLEAR(r->kind);
    Py_CLEAR(r->mutex);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

/* Those that a mail is to end, in no order. */
static PyObject *get_pending(PyObject *self, void *closure)
{
    PyObject *all = NULL;
    Py_ssize_t count = -1, at = 0;

    (void)self;
    (void)closure;
    while (count != flying) { /* making a list may run the collector, and that anything */
        Py_XDECREF(all);
        count = flying;
        if (!(all = PyList_New(count)))
            return NULL;
    }
    for (Pending *f = first; f; f = f->after) {
        Py_INCREF(f);
        PyList_SetItem(all, at++, (PyObject *)f);
    }
    return all;
}

static PyObject *get_flying(PyObject *self, void *closure)
{
    (void)self;
    (void)closure;
    return PyLong_FromSsize_t(flying);
}

static PyMethodDef reader_methods[] = {
    {"_receive", reader_receive, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef reader_members[] = {
    {"_queued", T_OBJECT, offsetof(Reader, queued), 0, NULL},
    {"_paused", T_OBJECT, offsetof(Reader, paused), 0, NULL},
    {"_thread", T_OBJECT, offsetof(Reader, thread), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef reader_getset[] = {
    {"_pending", get_pending, NULL, NULL, NULL},
    {"_flying", get_flying, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot reader_slots[] = {
    {Py_tp_doc, (void *)(uintptr_t)"The base of the reader: it ends plain futures."},
    {Py_tp_init, (void *)reader_init},
    {Py_tp_dealloc, (void *)reader_dealloc},
    {Py_tp_traverse, (void *)reader_traverse},
    {Py_tp_clear, (void *)reader_clear},
    {Py_tp_methods, (void *)reader_methods},
    {Py_tp_members, (void *)reader_members},
    {Py_tp_getset, (void *)reader_getset},
    {0, NULL},
};
static PyType_Spec reader_spec = {"mprpc._fast.Reader", sizeof(Reader), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, reader_slots};

static int intern_all(void)
{
    const struct {
        PyObject **to;
        const char *name;
    } all[] = {
        {&word_pending, "PENDING"},
        {&word_finished, "FINISHED"},
        {&name_acquire, "acquire"},
        {&name_release, "release"},
        {&name_add_result, "add_result"},
        {&name_run_callbacks, "_run_callbacks"},
        {&name_end, "_end"},
        {&name_future, "_future"},
        {&name_outcome, "_outcome"},
        {&name_start_thread, "_started"},
        {&name_begin, "_begin"},
        {&name_queue, "_queue"},
        {&name_refused, "_refused"},
        {&name_failed, "_failed"},
        {&name_misread, "_misread"},
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!*all[i].to && !(*all[i].to = PyUnicode_InternFromString(all[i].name)))
            return -1;
    return 0;
}

int mprpc_add_future(PyObject *module)
{
    if (intern_all() < 0)
        return -1;
    return mprpc_add_type(module, &pending_spec, "Pending", &pending_type) < 0
               ? -1
               : mprpc_add_type(module, &reader_spec, "Reader", NULL);
}
