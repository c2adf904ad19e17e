/* scenarios: stories in which a loop or a connection went wrong once, each driven step by step. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "_link.h"
#include "_loop.h"

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

static const uint64_t SECOND = 1000000000;

static void fail(const char *what, int line)
{
    fprintf(stderr, "scenarios.c:%d: does not hold: %s (errno %d)\n", line, what, errno);
    abort();
}

static void nap(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* ---- a loop, turned by hand; its one method is S.M ---- */

static struct mprpc_services *services;

static int listening(int *port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);

    MUST(bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 100) == 0);
    MUST(getsockname(fd, (struct sockaddr *)&a, &size) == 0);
    *port = ntohs(a.sin_port);
    return fd;
}

static struct mprpc_loop *loop_at(int *port, uint64_t frame_timeout)
{
    struct mprpc_limits limits = {.frame_timeout = frame_timeout, .payload_max = 64 << 20, .output_max = 64 << 20,
                                  .connections_max = 100};
    struct mprpc_loop *l = mprpc_loop_new(services, &limits, 0);

    MUST(l && mprpc_loop_listen(l, listening(port), &l, 1) == 0);
    return l;
}

static int dial(int port)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                            .sin_port = htons((uint16_t)port)};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    MUST(connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
    return fd;
}

static void *put_request(struct mprpc_bytes *to, uint64_t id, size_t payload, uint32_t timeout_ms)
{
    uint8_t names[16], head[MPRPC_CALL_ROOM + 16];
    size_t n = mprpc_put_names(names, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1);

    n = mprpc_put_call(head, names, (uint32_t)n, (uint32_t)payload, id, timeout_ms, 0);
    MUST(mprpc_bytes_add(to, head, n) == 0 && mprpc_bytes_reserve(to, payload) == 0);
    if (payload)
        memset(to->at + to->size, 'x', payload);
    to->size += payload;
    return to->at;
}

/* One turn; the last one's requests are answered with nothing. */
static size_t turn(struct mprpc_loop *l, size_t last)
{
    static const int32_t sizes[MPRPC_BATCH_MAX];
    struct mprpc_incident incidents[MPRPC_INCIDENTS_MAX];
    uint64_t more;
    int64_t n = mprpc_loop_turn(l, (const uint8_t *)"", 0, sizes, last);

    MUST(n >= 0);
    if (n & MPRPC_TURN_SLOW)
        mprpc_loop_incidents(l, incidents, &more);
    return (size_t)(n & MPRPC_TURN_COUNT);
}

struct stream {
    int fd;
    struct mprpc_bytes bytes;
};

