/* Whose handler runs on this thread. A thread's own variable, so that a plain call pays one look at it. */
#include "_fast.h"

_Thread_local PyObject *mprpc_handling;
PyObject *mprpc_scope; /* for the process's life */

int mprpc_scoped(void)
{
    PyObject *controller = PyObject_CallObject(mprpc_scope, NULL);
    int scoped = controller != Py_None;

    if (!controller)
        PyErr_Clear(); /* Python asks again, and says so */
    Py_XDECREF(controller);
    return scoped;
}

static PyObject *handling(PyObject *module, PyObject *none)
{
    PyObject *controller = mprpc_handling ? mprpc_handling : Py_None;

    (void)module;
    (void)none;
    Py_INCREF(controller);
    return controller;
}

static PyObject *handle(PyObject *module, PyObject *controller)
{
    (void)module;
    mprpc_handling = controller == Py_None ? NULL : controller;
    Py_RETURN_NONE;
}

static PyObject *scope(PyObject *module, PyObject *get)
{
    (void)module;
    if (!mprpc_scope) {
        Py_INCREF(get);
        mprpc_scope = get;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"handling", handling, METH_NOARGS, "The controller of the call whose handler runs on this thread, or None."},
    {"handle", handle, METH_O, "Sets what handling() returns here, None for nothing; the caller keeps it alive."},
    {"scope", scope, METH_O, "From now on calls ask this for a controller as well, which says None for none. Once."},
    {NULL, NULL, 0, NULL},
};

int mprpc_add_context(PyObject *module)
{
    return PyModule_AddFunctions(module, methods);
}
