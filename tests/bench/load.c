/* The client of the capacity modes: replays one request's bytes, so that the server is what is measured.
 *
 *     load FORMAT PORT CONNECTIONS DEPTH latency CALLS | seconds SECONDS | idle   HEAD [MIDDLE PAYLOAD | SIZE]
 *
 * Each connection has DEPTH requests in flight. FORMAT says what a frame is; the rest are bytes in hex:
 *   be32   HEAD is the request; a reply is a 32-bit big-endian length and so many bytes
 *   fixed  HEAD is the request; a reply has SIZE bytes (decimal)
 *   mprpc  HEAD and MIDDLE are what stands before and after call_id in the header, PAYLOAD follows the header
 *   h2     HEAD is a gRPC call's HPACK block, which must not use the dynamic table; PAYLOAD its DATA
 * Prints one JSON object: calls, seconds, p50 and p99 in ns (of a whole round trip; with DEPTH over 1: of a batch).
 * Then its connections stay open until its input ends. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 1 << 17, DEPTH_MAX = 256, REQUEST_MAX = 400, TIMES = 1 << 22 };
enum format { BE32, FIXED, MPRPC, H2 };

struct bytes {
    uint8_t at[REQUEST_MAX];
    size_t size;
};
struct connection {
    int fd;
    uint64_t id, since;
    int waiting; /* for so many replies */
    size_t size; /* of in */
    uint8_t *in;
};

static enum format format;
static struct bytes head, middle, payload;
static size_t reply_size;
static uint64_t calls;
static uint32_t *times, times_count; /* ns of the last TIMES round trips */

static void die(const char *what)
{
    fprintf(stderr, "load: %s (%s)\n", what, strerror(errno));
    exit(1);
}

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void unhex(struct bytes *to, const char *from)
{
    unsigned byte;

    for (; to->size < REQUEST_MAX && sscanf(from, "%2x", &byte) == 1; from += 2)
        to->at[to->size++] = (uint8_t)byte;
    if (*from)
        die("a request that is not hex, or over 400 bytes");
}

static uint8_t *add(uint8_t *to, const struct bytes *b)
{
    memcpy(to, b->at, b->size);
    return to + b->size;
}

static uint32_t be(const uint8_t *at, int size)
{
    uint32_t v = 0;

    while (size--)
        v = v << 8 | *at++;
    return v;
}

static uint8_t *h2_frame(uint8_t *to, uint32_t type, uint32_t flags, uint32_t stream, uint32_t size)
{
    const uint8_t bytes[9] = {(uint8_t)(size >> 16), (uint8_t)(size >> 8), (uint8_t)size, (uint8_t)type, (uint8_t)flags,
                              (uint8_t)(stream >> 24), (uint8_t)(stream >> 16), (uint8_t)(stream >> 8), (uint8_t)stream};

    memcpy(to, bytes, sizeof bytes);
    return to + sizeof bytes;
}

/* One request; where it ends. */
static uint8_t *put(uint8_t *to, struct connection *c)
{
    uint8_t *start = to;

    c->id++;
    if (format == MPRPC) {
        to = add(to + 4, &head);
        *to++ = 4 << 3;
        for (uint64_t v = c->id; (*to++ = (uint8_t)(v | (v > 127 ? 128 : 0))), v > 127; v >>= 7)
            continue;
        to = add(to, &middle);
        uint32_t size = (uint32_t)(to - start - 4);
        for (int i = 0; i < 4; i++)
            start[i] = (uint8_t)(size >> 8 * i);
        return add(to, &payload);
    }
    if (format == H2) {
        uint32_t stream = (uint32_t)c->id * 2 - 1;
        to = add(h2_frame(to, 1, 4, stream, (uint32_t)head.size), &head);
        return add(h2_frame(to, 0, 1, stream, (uint32_t)payload.size), &payload);
    }
    return add(to, &head);
}

