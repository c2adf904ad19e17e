/* The client's plain call: serialize, send, wait, receive, parse. */
#include "_fast.h"

int mprpc_add_call(PyObject *module)
{
    (void)module;
    return 0;
}
