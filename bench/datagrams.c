/* UDP clients: each has its own connected socket and one datagram under way; one without an answer in time is lost. */
#include "load.h"

#include <sys/epoll.h>

#define PATIENCE_NS 250000000u
#define WARM_UP_GROUP 16 /* first datagrams go out in groups this small: opening sessions is not what a turn measures */

struct client {
    int fd;
    int waiting;
    uint64_t number; /* the first 8 bytes of the datagram: an answer that comes too late is recognised */
    uint64_t sent_at;
};

static struct client *all;
static struct result result;
static unsigned count, size;
static int poller;
static uint64_t deadline, max_units, begun;

static int open_turn(uint64_t now) { return begun < max_units && now < deadline; }

static void ask(struct client *c, uint64_t now) {
    char datagram[1400] = {0};
    c->number++;
    memcpy(datagram, &c->number, sizeof c->number);
    c->sent_at = now;
    c->waiting = 1;
    begun++;
    if (send(c->fd, datagram, size, MSG_DONTWAIT) < 0) result.errors++; /* counted as lost when its time is up */
}

/* True when the answer to the outstanding datagram was read. */
static int answered(struct client *c) {
    char datagram[1500];
    uint64_t number;
    ssize_t got = recv(c->fd, datagram, sizeof datagram, MSG_DONTWAIT);
    if (got < (ssize_t)sizeof number) return 0;
    memcpy(&number, datagram, sizeof number);
    return c->waiting && number == c->number && (unsigned)got == size;
}

static void give_up(uint64_t now) {
    for (unsigned i = 0; i < count; i++) {
        struct client *c = &all[i];
        if (!c->waiting || now - c->sent_at < PATIENCE_NS) continue;
        c->waiting = 0;
        result.lost++;
        if (open_turn(now)) ask(c, now);
    }
}

static unsigned under_way(void) {
    unsigned waiting = 0;
    for (unsigned i = 0; i < count; i++) waiting += (unsigned)all[i].waiting;
    return waiting;
}

static void run(void) {
    struct epoll_event events[256];
    uint64_t began = now_ns(), now = began, checked = began;
    for (unsigned i = 0; i < count && open_turn(now); i++) ask(&all[i], now);
    for (;;) {
        int ready = epoll_wait(poller, events, 256, 10);
        now = now_ns();
        for (int i = 0; i < ready; i++) {
            struct client *c = &all[events[i].data.u32];
            if (!answered(c)) continue;
            now = now_ns();
            c->waiting = 0;
            result.units++;
            record(&result.latency, now - c->sent_at);
            if (open_turn(now)) ask(c, now);
        }
        if (now - checked > PATIENCE_NS / 10 || !open_turn(now)) {
            checked = now;
            give_up(now);
            if (!open_turn(now) && under_way() == 0) break;
        }
    }
    result.elapsed_ns = now - began;
}

static void warm_up(void) {
    for (unsigned first = 0; first < count; first += WARM_UP_GROUP) {
        unsigned last = first + WARM_UP_GROUP < count ? first + WARM_UP_GROUP : count;
        for (int tries = 0; tries < 20; tries++) {
            unsigned missing = 0;
            for (unsigned i = first; i < last; i++)
                if (tries == 0 || all[i].waiting) ask(&all[i], now_ns());
            for (int waits = 0; waits < 50; waits++) {
                missing = 0;
                for (unsigned i = first; i < last; i++) {
                    if (all[i].waiting && answered(&all[i])) all[i].waiting = 0;
                    missing += (unsigned)all[i].waiting;
                }
                if (missing == 0) break;
                usleep(1000);
            }
            if (missing == 0) break;
            if (tries == 19) {
                fprintf(stderr, "load: no answer to %u of the first datagrams\n", missing);
                exit(1);
            }
        }
    }
}

int udp_clients(struct sockaddr_in target, unsigned clients, unsigned bytes) {
    struct turn turn;
    count = clients;
    size = bytes < sizeof(uint64_t) ? sizeof(uint64_t) : bytes;
    all = calloc(count, sizeof *all);
    poller = epoll_create1(EPOLL_CLOEXEC);
    for (unsigned i = 0; i < count; i++) {
        all[i].fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        if (all[i].fd < 0 || connect(all[i].fd, (struct sockaddr *)&target, sizeof target) < 0) die("socket");
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};
        epoll_ctl(poller, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    warm_up();
    printf("{\"ready\": true}\n");
    fflush(stdout);
    while (next_turn(&turn)) {
        memset(&result, 0, sizeof result);
        begun = 0;
        max_units = turn.max_units;
        deadline = now_ns() + (uint64_t)(turn.seconds * 1e9);
        run();
        print_result(&result);
    }
    return 0;
}
