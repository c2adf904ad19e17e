/* Strategy: everything that can be seen of a session is written into one log; two ways of feeding it must give the same
 * log. The codec's results are checked against the input they point into. */
#define _GNU_SOURCE
#include "oracle.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_session.h"

enum { LIMIT = 100, CALLS = 40, MANY = 32, IN_FLIGHT = 6 };
enum { FRAGMENT = 63, DRAINS = 64, FRAMED_ONLY = 128 }; /* how a session is fed */

#define MUST(property) ((property) ? (void)0 : fail(#property, __LINE__))

static void fail(const char *property, int line)
{
    fprintf(stderr, "oracle.c:%d: does not hold: %s\n", line, property);
    abort();
}

/* The same bytes, ending at an unmapped page. Valid until the next call. */
static const uint8_t *at_the_end(const uint8_t *bytes, size_t size)
{
    static uint8_t *end;

    MUST(size <= ORACLE_MAX);
    if (!end) {
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        uint8_t *room = mmap(NULL, ORACLE_MAX + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        MUST(room != MAP_FAILED && mprotect(room + ORACLE_MAX, page, PROT_NONE) == 0);
        end = room + ORACLE_MAX;
    }
    if (size)
        memcpy(end - size, bytes, size);
    return end - size;
}

/* ---- the codec ---- */

static void within(const uint8_t *at, size_t size, const uint8_t *bytes, size_t all)
{
    MUST(size == 0 || (at >= bytes && at + size <= bytes + all));
}

static void check_frame(const struct mprpc_frame *f, const uint8_t *bytes, size_t size)
{
    within(f->header, f->header_size, bytes, size);
    within(f->service, f->service_size, f->header, f->header_size);
    within(f->method, f->method_size, f->header, f->header_size);
    within(f->error_text, f->error_text_size, f->header, f->header_size);
    within(f->error_details, f->error_details_size, f->header, f->header_size);
    MUST(f->header_size <= MPRPC_HEADER_MAX && f->not_run <= 1);
    if (f->payload) {
        MUST(f->payload == f->header + f->header_size && f->payload_size <= LIMIT);
        within(f->payload, f->payload_size, bytes, size);
    } else {
        MUST(f->payload_size > LIMIT);
    }
}

void oracle_codec(const uint8_t *from, size_t size)
{
    const uint8_t *bytes = at_the_end(from, size);
    struct mprpc_frame many[MANY], one;
    size_t count, single, at = 0;
    uint64_t need, need_one;
    int64_t used = mprpc_split(bytes, size, LIMIT, many, MANY, &count, &need);

    MUST(used >= MPRPC_BAD_LENGTH && used <= (int64_t)size && (used > 0) == (count > 0) && need >= MPRPC_PREFIX);
    if (used == 0)
        MUST(need > size && need <= (uint64_t)MPRPC_PREFIX + MPRPC_HEADER_MAX + LIMIT);
    for (size_t i = 0; i < count; i++) {
        check_frame(&many[i], bytes, size);
        int64_t n = mprpc_split(bytes + at, size - at, LIMIT, &one, 1, &single, &need_one);
        MUST(n > 0 && single == 1 && memcmp(&one, &many[i], sizeof one) == 0);
        MUST(many[i].header == bytes + at + MPRPC_PREFIX && (many[i].payload || i + 1 == count));
        at += (size_t)n;
        MUST(mprpc_split(bytes, at - 1, LIMIT, many, i + 1, &single, &need_one) >= 0 && single == i);
    }
    MUST(used < 0 || at == (size_t)used);
}

/* ---- the session ---- */

static const struct mprpc_services *services(void)
{
    static struct mprpc_services *made;

    if (!made) {
        made = mprpc_services_new();
        MUST(made && mprpc_services_add(made, (const uint8_t *)"a.S", 3, (const uint8_t *)"M", 1, 0) == 0);
        MUST(mprpc_services_add(made, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1, 1) == 0);
    }
    return made;
}

struct driver {
    struct mprpc_session session;
    struct mprpc_bytes kept, out, log;
    _Atomic uint64_t counts[MPRPC_REASONS];
    int64_t why;
};

static void note(struct driver *d, const void *at, size_t size)
{
    MUST(mprpc_bytes_add(&d->log, at, size) == 0);
}

static void note_event(struct driver *d, const struct mprpc_event *e, const uint8_t *bytes, size_t size)
{
    const struct mprpc_frame *f = &e->frame;
    uint32_t numbers[] = {f->kind, f->payload_size, f->timeout_ms, f->compression, f->attempt, f->metadata_count,
                          (uint32_t)f->status, f->not_run, f->error_text_size, f->payload != NULL};

    note(d, numbers, sizeof numbers);
    note(d, &f->call_id, sizeof f->call_id);
    note(d, f->service, f->service_size);
    note(d, f->method, f->method_size);
    note(d, f->error_text, f->error_text_size);
    note(d, f->error_details, f->error_details_size);
    if (f->payload) {
        within(f->payload, f->payload_size, bytes, size);
        note(d, f->payload, f->payload_size);
    }
    if (f->kind == MPRPC_REQUEST) {
        MUST(d->session.services && f->payload && e->method <= 1);
        note(d, &e->deadline, sizeof e->deadline);
        note(d, &e->method, sizeof e->method);
    } else if (f->kind == MPRPC_RESPONSE) {
        MUST(e->tag == 1000 + f->call_id);
    } else {
        MUST(d->session.services ? f->kind == MPRPC_CANCEL : f->kind == MPRPC_PONG || f->kind == MPRPC_GOAWAY);
    }
}

/* The whole of what is kept, until nothing more is done with it. */
static void turn(struct driver *d, size_t room)
{
    struct mprpc_event events[MANY];
    size_t count;
    int64_t used;

    do {
        const uint8_t *bytes = at_the_end(d->kept.at, d->kept.size);
        used = mprpc_session_receive(&d->session, bytes, d->kept.size, 1000, events, room, &count, &d->out);
        MUST(used <= (int64_t)d->kept.size && count <= room && (used > 0 || count == 0));
        for (size_t i = 0; i < count; i++)
            note_event(d, &events[i], bytes, d->kept.size);
        if (used > 0)
            mprpc_bytes_drop(&d->kept, (size_t)used);
    } while (used > 0);
    d->why = used;
}

static void feed(struct driver *d, int server, const uint8_t *bytes, size_t size, size_t fragment, size_t room,
                 unsigned how)
{
    memset(d, 0, sizeof *d);
    mprpc_session_init(&d->session, server ? services() : NULL, LIMIT, !(how & FRAMED_ONLY));
    d->session.draining = server && (how & DRAINS);
    d->session.counts = d->counts;
    d->session.calls_max = server ? IN_FLIGHT : 0;
    for (uint64_t i = 1; !server && i <= CALLS; i++)
        MUST(mprpc_session_call(&d->session, 1000 + i) == i);
    for (size_t at = 0, n; at < size && d->why == 0; at += n) {
        n = fragment < size - at ? fragment : size - at;
        MUST(mprpc_bytes_add(&d->kept, bytes + at, n) == 0);
        if (d->kept.size >= d->session.need) /* as the loop does: it does not look before */
            turn(d, room);
    }
    uint32_t numbers[] = {d->session.strays, d->session.in_flight, d->session.dialect, d->session.gone};
    MUST(!d->session.calls_max || d->session.in_flight <= d->session.calls_max);
    MUST(d->counts[-MPRPC_STRAY] == d->session.strays);
    note(d, numbers, sizeof numbers);
    note(d, &d->session.last_id, sizeof d->session.last_id);
    note(d, &d->why, sizeof d->why);
}

/* What can be done with a server's session after its input: a cancelled request, answers, GOAWAY. */
static void finish(struct driver *d, const uint8_t *bytes, size_t size)
{
    uint8_t to[MPRPC_REPLY_ROOM + ORACLE_MAX];
    size_t text = size < ORACLE_MAX / 2 ? size : ORACLE_MAX / 2;

    if (d->session.services && d->session.in_flight > 1)
        mprpc_session_unaccept(&d->session);
    while (d->session.services && d->session.in_flight) {
        struct mprpc_reply r = {.call_id = d->session.last_id, .status = 13,
                                .text = at_the_end(bytes, text), .text_size = (uint32_t)text};
        int64_t n = mprpc_session_reply(&d->session, &r, to);
        MUST(n == MPRPC_NO_CLASSIC || (n > 0 && n <= MPRPC_REPLY_ROOM + MPRPC_ERROR_TEXT_MAX));
    }
    MUST(mprpc_session_drain(&d->session, &d->out) == 0);
    mprpc_session_free(&d->session);
    mprpc_bytes_free(&d->kept);
    mprpc_bytes_free(&d->out);
    mprpc_bytes_free(&d->log);
}

static int same(const struct mprpc_bytes *a, const struct mprpc_bytes *b)
{
    return a->size == b->size && (a->size == 0 || memcmp(a->at, b->at, a->size) == 0);
}

void oracle_session(const uint8_t *bytes, size_t size, unsigned how)
{
    size_t fragment = how & FRAGMENT ? how & FRAGMENT : 1;

    for (int server = 0; server < 2; server++) {
        struct driver whole, parts;
        feed(&whole, server, bytes, size, size ? size : 1, MANY, how);
        feed(&parts, server, bytes, size, fragment, 1 + fragment % 5, how);
        MUST(same(&whole.log, &parts.log));
        MUST(same(&whole.out, &parts.out));
        finish(&whole, bytes, size);
        finish(&parts, bytes, size);
    }
}

/* ---- a client and a provider ---- */

enum { OPEN = 32 }; /* calls at a time, and requests */

struct end {
    struct mprpc_session session;
    struct mprpc_bytes sent, come; /* under way to the other side; come, and not used yet */
};

struct pair {
    struct end client, server;
    uint64_t calls[OPEN]; /* call_ids, in flight for the client; 0: free */
    uint64_t requests[OPEN]; /* accepted and not answered; their payload is their call_id */
    uint64_t pings, pongs, last;
};

static size_t place(const uint64_t *ids, uint64_t id)
{
    for (size_t i = 0; i < OPEN; i++)
        if (ids[i] == id)
            return i;
    return OPEN;
}

/* The nth that is not free. */
static size_t nth(const uint64_t *ids, size_t n)
{
    for (size_t i = 0; i < OPEN; i++)
        if (ids[i] && n-- == 0)
            return i;
    return OPEN;
}

static void put_frame(struct end *e, struct mprpc_reply *r, const void *payload)
{
    uint8_t head[MPRPC_REPLY_ROOM];

    MUST(mprpc_bytes_add(&e->sent, head, mprpc_put_reply(head, r)) == 0);
    MUST(mprpc_bytes_add(&e->sent, payload, r->payload_size) == 0);
}

static void call(struct pair *p, uint8_t method)
{
    uint8_t names[32], head[MPRPC_CALL_ROOM + sizeof names];
    size_t at = place(p->calls, 0);
    const uint8_t *served = (const uint8_t *)(method % 8 == 7 ? "X" : "M");
    size_t names_size = mprpc_put_names(names, (const uint8_t *)"a.S", 3, served, 1);

    if (at == OPEN || p->client.session.gone)
        return;
    uint64_t id = mprpc_session_call(&p->client.session, 2000 + at);
    MUST(id > p->last);
    p->last = p->calls[at] = id;
    size_t n = mprpc_put_call(head, names, (uint32_t)names_size, sizeof id, id, method, method % 3);
    MUST(mprpc_bytes_add(&p->client.sent, head, n) == 0 && mprpc_bytes_add(&p->client.sent, &id, sizeof id) == 0);
}

static void give_up(struct pair *p, size_t n)
{
    size_t at = nth(p->calls, n);

    if (at == OPEN)
        return;
    struct mprpc_reply cancel = {.kind = MPRPC_CANCEL, .call_id = p->calls[at]};
    MUST(mprpc_session_forget(&p->client.session, p->calls[at]));
    MUST(!mprpc_session_forget(&p->client.session, p->calls[at]));
    p->calls[at] = 0;
    put_frame(&p->client, &cancel, NULL);
}

static void answer(struct pair *p, size_t n, int32_t status)
{
    uint8_t head[MPRPC_REPLY_ROOM];
    size_t at = nth(p->requests, n);

    if (at == OPEN)
        return;
    uint64_t id = p->requests[at];
    struct mprpc_reply r = {.call_id = id, .status = status, .payload_size = status ? 0 : sizeof id};
    int64_t size = mprpc_session_reply(&p->server.session, &r, head);
    MUST(size > 0);
    MUST(mprpc_bytes_add(&p->server.sent, head, (size_t)size) == 0);
    MUST(mprpc_bytes_add(&p->server.sent, &id, r.payload_size) == 0);
    p->requests[at] = 0;
}

static void ping(struct pair *p, struct end *from)
{
    struct mprpc_reply r = {.kind = MPRPC_PING, .call_id = ++p->pings, .payload_size = sizeof p->pings};

    put_frame(from, &r, &p->pings);
}

static void on_server(struct pair *p, const struct mprpc_event *e)
{
    const struct mprpc_frame *f = &e->frame;
    size_t at = place(p->requests, f->call_id);

    if (f->kind == MPRPC_CANCEL) {
        if (at == OPEN)
            return; /* answered already */
        mprpc_session_unaccept(&p->server.session);
        p->requests[at] = 0;
        return;
    }
    MUST(f->kind == MPRPC_REQUEST && at == OPEN && !p->server.session.draining);
    MUST(f->payload_size == 8 && !memcmp(f->payload, &f->call_id, 8));
    at = place(p->requests, 0);
    if (at < OPEN) {
        p->requests[at] = f->call_id;
        return;
    }
    p->requests[0] = p->requests[0] ? p->requests[0] : f->call_id;
    mprpc_session_unaccept(&p->server.session); /* more than this harness keeps */
}

static void on_client(struct pair *p, const struct mprpc_event *e)
{
    const struct mprpc_frame *f = &e->frame;

    if (f->kind == MPRPC_PONG) {
        MUST(f->payload_size == 8 && !memcmp(f->payload, &f->call_id, 8));
        p->pongs++;
    } else if (f->kind != MPRPC_GOAWAY) {
        size_t at = (size_t)e->tag - 2000;
        MUST(f->kind == MPRPC_RESPONSE && at < OPEN && p->calls[at] == f->call_id);
        MUST(f->status || (f->payload_size == 8 && !memcmp(f->payload, &f->call_id, 8)));
        p->calls[at] = 0;
    }
}

/* After all events of a receive: among them may be the answer to a call that GOAWAY says never ran. */
static void look_for_goaway(struct pair *p)
{
    for (size_t i = 0; p->client.session.gone && i < OPEN; i++)
        if (p->calls[i] > p->client.session.goaway_id) {
            MUST(mprpc_session_forget(&p->client.session, p->calls[i]));
            p->calls[i] = 0;
        }
}

/* The other side gets the first bytes of what is under way. */
static void carry(struct pair *p, int to_server, size_t size)
{
    struct end *from = to_server ? &p->client : &p->server, *to = to_server ? &p->server : &p->client;
    struct mprpc_event events[4];
    size_t count;
    int64_t used;

    size = size < from->sent.size ? size : from->sent.size;
    if (!size)
        return;
    MUST(mprpc_bytes_add(&to->come, from->sent.at, size) == 0);
    mprpc_bytes_drop(&from->sent, size);
    do {
        const uint8_t *bytes = at_the_end(to->come.at, to->come.size);
        used = mprpc_session_receive(&to->session, bytes, to->come.size, 1000, events, 4, &count, &to->sent);
        MUST(used >= 0);
        for (size_t i = 0; i < count; i++)
            to_server ? on_server(p, &events[i]) : on_client(p, &events[i]);
        look_for_goaway(p);
        mprpc_bytes_drop(&to->come, (size_t)used);
    } while (used > 0);
}

static void act(struct pair *p, uint8_t byte)
{
    size_t number = byte >> 3;

    switch (byte & 7) {
    case 0: call(p, (uint8_t)number); break;
    case 1: give_up(p, number); break;
    case 2: carry(p, 1, 1 + number * number); break;
    case 3: carry(p, 0, 1 + number * number); break;
    case 4: answer(p, number, 0); break;
    case 5: answer(p, number, 13); break;
    case 6: ping(p, number % 2 ? &p->server : &p->client); break;
    default:
        if (number == 31)
            MUST(mprpc_session_drain(&p->server.session, &p->server.sent) == 0);
        else
            carry(p, number % 2, SIZE_MAX);
    }
}

void oracle_pair(const uint8_t *bytes, size_t size)
{
    static struct pair p;

    memset(&p, 0, sizeof p);
    mprpc_session_init(&p.client.session, NULL, LIMIT, 0);
    mprpc_session_init(&p.server.session, services(), LIMIT, 1);
    for (size_t i = 0; i < size && p.client.sent.size + p.server.sent.size < ORACLE_MAX / 2; i++)
        act(&p, bytes[i]);
    do {
        carry(&p, 1, SIZE_MAX);
        while (nth(p.requests, 0) < OPEN)
            answer(&p, 0, 0);
        carry(&p, 0, SIZE_MAX);
    } while (p.client.sent.size || p.server.sent.size);
    MUST(nth(p.calls, 0) == OPEN && p.client.session.in_flight == 0 && p.server.session.in_flight == 0);
    MUST(p.client.come.size == 0 && p.server.come.size == 0);
    struct end *ends[] = {&p.client, &p.server};
    for (int i = 0; i < 2; i++) {
        mprpc_session_free(&ends[i]->session);
        mprpc_bytes_free(&ends[i]->sent);
        mprpc_bytes_free(&ends[i]->come);
    }
}
