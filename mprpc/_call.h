/* What calls that wait (_call.c) and futures (_future.c) share: a connection as Python has it, and a method of a channel. */
#ifndef MPRPC_CALL_H
#define MPRPC_CALL_H

#include "_fast.h" /* Python.h first */

#include "_channel.h"
#include "_tally.h"

/* A connection, for as long as anybody has this. */
typedef struct {
    PyObject_HEAD
    struct mprpc_link *link;
    PyObject *handle; /* cffi's, which frees the connection with itself */
    char mailed;      /* it is attached to the futures' mailbox */
} Link;

typedef struct {
    PyObject_HEAD
    PyObject *kind, *serialize, *parse; /* the request's class; two functions of generated code */
    PyObject *names;                    /* bytes: the method's, as the wire has them */
    PyObject *next;                     /* a callable: whose turn it is; or NULL, since */
    PyObject *endpoint;                 /* it is always this one's */
    PyObject *counts;                   /* cffi's, which owns */
    struct mprpc_tally *tally;          /* the channel's for this method */
    uint64_t timeout;                   /* ns, where the call gives none */
    Py_ssize_t payload_max, pending_max;
    unsigned long long calls; /* that were plain; Python takes them away */
    char plain;               /* 0: every call is for Python to decide */
} Call;

extern PyTypeObject *mprpc_call_type;
/* Adds the type to the module, and leaves it in *keep as well, unless that is NULL or has one. 0, or -1. */
int mprpc_add_type(PyObject *module, PyType_Spec *spec, const char *name, PyTypeObject **keep);
int mprpc_is_link(PyObject *object);

/* Counts a call; when it began. */
uint64_t mprpc_call_begun(Call *self);
/* 1: ns is how long the call may take; 0: it is for Python to say. timeout: NULL for none. */
int mprpc_call_plain_timeout(const Call *self, PyObject *timeout, uint64_t *ns);
/* The connection of whose turn it is; NULL, with nothing set, where Python has to find one. Both are the caller's. */
Link *mprpc_call_connected(Call *self, PyObject **endpoint);

/* _future.c: UnaryCall.future(). */
PyObject *mprpc_call_future(PyObject *object, PyObject *const *args, Py_ssize_t count, PyObject *names);

#endif