static void send_all(int fd, const uint8_t *from, const uint8_t *end)
{
    while (from < end) {
        ssize_t n = send(fd, from, (size_t)(end - from), MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            die("send");
        from += n > 0 ? n : 0;
    }
}

static const uint8_t *varint(const uint8_t *at, const uint8_t *end, uint64_t *v)
{
    *v = 0;
    for (int shift = 0; at < end && shift < 64; shift += 7) {
        *v |= (uint64_t)(*at & 127) << shift;
        if (!(*at++ & 128))
            return at;
    }
    die("a header that can't be read");
    return NULL;
}

/* Size of the frame that begins there, payload included; 0: not whole. */
static size_t mprpc_reply(const uint8_t *at, size_t size)
{
    uint64_t tag, v, payload_size = 0;

    if (size < 4)
        return 0;
    size_t header = (size_t)at[0] | (size_t)at[1] << 8 | (size_t)at[2] << 16 | (size_t)at[3] << 24;
    if (size < 4 + header)
        return 0;
    for (const uint8_t *h = at + 4, *end = h + header; h < end;) {
        h = varint(varint(h, end, &tag), end, &v);
        if ((tag & 7) == 2)
            h += v;
        if (tag >> 3 == 7 && v)
            die("the reply is an error");
        if (tag >> 3 == 3)
            payload_size = v;
    }
    return size < 4 + header + payload_size ? 0 : 4 + header + payload_size;
}

static size_t h2_reply(struct connection *c, const uint8_t *at, size_t size, int *done)
{
    uint8_t ack[17];

    *done = 0;
    if (size < 9 || size < 9 + be(at, 3))
        return 0;
    if (at[3] == 3 || at[3] == 7)
        die("the reply is RST_STREAM or GOAWAY");
    if (at[3] == 4 && !(at[4] & 1))
        send_all(c->fd, ack, h2_frame(ack, 4, 1, 0, 0));
    if (at[3] == 6 && !(at[4] & 1)) {
        memcpy(h2_frame(ack, 6, 1, 0, 8), at + 9, 8);
        send_all(c->fd, ack, ack + 17);
    }
    *done = at[3] == 1 && at[4] & 1;
    return 9 + be(at, 3);
}

static size_t reply(struct connection *c, const uint8_t *at, size_t size, int *done)
{
    *done = 1;
    switch (format) {
    case MPRPC: return mprpc_reply(at, size);
    case H2: return h2_reply(c, at, size, done);
    case FIXED: return size < reply_size ? 0 : reply_size;
    default: return size < 4 || size < 4 + (size_t)be(at, 4) ? 0 : 4 + (size_t)be(at, 4);
    }
}

/* Receives once; how many replies are whole with it. */
static int receive(struct connection *c, int flags)
{
    ssize_t n = recv(c->fd, c->in + c->size, ROOM - c->size, flags);
    size_t used = 0;
    int count = 0, done;

    if (n == 0)
        die("the server ended the connection");
    if (n < 0 && errno != EAGAIN && errno != EINTR)
        die("recv");
    c->size += n > 0 ? (size_t)n : 0;
    for (size_t one; (one = reply(c, c->in + used, c->size - used, &done)) > 0; used += one)
        count += done;
    c->size -= used;
    if (c->size)
        memmove(c->in, c->in + used, c->size);
    c->waiting -= count;
    return count;
}

static void request(struct connection *c, int count)
{
    static uint8_t out[DEPTH_MAX * REQUEST_MAX * 2];
    uint8_t *end = out;

    for (int i = 0; i < count; i++)
        end = put(end, c);
    c->since = clock_ns();
    c->waiting += count;
    send_all(c->fd, out, end);
}

static void note(struct connection *c, int count)
{
    uint64_t now = clock_ns();

    times[times_count++ % TIMES] = (uint32_t)(now - c->since);
    calls += (uint64_t)count;
}

static void open_connection(struct connection *c, uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    int on = 1;

    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    c->in = malloc(ROOM);
    if (c->fd < 0 || !c->in || connect(c->fd, (struct sockaddr *)&address, sizeof address))
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (format == H2) { /* preface, empty SETTINGS, a window that no run uses up */
        uint8_t start[64] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", *at = h2_frame(start + 24, 4, 0, 0, 0);
        at = h2_frame(at, 8, 0, 0, 4);
        memcpy(at, "\x7f\x00\x00\x00", 4);
        send_all(c->fd, start, at + 4);
    }
}

static void one_call(struct connection *c)
{
    request(c, 1);
    while (!receive(c, 0))
        continue;
}

static void run(struct connection *all, int connections, int depth, double seconds)
{
    struct epoll_event events[256];
    int ep = epoll_create1(0);
    uint64_t end;

    for (int i = 0; i < connections; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(ep, EPOLL_CTL_ADD, all[i].fd, &e);
        request(&all[i], depth);
    }
    end = clock_ns() + (uint64_t)(seconds * 1e9);
    while (clock_ns() < end) {
        int n = epoll_wait(ep, events, 256, 1000);
        for (int i = 0; i < n; i++) {
            struct connection *c = events[i].data.ptr;
            int count = receive(c, MSG_DONTWAIT);
            if (count) {
                note(c, count);
                request(c, count);
            }
        }
    }
    for (int i = 0; i < connections; i++) /* closed with unread replies, a connection would be reset */
        while (all[i].waiting)
            receive(&all[i], 0);
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void report(uint64_t nanoseconds)
{
    uint32_t n = times_count < TIMES ? times_count : TIMES;

    qsort(times, n, sizeof *times, compare);
    printf("{\"calls\": %llu, \"seconds\": %.6f, \"p50\": %u, \"p99\": %u}\n", (unsigned long long)calls,
           (double)nanoseconds / 1e9, n ? times[n / 2] : 0, n ? times[(uint64_t)n * 99 / 100] : 0);
}

int main(int argc, char **argv)
{
    if (argc < 8)
        die("arguments");
    format = !strcmp(argv[1], "be32") ? BE32 : !strcmp(argv[1], "fixed") ? FIXED : !strcmp(argv[1], "mprpc") ? MPRPC : H2;
    int connections = atoi(argv[3]), depth = atoi(argv[4]);
    if (connections < 1 || depth < 1 || depth > DEPTH_MAX)
        die("connections or depth");
    unhex(&head, argv[7]);
    if (format == FIXED && argc > 8)
        reply_size = (size_t)atol(argv[8]);
    if (format >= MPRPC && argc > 9) {
        unhex(&middle, argv[8]);
        unhex(&payload, argv[9]);
    }
    struct connection *all = calloc((size_t)connections, sizeof *all);
    times = malloc(TIMES * sizeof *times);
    if (!all || !times)
        die("memory");
    for (int i = 0; i < connections; i++) {
        open_connection(&all[i], (uint16_t)atoi(argv[2]));
        one_call(&all[i]);
        if (!strcmp(argv[5], "idle")) {
            free(all[i].in);
            all[i].in = NULL;
        }
    }
    uint64_t start = clock_ns();
    if (!strcmp(argv[5], "latency"))
        for (long i = atol(argv[6]); i > 0; i--) {
            one_call(all);
            note(all, 1);
        }
    else if (!strcmp(argv[5], "seconds"))
        run(all, connections, depth, atof(argv[6]));
    report(clock_ns() - start);
    fflush(stdout);
    return getchar() == EOF ? 0 : 1;
}
