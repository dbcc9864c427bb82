/* What the load generator and the echo backend share. Linux only, no libraries, loopback only. */
#ifndef LOAD_H
#define LOAD_H

#define _GNU_SOURCE /* accept4, recvmmsg, sendmmsg */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK (1u << 20)   /* bulk traffic is asked for and acknowledged in pieces of 1 MiB */
#define WINDOW 4           /* pieces of one stream that may be under way */
#define MODE_SINK 'U'      /* first byte of a connection: swallow what follows, one byte back per piece */
#define MODE_SOURCE 'D'    /* first byte of a connection: each further byte asks for one piece */
                           /* any other first byte: echo everything, that byte too */

static inline void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static inline uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Latencies: 32 buckets for each power of two, so a quantile is right to 3 %. */
struct histogram {
    uint64_t count;
    uint32_t buckets[64 * 64];
};

static inline void record(struct histogram *h, uint64_t ns) {
    unsigned power = ns < 64 ? 0 : 63u - (unsigned)__builtin_clzll(ns) - 5u;
    h->buckets[power * 64u + (unsigned)(ns >> power)]++;
    h->count++;
}

/* The value below which the share q of all records lies, in microseconds; 0 without records. */
static inline double quantile_us(const struct histogram *h, double q) {
    uint64_t wanted = (uint64_t)(q * (double)h->count), seen = 0;
    if (h->count == 0) return 0;
    for (unsigned i = 0; i < 64 * 64; i++) {
        seen += h->buckets[i];
        if (seen > wanted) {
            unsigned power = i / 64, low = i % 64;
            return (double)((uint64_t)low << power) / 1000.0;
        }
    }
    return 0;
}

/* "127.x.y.z:port". Anything that is not loopback is refused: this program must never load a network. */
static inline struct sockaddr_in loopback(const char *text) {
    struct sockaddr_in address = {.sin_family = AF_INET};
    char host[64];
    unsigned port;
    if (sscanf(text, "%63[^:]:%u", host, &port) != 2 || port > 65535 || inet_pton(AF_INET, host, &address.sin_addr) != 1
        || ntohl(address.sin_addr.s_addr) >> 24 != 127) {
        fprintf(stderr, "load: %s is not 127.x.y.z:port\n", text);
        exit(2);
    }
    address.sin_port = htons((uint16_t)port);
    return address;
}

int backend(const char *host, const char *tcp_port, const char *udp_port);
int tcp_clients(const char *mode, struct sockaddr_in target, unsigned clients, unsigned size);
int udp_clients(struct sockaddr_in target, unsigned clients, unsigned size);
int strangers(struct sockaddr_in target);

/* One turn as the other side of the pipe asked for it: "SECONDS MAX_UNITS". False at end of file. */
struct turn {
    double seconds;
    uint64_t max_units;
};
int next_turn(struct turn *turn);

struct result {
    uint64_t units, lost, errors, elapsed_ns;
    struct histogram latency;
};
void print_result(const struct result *result);

#endif
