/* A connection within one process: bytes that lie in memory, no socket. What tests use in place of one. */
#ifndef MPRPC_WIRE_H
#define MPRPC_WIRE_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { MPRPC_WIRE_MAX = 256 << 20 }; /* bytes on their way in one direction; more ends the sender's side */

/* One of its two ends. Any thread. */
struct mprpc_wire;

/* 0, or -1 without descriptors or memory (errno). */
int mprpc_wire_pair(struct mprpc_wire *ends[2]);
/* Readable while there is something to receive, the other side's end included. It is always good to send to. */
int mprpc_wire_descriptor(const struct mprpc_wire *end);
/* As sendmsg and recv of a socket that never waits: all bytes, or -1 (EPIPE, ENOMEM); 0 is the stream's end. */
ssize_t mprpc_wire_send(struct mprpc_wire *end, const struct iovec *parts, size_t count);
ssize_t mprpc_wire_receive(struct mprpc_wire *end, void *to, size_t room);
/* Our side's end; both: the other's too, so that whoever waits here wakes up. */
void mprpc_wire_shutdown(struct mprpc_wire *end, int both);
void mprpc_wire_close(struct mprpc_wire *end);

#endif
