/* The C that holds Python objects: the calls' and the requests' plain case without a line of Python between the user's
 * code and the units below. Whatever is not plain is handed to Python (unary_call.py, provider.py), which decides.
 * The Limited API, so that one build serves every CPython from 3.10 on. */
#ifndef MPRPC_FAST_H
#define MPRPC_FAST_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

/* Each unit adds its types to the module mprpc._fast: 0, or -1 with an exception set. */
int mprpc_add_call(PyObject *module);
int mprpc_add_future(PyObject *module);
int mprpc_add_serve(PyObject *module);
int mprpc_add_context(PyObject *module);

/* The controller of the call whose handler runs on this thread, borrowed, or NULL: whoever runs a handler sets it, and
 * sets it back after. */
extern _Thread_local PyObject *mprpc_handling;
/* What tells a task's or an inheriting thread's controller: a callable, from when there is any; else NULL. */
extern PyObject *mprpc_scope;
/* Whether it tells one here. With the interpreter's lock, no exception set. */
int mprpc_scoped(void);

/* Whether a call made here and now has a scope to inherit from, which is context.py's to find out. */
static inline int mprpc_inherits(void)
{
    return mprpc_handling || (mprpc_scope && mprpc_scoped());
}

#endif
