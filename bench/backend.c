/* The protected service of the benchmark: echoes, swallows or produces, as the first byte of a connection asks. */
#include "load.h"

#include <sys/epoll.h>
#include <sys/resource.h>

struct connection {
    char mode;             /* 0 until the first byte */
    char paused;           /* waits for EPOLLOUT */
    char ended;            /* the peer's FIN was read: close once everything is sent */
    uint32_t counted;      /* sink: bytes since the last acknowledgement */
    uint64_t owed;         /* source: bytes still to send */
    uint32_t from, until;  /* echo: what of buffer is still to send */
    char *buffer;
};

static struct connection *connections;
static char shared[1 << 18];
static int poller;

static void watch(int fd, struct connection *c, int paused) {
    struct epoll_event event = {.events = paused ? EPOLLOUT : EPOLLIN, .data.fd = fd};
    if (c->paused == paused) return;
    c->paused = (char)paused;
    epoll_ctl(poller, EPOLL_CTL_MOD, fd, &event);
}

static void end(int fd, struct connection *c) {
    free(c->buffer);
    memset(c, 0, sizeof *c);
    close(fd);
}

/* Sends what is owed; false when the connection broke. */
static int flush_owed(int fd, struct connection *c) {
    while (c->until > c->from) {
        ssize_t sent = send(fd, c->buffer + c->from, c->until - c->from, MSG_NOSIGNAL);
        if (sent < 0) return errno == EAGAIN ? (watch(fd, c, 1), 1) : 0;
        c->from += (uint32_t)sent;
    }
    for (int budget = 8; c->owed > 0 && budget > 0; budget--) {
        ssize_t sent = send(fd, shared, c->owed < sizeof shared ? c->owed : sizeof shared, MSG_NOSIGNAL);
        if (sent < 0) return errno == EAGAIN ? (watch(fd, c, 1), 1) : 0;
        c->owed -= (uint64_t)sent;
    }
    watch(fd, c, c->owed > 0);
    return c->owed > 0 || !c->ended;
}

static int echo(int fd, struct connection *c, const char *data, size_t length) {
    ssize_t sent = send(fd, data, length, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) return 0;
    if (sent < 0) sent = 0;
    if ((size_t)sent == length) return 1;
    if (c->buffer == NULL) c->buffer = malloc(sizeof shared);
    c->from = 0;
    c->until = (uint32_t)(length - (size_t)sent);
    memcpy(c->buffer, data + sent, c->until);
    watch(fd, c, 1);
    return 1;
}

/* Handles what arrived; false when the connection is over. */
static int readable(int fd, struct connection *c) {
    if (c->mode == MODE_SINK) {
        /* MSG_TRUNC discards without copying. */
        ssize_t got = recv(fd, NULL, CHUNK - c->counted, MSG_TRUNC | MSG_DONTWAIT);
        if (got < 0) return errno == EAGAIN;
        c->counted += (uint32_t)got;
        if (c->counted == CHUNK) {
            c->counted = 0;
            return send(fd, "", 1, MSG_NOSIGNAL) == 1;
        }
        return got > 0;
    }
    ssize_t got = recv(fd, shared, c->mode == MODE_SOURCE ? 64 : sizeof shared, 0);
    if (got < 0) return errno == EAGAIN;
    if (got == 0) {
        c->ended = 1;
        return c->owed > 0;
    }
    if (c->mode == 0) {
        c->mode = shared[0] == MODE_SINK || shared[0] == MODE_SOURCE ? shared[0] : 'E';
        if (c->mode == MODE_SINK) {
            c->counted = (uint32_t)got - 1;
            return 1;
        }
        if (c->mode == MODE_SOURCE) got--;
    }
    if (c->mode == MODE_SOURCE) {
        c->owed += (uint64_t)got * CHUNK;
        return flush_owed(fd, c);
    }
    return echo(fd, c, shared, (size_t)got);
}

static void accept_some(int listener) {
    for (int budget = 64; budget > 0; budget--) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        /* The byte is usually there already. */
        if (!readable(fd, &connections[fd])) {
            end(fd, &connections[fd]);
            continue;
        }
        struct epoll_event event = {.events = connections[fd].paused ? EPOLLOUT : EPOLLIN, .data.fd = fd};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

#define BATCH 64

static void echo_datagrams(int fd) {
    static char buffers[BATCH][2048];
    static struct sockaddr_in addresses[BATCH];
    static struct iovec vectors[BATCH];
    static struct mmsghdr messages[BATCH];
    for (int i = 0; i < BATCH; i++) {
        vectors[i] = (struct iovec){buffers[i], sizeof buffers[i]};
        messages[i].msg_hdr = (struct msghdr){.msg_name = &addresses[i], .msg_namelen = sizeof addresses[i], .msg_iov = &vectors[i], .msg_iovlen = 1};
    }
    int got = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
    for (int i = 0; i < got; i++) vectors[i].iov_len = messages[i].msg_len;
    for (int sent = 0; sent < got;) {
        int count = sendmmsg(fd, messages + sent, (unsigned)(got - sent), 0);
        sent += count > 0 ? count : 1; /* one that cannot be sent is lost, and counted by who waits for it */
    }
}

static int open_socket(int type, const char *host, const char *port) {
    char text[80];
    snprintf(text, sizeof text, "%s:%s", host, port);
    struct sockaddr_in address = loopback(text);
    int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), bytes = 16 << 20;
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die("bind");
    if (type == SOCK_STREAM && listen(fd, 4096) < 0) die("listen");
    /* The backend must not be what loses datagrams; beyond rmem_max only where that is allowed. */
    if (type == SOCK_DGRAM && setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    return fd;
}

int backend(const char *host, const char *tcp_port, const char *udp_port) {
    struct rlimit files;
    struct epoll_event events[256];
    getrlimit(RLIMIT_NOFILE, &files);
    connections = calloc(files.rlim_cur < 200000 ? files.rlim_cur : 200000, sizeof *connections);
    poller = epoll_create1(EPOLL_CLOEXEC);
    int tcp = open_socket(SOCK_STREAM, host, tcp_port), udp = open_socket(SOCK_DGRAM, host, udp_port);
    epoll_ctl(poller, EPOLL_CTL_ADD, tcp, &(struct epoll_event){.events = EPOLLIN, .data.fd = tcp});
    epoll_ctl(poller, EPOLL_CTL_ADD, udp, &(struct epoll_event){.events = EPOLLIN, .data.fd = udp});
    printf("{\"ready\": true}\n");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(poller, events, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == tcp) accept_some(fd);
            else if (fd == udp) echo_datagrams(fd);
            else {
                struct connection *c = &connections[fd];
                if (!(c->paused ? flush_owed(fd, c) : readable(fd, c))) end(fd, c);
            }
        }
    }
}
