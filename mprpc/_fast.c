/* The module mprpc._fast: it lives in the same shared library as mprpc._native, whose functions it calls directly. */
#include "_fast.h"

static int fill(PyObject *module)
{
    return mprpc_add_call(module) < 0 || mprpc_add_future(module) < 0 || mprpc_add_serve(module) < 0 ||
                   mprpc_add_context(module) < 0
               ? -1
               : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)fill}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "mprpc._fast", .m_slots = slots};

PyMODINIT_FUNC PyInit__fast(void)
{
    return PyModuleDef_Init(&definition);
}
