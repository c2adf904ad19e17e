/* Strategy: each end has the bytes that are on their way to it, and a pipe with one byte in it while there are some, so
 * that whatever polls sockets polls this, too. */
#define _GNU_SOURCE
#include "_wire.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "_fork.h"
#include "_session.h"

struct cable;
struct mprpc_wire {
    struct cable *cable;
    struct mprpc_bytes in;
    size_t taken; /* bytes at the start of in */
    int told[2];  /* the pipe */
    int full;     /* there is a byte in it */
    int ended;    /* no more will come */
    int closed;
};
struct cable {
    unsigned born; /* mprpc_forks then */
    pthread_mutex_t mutex;
    struct mprpc_wire ends[2];
};

static struct mprpc_wire *other(struct mprpc_wire *end)
{
    return &end->cable->ends[end == end->cable->ends];
}

/* With the mutex held: makes the descriptor say whether there is something. */
static void tell(struct mprpc_wire *end)
{
    int wanted = end->in.size > end->taken || end->ended;
    char byte = 0;

    if (end->closed || wanted == end->full)
        return;
    ssize_t n = wanted ? write(end->told[1], &byte, 1) : read(end->told[0], &byte, 1);
    if (n == 1)
        end->full = wanted;
}

int mprpc_wire_pair(struct mprpc_wire *ends[2])
{
    struct cable *cable = calloc(1, sizeof *cable);

    if (!cable)
        return -1;
    for (int i = 0; i < 2; i++) {
        ends[i] = &cable->ends[i];
        ends[i]->cable = cable;
        if (mprpc_descriptor_pipe(ends[i]->told) < 0) {
            for (int made = 0; made < 2 * i; made++)
                mprpc_descriptor_close(ends[made / 2]->told[made % 2]);
            free(cable);
            return -1;
        }
    }
    pthread_mutex_init(&cable->mutex, NULL);
    cable->born = mprpc_forks;
    return 0;
}

int mprpc_wire_descriptor(const struct mprpc_wire *end)
{
    return end->told[0];
}

ssize_t mprpc_wire_send(struct mprpc_wire *end, const struct iovec *parts, size_t count)
{
    struct mprpc_wire *to = other(end);
    size_t size = 0;
    int why = 0;

    for (size_t i = 0; i < count; i++)
        size += parts[i].iov_len;
    pthread_mutex_lock(&end->cable->mutex);
    if (to->ended || to->closed)
        why = EPIPE;
    else if (to->in.size - to->taken + size > MPRPC_WIRE_MAX || mprpc_bytes_reserve(&to->in, size))
        why = ENOMEM;
    for (size_t i = 0; i < count && !why; i++)
        mprpc_bytes_add(&to->in, parts[i].iov_base, parts[i].iov_len);
    tell(to);
    pthread_mutex_unlock(&end->cable->mutex);
    errno = why;
    return why ? -1 : (ssize_t)size;
}

ssize_t mprpc_wire_receive(struct mprpc_wire *end, void *to, size_t room)
{
    pthread_mutex_lock(&end->cable->mutex);
    size_t there = end->in.size - end->taken, n = there < room ? there : room;
    int waits = !there && !end->ended;
    if (n) {
        memcpy(to, end->in.at + end->taken, n);
        end->taken += n;
        if (end->taken == end->in.size || end->taken > end->in.size / 2) { /* so each byte is moved at most once */
            mprpc_bytes_drop(&end->in, end->taken);
            end->taken = 0;
        }
    }
    tell(end);
    pthread_mutex_unlock(&end->cable->mutex);
    errno = waits ? EAGAIN : 0;
    return waits ? -1 : (ssize_t)n;
}

static void finish(struct mprpc_wire *end)
{
    end->ended = 1;
    tell(end);
}

void mprpc_wire_shutdown(struct mprpc_wire *end, int both)
{
    pthread_mutex_lock(&end->cable->mutex);
    finish(other(end));
    if (both)
        finish(end);
    pthread_mutex_unlock(&end->cable->mutex);
}

void mprpc_wire_close(struct mprpc_wire *end)
{
    struct cable *cable = end->cable;

    if (cable->born != mprpc_forks) /* a thread of the parent may have had the mutex, for ever */
        return;
    pthread_mutex_lock(&cable->mutex);
    finish(other(end));
    end->closed = 1;
    mprpc_descriptor_close(end->told[0]);
    mprpc_descriptor_close(end->told[1]);
    mprpc_bytes_free(&end->in);
    end->taken = 0;
    int last = other(end)->closed;
    pthread_mutex_unlock(&cable->mutex);
    if (last) {
        pthread_mutex_destroy(&cable->mutex);
        free(cable);
    }
}