static void *write_all(void *stream)
{
    struct stream *s = stream;

    for (size_t at = 0; at < s->bytes.size;) {
        ssize_t n = send(s->fd, s->bytes.at + at, s->bytes.size - at, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        at += (size_t)n;
    }
    return NULL;
}

static void *read_all(void *stream)
{
    struct stream *s = stream;
    static uint8_t drop[65536];

    while (recv(s->fd, drop, sizeof drop, 0) > 0)
        continue;
    return NULL;
}

/* Requests that expire while they wait were each counted as holding their buffer until the next turn, which had room
 * for 256 of them; and with a megabyte behind a large request, every 64 small ones cost a copy of the rest. */
static void many_requests_expire_behind_a_large_one(void)
{
    enum { SMALL = 60000 };
    int port;
    struct mprpc_loop *l = loop_at(&port, 10 * SECOND);
    struct stream s = {.fd = dial(port)};
    struct mprpc_loop_statistics seen = {0};
    pthread_t writer, reader;
    size_t last = 0;

    put_request(&s.bytes, 1, 3000000, 0);
    for (uint64_t i = 2; i < 2 + SMALL; i++)
        put_request(&s.bytes, i, 0, i + 1 < 2 + SMALL); /* the last has no deadline, so its turn comes */
    MUST(pthread_create(&writer, NULL, write_all, &s) == 0 && pthread_create(&reader, NULL, read_all, &s) == 0);
    do {
        nap(seen.requests ? 2 : 10); /* longer than their deadlines; at first, until all buffers are full */
        last = turn(l, last);
        mprpc_loop_statistics(l, &seen);
    } while (seen.requests < 1 + SMALL);
    MUST(seen.broken == 0);
    shutdown(s.fd, SHUT_RDWR);
    pthread_join(writer, NULL);
    pthread_join(reader, NULL);
    close(s.fd);
    mprpc_loop_free(l);
    mprpc_bytes_free(&s.bytes);
}

/* A frame whose second half lay in the kernel was said to make no progress: the loop had been busy with other
 * connections' requests for longer than frame_timeout and its next turn was full again. */
static void a_busy_loop_blames_nobody(void)
{
    enum { BUSY = 4, EACH = 300 };
    int port, busy[BUSY];
    struct mprpc_loop *l = loop_at(&port, SECOND / 20);
    struct stream victim = {.fd = dial(port)}, flood = {0};
    struct mprpc_loop_statistics seen;
    uint64_t answered = 0;
    size_t last = 0;

    put_request(&victim.bytes, 1, 100, 0);
    put_request(&flood.bytes, 1, 0, 0);
    for (int i = 0; i < BUSY; i++)
        MUST(send(busy[i] = dial(port), flood.bytes.at, flood.bytes.size, 0) == (ssize_t)flood.bytes.size);
    MUST(send(victim.fd, victim.bytes.at, 50, 0) == 50);
    for (nap(20); answered < BUSY; answered += last)
        last = turn(l, last); /* all are accepted, and half a frame has been read */
    for (uint64_t id = 2; id < 2 + EACH; id++)
        put_request(&flood.bytes, id, 0, 0);
    size_t first = flood.bytes.size / (EACH + 1) / 2;
    while (first < flood.bytes.size && flood.bytes.at[first] != 0x0a)
        first++;
    first -= MPRPC_PREFIX;
    for (int i = 0; i < BUSY; i++)
        MUST(send(busy[i], flood.bytes.at + first, flood.bytes.size - first, 0) > 0);
    nap(20);
    last = turn(l, last); /* full of the others' requests */
    MUST(last == MPRPC_BATCH_MAX);
    MUST(send(victim.fd, victim.bytes.at + 50, victim.bytes.size - 50, 0) > 0);
    nap(80);
    for (answered += last; answered < BUSY + BUSY * EACH + 1; answered += last) {
        last = turn(l, last);
        mprpc_loop_statistics(l, &seen);
        MUST(seen.broken == 0);
    }
    for (int i = 0; i < BUSY; i++)
        close(busy[i]);
    close(victim.fd);
    mprpc_loop_free(l);
    mprpc_bytes_free(&victim.bytes);
    mprpc_bytes_free(&flood.bytes);
}

/* A connection for a loop that had stopped stayed counted there, and among max_connections. */
static void a_stopped_loop_has_no_connections(void)
{
    struct mprpc_limits limits = {.frame_timeout = SECOND, .payload_max = 1000, .output_max = 1000,
                                  .connections_max = 9};
    int port, listener = listening(&port);
    struct mprpc_loop *loops[] = {mprpc_loop_new(services, &limits, 0), mprpc_loop_new(services, &limits, 0)};
    struct mprpc_loop_statistics seen;
    uint8_t drop;

    MUST(loops[0] && loops[1] && mprpc_loop_listen(loops[0], listener, loops, 2) == 0);
    mprpc_loop_stop(loops[1], 0, 0);
    MUST(mprpc_loop_turn(loops[1], NULL, 0, NULL, 0) == MPRPC_TURN_STOPPED);
    int first = dial(port), second = dial(port); /* one for each loop */
    mprpc_loop_stop(loops[0], SECOND / 5, SECOND / 10);
    MUST(mprpc_loop_turn(loops[0], NULL, 0, NULL, 0) == MPRPC_TURN_STOPPED);
    MUST(recv(first, &drop, 1, 0) < 0 && recv(second, &drop, 1, 0) < 0); /* neither ever showed what it is: reset */
    for (int i = 0; i < 2; i++) {
        mprpc_loop_statistics(loops[i], &seen);
        MUST(seen.connections == 0);
        mprpc_loop_free(loops[i]);
    }
    close(first);
    close(second);
}

/* Two connections on one loop, and another loop that has none: one goes there after its next answer, which it has
 * got; unless that loop leaves, where nobody would tell it, or one of its calls is under way. */
static void a_connection_goes_where_it_is_served(int leaves)
{
    struct mprpc_limits limits = {.frame_timeout = SECOND, .payload_max = 1000, .output_max = 1000,
                                  .connections_max = 9};
    int port;
    struct mprpc_loop *loops[] = {mprpc_loop_new(services, &limits, 0), mprpc_loop_new(services, &limits, 0)};
    struct mprpc_placement placement;
    struct mprpc_loop_statistics seen[2];
    struct mprpc_bytes one = {0}, two = {0};
    uint8_t answer[64];

    mprpc_placement_init(&placement, 2);
    MUST(loops[0] && loops[1] && mprpc_loop_place(loops, 2, &placement) == 0);
    MUST(mprpc_loop_listen(loops[0], listening(&port), loops, 2) == 0);
    atomic_store(&placement.active, 1);
    int first = dial(port), second = dial(port);
    put_request(&two, 1, 0, 0);
    put_request(&two, 2, 0, 0);
    put_request(&one, 3, 0, 0);
    MUST(send(first, two.at, two.size, 0) > 0);
    MUST(turn(loops[0], 0) == 2);
    atomic_store(&placement.active, 2);
    if (leaves)
        mprpc_loop_stop(loops[1], 0, 0);
    struct mprpc_ticket later;
    mprpc_loop_detach(loops[0], 1, &later);
    MUST(send(second, one.at, one.size, 0) > 0);
    MUST(turn(loops[0], 1) == 1); /* the first has one answer, and a call under way */
    mprpc_loop_statistics(loops[0], &seen[0]);
    MUST(seen[0].moved == 0 && recv(first, answer, sizeof answer, 0) > 0);
    MUST(mprpc_loop_answer(loops[0], &later, 0, 0, NULL, 0, NULL, 0, NULL, 0) == 0);
    mprpc_loop_turn_within(loops[0], (const uint8_t *)"", 0, (const int32_t[]){0}, 1, SECOND / 50);
    MUST(recv(first, answer, sizeof answer, 0) > 0 && recv(second, answer, sizeof answer, 0) > 0);
    mprpc_loop_statistics(loops[0], &seen[0]);
    mprpc_loop_statistics(loops[1], &seen[1]);
    MUST(seen[0].moved == !leaves && seen[0].connections == 1 + (unsigned)leaves && seen[1].connections == !leaves);
    one.size = 0;
    put_request(&one, 4, 0, 0);
    MUST(send(first, one.at, one.size, 0) > 0 && send(second, one.at, one.size, 0) > 0);
    for (int i = 0; i < 2 - leaves; i++)
        MUST(turn(loops[i], 0) == 1 + (unsigned)leaves && mprpc_loop_turn_within(loops[i], (const uint8_t *)"", 0,
             (const int32_t[]){0, 0}, 1 + (unsigned)leaves, SECOND / 50) == 0);
    MUST(recv(first, answer, sizeof answer, 0) > 0 && recv(second, answer, sizeof answer, 0) > 0);
    for (int i = 0; i < 2; i++) {
        mprpc_loop_stop(loops[i], 0, 0);
        MUST(mprpc_loop_turn(loops[i], NULL, 0, NULL, 0) == MPRPC_TURN_STOPPED);
        mprpc_loop_free(loops[i]);
    }
    mprpc_bytes_free(&one);
    mprpc_bytes_free(&two);
    close(first);
    close(second);
}

/* A request that a gate refuses, and half of another one behind it: its answer, given while the rest was being read,
 * handed the connection on without the half. */
static void a_connection_that_is_being_read_stays(void)
{
    struct mprpc_limits limits = {.frame_timeout = SECOND, .payload_max = 1000, .output_max = 1000,
                                  .connections_max = 9, .input_max = 100000};
    int port;
    struct mprpc_loop *loops[] = {mprpc_loop_new(services, &limits, 0), mprpc_loop_new(services, &limits, 0)};
    struct mprpc_placement placement;
    struct mprpc_loop_statistics seen[2];
    struct mprpc_bytes bytes = {0};
    uint8_t answer[256];

    mprpc_placement_init(&placement, 2);
    MUST(loops[0] && loops[1] && mprpc_loop_place(loops, 2, &placement) == 0);
    MUST(mprpc_loop_listen(loops[0], listening(&port), loops, 2) == 0);
    MUST(mprpc_loop_gates(loops[0], (const uint8_t[]){0}, 1, 1, 0, SECOND) == 0);
    atomic_store(&placement.active, 1);
    int first = dial(port), second = dial(port);
    put_request(&bytes, 1, 0, 0);
    size_t whole = bytes.size;
    put_request(&bytes, 2, 100, 0);
    mprpc_loop_turn_within(loops[0], NULL, 0, NULL, 0, SECOND / 50);
    atomic_store(&placement.active, 2);
    MUST(send(first, bytes.at, whole + 50, 0) > 0);
    mprpc_loop_turn_within(loops[0], NULL, 0, NULL, 0, SECOND / 50);
    MUST(recv(first, answer, sizeof answer, 0) > 0);
    MUST(send(first, bytes.at + whole + 50, bytes.size - whole - 50, 0) > 0);
    for (int i = 0; i < 2; i++) {
        mprpc_loop_turn_within(loops[i], NULL, 0, NULL, 0, SECOND / 50);
        mprpc_loop_statistics(loops[i], &seen[i]);
    }
    MUST(seen[0].broken == 0 && seen[1].broken == 0 && seen[0].requests + seen[1].requests == 2);
    MUST(recv(first, answer, sizeof answer, MSG_DONTWAIT) > 0);
    for (int i = 0; i < 2; i++) {
        mprpc_loop_stop(loops[i], 0, 0);
        MUST(mprpc_loop_turn(loops[i], NULL, 0, NULL, 0) == MPRPC_TURN_STOPPED);
        mprpc_loop_free(loops[i]);
    }
    mprpc_bytes_free(&bytes);
    close(first);
    close(second);
}

/* A crowd that had sent rubbish all at once was looked at before the request of one that behaved. */
static void who_has_called_comes_before_strangers(void)
{
    enum { STRANGERS = 90 };
    static const int32_t none;
    int port, strangers[STRANGERS];
    struct mprpc_loop *l = loop_at(&port, SECOND);
    struct mprpc_loop_statistics seen;
    struct mprpc_bytes one = {0};
    uint8_t answer[64];
    int known = dial(port);

    put_request(&one, 1, 0, 0);
    MUST(send(known, one.at, one.size, 0) > 0 && turn(l, 0) == 1);
    for (int i = 0; i < STRANGERS; i++)
        strangers[i] = dial(port);
    mprpc_loop_turn_within(l, (const uint8_t *)"", 0, &none, 1, SECOND / 50);
    MUST(recv(known, answer, sizeof answer, 0) > 0);
    do
        mprpc_loop_statistics(l, &seen);
    while (seen.connections <= STRANGERS && mprpc_loop_turn_within(l, NULL, 0, NULL, 0, SECOND / 50) == 0);
    MUST(seen.connections == STRANGERS + 1);
    for (int i = 0; i < STRANGERS; i++)
        MUST(send(strangers[i], "\xff\xff\xff\xff", 4, 0) == 4);
    one.size = 0;
    put_request(&one, 2, 0, 0);
    MUST(send(known, one.at, one.size, 0) > 0 && turn(l, 0) == 1);
    mprpc_loop_statistics(l, &seen);
    MUST(seen.broken > 0 && seen.broken < STRANGERS);
    for (size_t last = 1; seen.broken < STRANGERS; last = 0) {
        MUST(turn(l, last) == 0);
        mprpc_loop_statistics(l, &seen);
    }
    MUST(recv(known, answer, sizeof answer, 0) > 0);
    mprpc_loop_free(l);
    mprpc_bytes_free(&one);
    for (int i = 0; i < STRANGERS; i++)
        close(strangers[i]);
    close(known);
}

/* ---- a connection whose other end is this program ---- */

struct caller {
    struct mprpc_link *link;
    size_t size;
    uint64_t timeout;
    struct mprpc_flag *cancelled;
    int64_t outcome;
    pthread_t thread;
};

static void *call(void *caller)
{
    struct caller *c = caller;
    struct mprpc_call *made = calloc(1, sizeof *made);
    uint8_t names[16], *payload = calloc(1, c->size + 1);
    size_t n = mprpc_put_names(names, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1);

    MUST(made && payload && (made->small = malloc(MPRPC_CALL_SMALL)));
    c->outcome = mprpc_link_call(c->link, made, names, n, payload, c->size, c->timeout, 0, c->cancelled);
    while (c->outcome == MPRPC_CALL_INTERRUPTED) /* twice a second, which a slow machine takes here */
        c->outcome = mprpc_link_wait(c->link, made);
    mprpc_call_clear(made);
    free(made->small);
    free(made);
    free(payload);
    return NULL;
}

static void start(struct caller *c, struct mprpc_link *k, size_t size, uint64_t timeout)
{
    c->link = k;
    c->size = size;
    c->timeout = timeout;
    c->cancelled = NULL;
    MUST(pthread_create(&c->thread, NULL, call, c) == 0);
}

/* Reads until that many requests have come; those from `answer` on are answered. 0 after two seconds of nothing. */
static int serve(int fd, uint64_t requests, uint64_t answer)
{
    struct mprpc_bytes in = {0}, out = {0};
    struct mprpc_session s;
    struct mprpc_event event;
    uint64_t seen = 0;
    ssize_t n = 1;
    size_t count;

    mprpc_session_init(&s, services, 64 << 20, 0);
    while (seen < requests && n > 0) {
        struct pollfd p = {fd, POLLIN, 0};
        MUST(mprpc_bytes_reserve(&in, 1 << 20) == 0);
        n = poll(&p, 1, 2000) > 0 ? recv(fd, in.at + in.size, in.room - in.size, 0) : 0;
        in.size += (size_t)n;
        do {
            uint8_t head[MPRPC_REPLY_ROOM];
            int64_t used = mprpc_session_receive(&s, in.at, in.size, 0, &event, 1, &count, &out);
            MUST(used >= 0);
            struct mprpc_reply r = {.call_id = count ? event.frame.call_id : 0};
            mprpc_bytes_drop(&in, (size_t)used);
            seen += count;
            if (count && seen >= answer) {
                size_t size = (size_t)mprpc_session_reply(&s, &r, head);
                MUST(send(fd, head, size, MSG_NOSIGNAL) == (ssize_t)size);
            }
        } while (count && in.size);
    }
    mprpc_session_free(&s);
    mprpc_bytes_free(&in);
    mprpc_bytes_free(&out);
    return seen == requests;
}

/* A deadline passed in the middle of a large frame while another caller waited in recv and a third slept: the rest of
 * the frame stayed where it was, and everybody's requests behind it. */
static void the_rest_of_a_frame_follows_its_callers_deadline(int others)
{
    int ends[2];
    struct caller reader, writer, sleeper;

    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    struct mprpc_link *k = mprpc_link_new(ends[0], 64 << 20);
    start(&reader, k, 10, 10 * SECOND);
    nap(50); /* it has written, and reads */
    start(&writer, k, 4000000, SECOND / 5);
    nap(50); /* it has begun to write */
    if (others)
        start(&sleeper, k, 10, 10 * SECOND);
    pthread_join(writer.thread, NULL);
    MUST(writer.outcome == MPRPC_CALL_TIMEOUT);
    MUST(serve(ends[1], others ? 3 : 2, others ? 3 : 2));
    if (others) {
        pthread_join(sleeper.thread, NULL);
        MUST(sleeper.outcome == 0);
    }
    mprpc_link_close(k);
    pthread_join(reader.thread, NULL);
    MUST(reader.outcome == MPRPC_CALL_BROKEN);
    mprpc_link_free(k);
    close(ends[1]);
}

/* GOAWAY came in one piece with the answer to a request that it says was not taken. The call ended twice: a mail's
 * memory was used after it was freed, and a caller's end took everybody else off the list, to wait for ever. */
static void goaway_and_an_answer_in_one_piece(int mail)
{
    static const uint8_t both[] = "\x04\0\0\0\x20\x01\x28\x05" "\x08\0\0\0\x20\x02\x28\x01\x38\x0e\x60\x01";
    static const uint8_t first[] = "\x04\0\0\0\x20\x01\x28\x01";
    struct caller accepted, late;
    struct mprpc_mail *mails = NULL;
    uint8_t names[16], *bytes;
    size_t size, n = mprpc_put_names(names, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1);
    int64_t reason;
    int ends[2];

    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    struct mprpc_link *k = mprpc_link_new(ends[0], 64 << 20);
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    MUST(k && box);
    mprpc_link_attach(k, box, 0);
    start(&accepted, k, 10, 5 * SECOND);
    nap(50);
    if (mail)
        MUST(mprpc_link_submit(k, 7, names, n, names, 4, 5 * SECOND, 0, 0, &reason) == 2);
    else
        start(&late, k, 10, 5 * SECOND);
    nap(50);
    MUST(send(ends[1], both, sizeof both - 1, 0) == sizeof both - 1);
    nap(50);
    if (mail)
        MUST(send(ends[1], first, sizeof first - 1, 0) == sizeof first - 1);
    else
        shutdown(ends[1], SHUT_RDWR);
    pthread_join(accepted.thread, NULL);
    MUST(accepted.outcome == (mail ? 0 : MPRPC_CALL_BROKEN));
    if (mail) {
        MUST(mprpc_mailbox_wait(box, SECOND) == 1 && mprpc_mailbox_take(box, &mails, &bytes, &size) == 1);
        MUST(mails[0].token == 7 && mails[0].outcome == MPRPC_CALL_FAILED && mails[0].not_run);
    } else {
        pthread_join(late.thread, NULL);
        MUST(late.outcome == MPRPC_CALL_FAILED);
    }
    mprpc_link_close(k);
    mprpc_link_free(k);
    mprpc_mailbox_free(box);
    close(ends[1]);
}

struct pusher {
    struct mprpc_link *link;
    int calls;
    pthread_t thread;
};

static void *push(void *pusher)
{
    struct pusher *p = pusher;

    for (int i = 0; i < p->calls; i++) {
        struct caller c = {.link = p->link, .size = 500000, .timeout = 20 * SECOND};
        call(&c);
        MUST(c.outcome == 0);
    }
    return NULL;
}

static void *serve_all(void *end)
{
    int *fd = end;
    MUST(serve(fd[0], (uint64_t)fd[1], 0));
    return NULL;
}

/* With always somebody's frame unwritten, what had been written was never let go: the connection grew for ever. */
static void what_is_written_is_let_go(void)
{
    enum { PUSHERS = 6, CALLS = 40 };
    int ends[2];
    struct pusher pushers[PUSHERS];
    pthread_t server;

    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    struct mprpc_link *k = mprpc_link_new(ends[0], 64 << 20);
    int task[2] = {ends[1], PUSHERS * CALLS};
    MUST(pthread_create(&server, NULL, serve_all, task) == 0);
    size_t most = 0;
    for (int i = 0; i < PUSHERS; i++) {
        pushers[i] = (struct pusher){k, CALLS, 0};
        MUST(pthread_create(&pushers[i].thread, NULL, push, &pushers[i]) == 0);
    }
    for (int done = 0; !done; nap(1)) {
        pthread_mutex_lock(&k->mutex);
        most = k->out.room > most ? k->out.room : most;
        done = k->session.last_id == PUSHERS * CALLS && !k->first;
        pthread_mutex_unlock(&k->mutex);
    }
    for (int i = 0; i < PUSHERS; i++)
        pthread_join(pushers[i].thread, NULL);
    pthread_join(server, NULL);
    mprpc_link_free(k);
    close(ends[1]);
    printf("the output's room was %zu bytes at most\n", most);
    MUST(most <= 16u << 20); /* every caller's frame twice, rounded up to a power of two */
}

/* Two callers wait, one of them reads; each is cancelled, and the provider hears of both; a third one is before it has
 * begun, and nothing of it is sent. */
static void a_waiting_call_is_cancelled(void)
{
    int ends[2];
    struct mprpc_flag flags[3] = {0};
    struct caller callers[3];

    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    struct mprpc_link *k = mprpc_link_new(ends[0], 64 << 20);
    for (int i = 0; i < 3; i++) {
        callers[i] = (struct caller){k, 4, 60 * SECOND, &flags[i], 0, 0};
        if (i == 2)
            MUST(mprpc_link_cancel_call(NULL, &flags[2]) == 0);
        MUST(pthread_create(&callers[i].thread, NULL, call, &callers[i]) == 0);
        for (int waits = i == 2; !waits; nap(1)) { /* the first one reads, the second one sleeps */
            pthread_mutex_lock(&k->mutex);
            waits = i == 0 ? k->reading : k->first && k->first->after && k->first->after->asleep;
            pthread_mutex_unlock(&k->mutex);
        }
    }
    pthread_join(callers[2].thread, NULL);
    for (int i = 0; i < 2; i++) {
        MUST(mprpc_link_cancel_call(k, &flags[i]) == 1);
        pthread_join(callers[i].thread, NULL);
    }
    for (int i = 0; i < 3; i++)
        MUST(callers[i].outcome == MPRPC_CALL_CANCELLED && mprpc_link_cancel_call(k, &flags[i]) == 0);
    MUST(serve(ends[1], 4, 5)); /* two requests, two CANCELs */
    mprpc_link_free(k);
    close(ends[1]);
}

int main(int argc, char **argv)
{
    int which = argc > 1 ? atoi(argv[1]) : -1;

    MUST((services = mprpc_services_new()) != NULL);
    MUST(mprpc_services_add(services, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1, 0) == 0);
    if (which < 0 || which == 0)
        many_requests_expire_behind_a_large_one();
    if (which < 0 || which == 1)
        a_busy_loop_blames_nobody();
    if (which < 0 || which == 7)
        a_stopped_loop_has_no_connections();
    if (which < 0 || which == 9)
        a_connection_goes_where_it_is_served(0);
    if (which < 0 || which == 10)
        a_connection_goes_where_it_is_served(1);
    if (which < 0 || which == 11)
        a_connection_that_is_being_read_stays();
    if (which < 0 || which == 12)
        who_has_called_comes_before_strangers();
    if (which < 0 || which == 2)
        the_rest_of_a_frame_follows_its_callers_deadline(1);
    if (which < 0 || which == 3)
        the_rest_of_a_frame_follows_its_callers_deadline(0);
    if (which < 0 || which == 4)
        what_is_written_is_let_go();
    if (which < 0 || which == 5)
        goaway_and_an_answer_in_one_piece(0);
    if (which < 0 || which == 6)
        goaway_and_an_answer_in_one_piece(1);
    if (which < 0 || which == 8)
        a_waiting_call_is_cancelled();
    mprpc_services_free(services);
    return 0;
}
