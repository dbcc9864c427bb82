/* Connections from random sources of IPv4, one after the other, each of which must be refused. For namespaces where every address is local. */
#include "load.h"

#include <netinet/in.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24
#endif

static uint64_t state = 88172645463325252u;

/* Any address that can be a source: not of this network, loopback, multicast or reserved. */
static uint32_t somewhere(void) {
    for (;;) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        uint32_t address = (uint32_t)(state >> 16), first = address >> 24;
        if (first != 0 && first != 127 && first < 224) return address;
    }
}

int strangers(struct sockaddr_in target) {
    struct turn turn;
    struct result result;
    int one = 1;
    printf("{\"ready\": true}\n");
    fflush(stdout);
    while (next_turn(&turn)) {
        memset(&result, 0, sizeof result);
        uint64_t began = now_ns(), deadline = began + (uint64_t)(turn.seconds * 1e9);
        for (uint64_t now = began; now < deadline && result.units < turn.max_units;) {
            struct sockaddr_in source = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(somewhere())};
            int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
            if (fd < 0) die("socket");
            setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
            if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0) die("bind: this is for a namespace where all addresses are local");
            if (connect(fd, (struct sockaddr *)&target, sizeof target) < 0 && errno == ECONNREFUSED) result.units++;
            else result.errors++;
            close(fd);
            uint64_t then = now_ns();
            record(&result.latency, then - now);
            now = then;
        }
        result.elapsed_ns = now_ns() - began;
        print_result(&result);
    }
    return 0;
}
