/* What a fork leaves of this library's state: the child closes at once the descriptors of ours that it inherited, so that
 * neither a connection's end nor a port that is free again waits for it; everything else it only lets go. Whatever
 * was made before the fork finds out by mprpc_forks, and then neither locks, nor writes, nor closes. */
#ifndef MPRPC_FORK_H
#define MPRPC_FORK_H

/* How often this process was forked since the library was loaded, its ancestors included; a thing that remembers
 * another number was made by the parent. */
extern unsigned mprpc_forks;

/* Any thread. From now on a forked child closes it. */
void mprpc_descriptor_keep(int fd);
/* Closes one that was kept; one that is not kept as well. */
void mprpc_descriptor_close(int fd);
/* A pipe, kept, close-on-exec, non-blocking. 0, or -1 (errno). */
int mprpc_descriptor_pipe(int ends[2]);

#endif
