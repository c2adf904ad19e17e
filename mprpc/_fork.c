/* Strategy: a bit for every descriptor, under a mutex that a fork takes first, so that the child finds it whole. */
#define _GNU_SOURCE
#include "_fork.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

unsigned mprpc_forks;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static uint8_t *kept; /* by descriptor */
static size_t room;   /* bytes */

static void before(void)
{
    pthread_mutex_lock(&mutex);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&mutex);
}

static void in_child(void)
{
    mprpc_forks++;
    pthread_mutex_init(&mutex, NULL);
    for (size_t i = 0; i < room; i++)
        for (int bit = 0; kept[i] >> bit; bit++)
            if (kept[i] >> bit & 1)
                close((int)i * 8 + bit);
    memset(kept, 0, room);
}

static void mind_forks(void)
{
    pthread_atfork(before, in_parent, in_child);
}

void mprpc_descriptor_keep(int fd)
{
    size_t at = (size_t)fd / 8;

    pthread_once(&once, mind_forks);
    pthread_mutex_lock(&mutex);
    if (at >= room) {
        size_t more = at + 1 > 2 * room ? at + 1 : 2 * room;
        uint8_t *grown = realloc(kept, more);
        if (grown) {
            memset(grown + room, 0, more - room);
            kept = grown;
            room = more;
        }
    }
    if (at < room)
        kept[at] = (uint8_t)(kept[at] | 1u << fd % 8);
    pthread_mutex_unlock(&mutex);
}

void mprpc_descriptor_close(int fd)
{
    size_t at = (size_t)fd / 8;
    int why = errno;

    pthread_mutex_lock(&mutex); /* until it is closed: the number may be another's right after */
    if (at < room)
        kept[at] = (uint8_t)(kept[at] & ~(1u << fd % 8));
    close(fd);
    pthread_mutex_unlock(&mutex);
    errno = why;
}

int mprpc_descriptor_pipe(int ends[2])
{
#ifdef __linux__
    if (pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0)
        return -1;
#else
    if (pipe(ends) < 0)
        return -1;
    for (int i = 0; i < 2; i++) {
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
        fcntl(ends[i], F_SETFL, O_NONBLOCK);
    }
#endif
    mprpc_descriptor_keep(ends[0]);
    mprpc_descriptor_keep(ends[1]);
    return 0;
}
