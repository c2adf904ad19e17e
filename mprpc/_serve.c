/* The provider's plain turn: receive, parse, handle, serialize, send. */
#include "_fast.h"

int mprpc_add_serve(PyObject *module)
{
    (void)module;
    return 0;
}
