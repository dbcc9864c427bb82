/* TCP clients: new connections, round trips and bulk on open ones, refusals, idle sessions. Never more than asked for. */
#include "load.h"

#include <netinet/tcp.h>
#include <sys/epoll.h>

#define DRAIN_NS 2000000000u /* how long what is under way may take to end after a turn */

struct client {
    int fd;
    int waiting;              /* round trip and connect-close: a reply is outstanding */
    uint32_t got;             /* bytes of that reply so far */
    uint32_t interest;
    uint64_t started;         /* round trip and connect-close: when */
    uint64_t asked, answered; /* bulk: pieces begun, pieces done */
    uint64_t to_send, received;
    uint64_t since[WINDOW];   /* bulk: when each piece under way began */
};

static struct client *all;
static struct result result;
static struct sockaddr_in target;
static unsigned count, size;
static int poller;
static uint64_t deadline, max_units, begun;
static int turned_away; /* someone has no connection and will not be told when to try again */
static char payload[1 << 18], scratch[1 << 18];

static int open_turn(void) { return begun < max_units && now_ns() < deadline; }

static void want(struct client *c, uint32_t interest) {
    struct epoll_event event = {.events = interest, .data.u32 = (uint32_t)(c - all)};
    if (c->interest == interest) return;
    if (epoll_ctl(poller, c->interest ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, c->fd, &event) < 0) die("epoll_ctl");
    c->interest = interest;
}

/* Over loopback the handshake is done when a blocking connect returns, at the price of no extra event. */
static int dial(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    if (connect(fd, (struct sockaddr *)&target, sizeof target) == 0) return fd;
    if (errno != ECONNREFUSED && errno != ECONNRESET && errno != ETIMEDOUT) die("connect");
    close(fd);
    return -1;
}

static void hang_up(struct client *c) {
    close(c->fd);
    c->fd = -1;
    c->interest = 0;
    c->waiting = 0;
}

/* Dials for `refused` and `connect-close`. A client that cannot get on is counted and tries again with the next event. */
static void fresh(struct client *c, int speak) {
    for (int tries = 0; tries < 16 && open_turn(); tries++) {
        c->started = now_ns();
        begun++;
        c->fd = dial();
        if (c->fd >= 0 && (!speak || send(c->fd, payload, size, MSG_NOSIGNAL) == (ssize_t)size)) {
            c->waiting = 1;
            c->got = 0;
            want(c, EPOLLIN);
            return;
        }
        if (c->fd >= 0) hang_up(c);
        if (speak) {
            result.errors++;
        } else { /* refused at the handshake: what a kernel that refuses looks like */
            result.units++;
            record(&result.latency, now_ns() - c->started);
        }
    }
    turned_away = 1;
}

