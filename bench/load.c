/*
 * Load generator and echo backend of the benchmark; bench/native.py compiles and drives it.
 *
 *   load backend HOST TCP_PORT UDP_PORT     TCP and UDP echo
 *   load MODE HOST:PORT CLIENTS [SIZE]      connect-close | round-trip | up | down | both | refused | idle | udp | strangers
 *
 * Each prints {"ready": true}, a generator once its connections stand. For a generator each line "SECONDS MAX_UNITS" on stdin is then
 * one turn, answered by one JSON line when everything under way has ended; connections stay open between turns. It ends with stdin.
 */
#include "load.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>

int next_turn(struct turn *turn) {
    char line[128];
    if (fgets(line, sizeof line, stdin) == NULL) return 0;
    turn->max_units = UINT64_MAX;
    if (sscanf(line, "%lf %lu", &turn->seconds, &turn->max_units) < 1 || turn->seconds <= 0 || turn->seconds > 60) {
        fprintf(stderr, "load: a turn is SECONDS (at most 60) [MAX_UNITS]\n");
        exit(2);
    }
    return 1;
}

void print_result(const struct result *r) {
    printf("{\"units\": %lu, \"seconds\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"lost\": %lu, \"errors\": %lu}\n", r->units,
           (double)r->elapsed_ns / 1e9, quantile_us(&r->latency, 0.5), quantile_us(&r->latency, 0.99), r->lost, r->errors);
    fflush(stdout);
}

int main(int argc, char **argv) {
    struct rlimit files;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* never outlive the benchmark */
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    if (argc == 5 && strcmp(argv[1], "backend") == 0) return backend(argv[2], argv[3], argv[4]);
    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: load backend HOST TCP_PORT UDP_PORT | load MODE HOST:PORT CLIENTS [SIZE]\n");
        return 2;
    }
    struct sockaddr_in target = loopback(argv[2]);
    unsigned clients = (unsigned)atoi(argv[3]), size = argc == 5 ? (unsigned)atoi(argv[4]) : 1;
    if (clients < 1 || clients > 50000 || size < 1 || size > 1400) {
        fprintf(stderr, "load: 1 to 50000 clients and 1 to 1400 bytes\n");
        return 2;
    }
    if (strcmp(argv[1], "strangers") == 0) return strangers(target);
    return strcmp(argv[1], "udp") == 0 ? udp_clients(target, clients, size) : tcp_clients(argv[1], target, clients, size);
}