static void connect_close(struct client *c) {
    ssize_t got = recv(c->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    c->got += got > 0 ? (uint32_t)got : 0;
    if (got > 0 && c->got < size) return;
    if (got > 0) {
        result.units++;
        record(&result.latency, now_ns() - c->started);
    } else {
        result.errors++;
    }
    hang_up(c);
    fresh(c, 1);
}

static void refused(struct client *c) {
    ssize_t got = recv(c->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        result.units++;
        record(&result.latency, now_ns() - c->started);
    } else {
        result.errors++;
    }
    hang_up(c);
    fresh(c, 0);
}

static void ask(struct client *c) {
    if (c->fd < 0 || !open_turn()) return;
    begun++;
    c->started = now_ns();
    c->got = 0;
    if (send(c->fd, payload, size, MSG_NOSIGNAL) == (ssize_t)size) c->waiting = 1;
    else result.errors++;
}

static void round_trip(struct client *c) {
    ssize_t got = recv(c->fd, scratch, sizeof scratch, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) { /* a connection that should live was ended: it stays away */
        result.errors++;
        hang_up(c);
        return;
    }
    c->got += (uint32_t)got;
    if (c->got < size) return;
    c->waiting = 0;
    result.units++;
    record(&result.latency, now_ns() - c->started);
    ask(c);
}

/* Bulk. `up` sends pieces and reads one byte for each, `down` the reverse, `both` sends pieces and reads them back. */
static char direction;

static void bulk(struct client *c, uint32_t events) {
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        ssize_t got = recv(c->fd, scratch, sizeof scratch, direction == 'U' ? MSG_DONTWAIT : MSG_DONTWAIT | MSG_TRUNC);
        if (got == 0 || (got < 0 && errno != EAGAIN)) {
            result.errors++;
            hang_up(c);
            return;
        }
        c->received += got > 0 ? (uint64_t)got : 0;
        if (direction != 'U' && got > 0) result.units += (uint64_t)got;
        for (uint64_t piece = direction == 'U' ? 1 : CHUNK; c->received >= piece; c->received -= piece)
            record(&result.latency, now_ns() - c->since[c->answered++ % WINDOW]);
    }
    while (c->asked - c->answered < WINDOW && open_turn()) {
        c->since[c->asked++ % WINDOW] = now_ns();
        c->to_send += direction == 'D' ? 1 : CHUNK;
        begun += CHUNK;
    }
    if (c->to_send > 0) {
        ssize_t sent = send(c->fd, payload, c->to_send < sizeof payload ? c->to_send : sizeof payload, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) c->to_send -= (uint64_t)sent;
        if (sent > 0 && direction != 'D') result.units += (uint64_t)sent;
    }
    want(c, c->to_send > 0 ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

static int busy(const struct client *c) { return c->fd >= 0 && (c->waiting || c->asked > c->answered); }

static void start(char kind) {
    for (unsigned i = 0; i < count; i++) {
        struct client *c = &all[i];
        if (kind == 'c' || kind == 'r') fresh(c, kind == 'c');
        else if (kind == 't') ask(c);
        else if (c->fd >= 0) bulk(c, 0);
    }
}

static void run(char kind) {
    struct epoll_event events[256];
    uint64_t began = now_ns();
    start(kind);
    for (;;) {
        uint64_t now = now_ns();
        unsigned under_way = 0;
        if (now >= deadline || begun >= max_units) { /* only at the end: it costs a walk over all clients */
            for (unsigned i = 0; i < count; i++) under_way += (unsigned)busy(&all[i]);
            if (under_way == 0) break;
            if (now >= deadline + DRAIN_NS) {
                result.lost += under_way;
                break;
            }
        }
        int ready = epoll_wait(poller, events, 256, turned_away && open_turn() ? 0 : 20);
        for (int i = 0; i < ready; i++) {
            struct client *c = &all[events[i].data.u32];
            if (c->fd < 0) continue;
            if (kind == 'c') connect_close(c);
            else if (kind == 'r') refused(c);
            else if (kind == 't') round_trip(c);
            else bulk(c, events[i].events);
        }
        if (turned_away) {
            turned_away = 0;
            for (unsigned i = 0; i < count; i++)
                if (all[i].fd < 0 && (kind == 'c' || kind == 'r')) fresh(&all[i], kind == 'c');
        }
    }
    result.elapsed_ns = now_ns() - began;
    if (kind == 'c' || kind == 'r')
        for (unsigned i = 0; i < count; i++)
            if (all[i].fd >= 0) hang_up(&all[i]);
}

/* One connection that stands: for bulk its first byte says what the backend shall do, else an echo proves the way through. */
static void stand(struct client *c, char first) {
    int one = 1;
    char byte = first ? first : 'E';
    c->fd = dial();
    if (c->fd < 0) die("a connection that must stand was refused");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (send(c->fd, &byte, 1, MSG_NOSIGNAL) != 1) die("send");
    if (first == 0 && recv(c->fd, &byte, 1, 0) != 1) die("no echo");
}

int tcp_clients(const char *mode, struct sockaddr_in address, unsigned clients, unsigned bytes) {
    char kind = strcmp(mode, "connect-close") == 0 ? 'c' : strcmp(mode, "refused") == 0 ? 'r' : strcmp(mode, "round-trip") == 0 ? 't'
              : strcmp(mode, "idle") == 0          ? 'i' : strcmp(mode, "up") == 0      ? 'U' : strcmp(mode, "down") == 0       ? 'D'
              : strcmp(mode, "both") == 0          ? 'B' : 0;
    struct turn turn;
    if (kind == 0) {
        fprintf(stderr, "load: unknown mode %s\n", mode);
        return 2;
    }
    target = address;
    count = clients;
    size = bytes;
    direction = kind;
    memset(payload, 'x', sizeof payload);
    all = calloc(count, sizeof *all);
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (unsigned i = 0; i < count; i++) {
        all[i].fd = -1;
        if (kind == 'c' || kind == 'r') continue;
        stand(&all[i], kind == 'U' || kind == 'D' ? kind : 0);
        if (kind != 'i') want(&all[i], EPOLLIN);
    }
    printf("{\"ready\": true}\n");
    fflush(stdout);
    while (next_turn(&turn)) {
        memset(&result, 0, sizeof result);
        begun = 0;
        max_units = turn.max_units;
        deadline = now_ns() + (uint64_t)(turn.seconds * 1e9);
        if (kind != 'i') run(kind);
        print_result(&result);
    }
    return 0;
}
