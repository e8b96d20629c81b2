/* Open-loop load: Poisson arrivals at a rate, latency from the moment a request was due.

   poisson HOST PORT PATH RATE SECONDS SEED CONNECTIONS WAIT_S BODIES

   BODIES holds one JSON body a line; they are sent in turn. A request that finds no idle connection
   waits for one, and its wait counts (no coordinated omission). WAIT_S after the last arrival what
   is open is given up. Prints a line for each request: due (s), latency (ms), status; status 0: no
   answer. Knows HTTP/1.1 with Content-Length or chunks, numeric addresses, and nothing else. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 4096, ROOM = 1 << 16 };

typedef struct {
    int fd, request; /* request: index of the one under way, -1: idle */
    size_t have;
    char answer[ROOM];
} Connection;

static struct sockaddr_in where;
static Connection *connections;
static int *idle, idles, poll_fd;
static char **texts;
static size_t *lengths;
static int bodies;
static double *due, *took;
static int *status;
static long arrived, sent, closed, planned;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static double uniform(uint64_t *state) { /* xorshift64*, in (0, 1] */
    *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
    return ((*state * 0x2545F4914F6CDD1DULL >> 11) + 1) * (1.0 / 9007199254740992.0);
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void open_one(Connection *c) {
    int yes = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0) fail("socket");
    c->have = 0, c->request = -1;
    if (connect(c->fd, (struct sockaddr *)&where, sizeof where)) {
        close(c->fd), c->fd = -1; /* tried again with the next request */
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event)) fail("epoll_ctl");
}

static void end(Connection *c, double at, int code, int keep) {
    if (c->request >= 0) took[c->request] = at, status[c->request] = code, closed++, idle[idles++] = c - connections;
    c->request = -1, c->have = 0;
    if (!keep && c->fd >= 0) close(c->fd), c->fd = -1;
}

static void start(double at) {
    while (idles && sent < arrived) {
        Connection *c = connections + idle[--idles];
        if (c->fd < 0) open_one(c);
        c->request = sent++;
        int body = c->request % bodies;
        if (c->fd < 0 || send(c->fd, texts[body], lengths[body], MSG_NOSIGNAL | MSG_DONTWAIT) != (ssize_t)lengths[body])
            end(c, at, 0, 0);
    }
}

static void take(Connection *c) {
    ssize_t got = recv(c->fd, c->answer + c->have, ROOM - 1 - c->have, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0 || c->have + got >= ROOM - 1) {
        end(c, now(), 0, 0);
        return;
    }
    c->have += got, c->answer[c->have] = 0;
    char *head = strstr(c->answer, "\r\n\r\n");
    if (!head) return;
    head[0] = 0;
    char *length = strcasestr(c->answer, "\r\ncontent-length:"), *stay = strcasestr(c->answer, "\r\nconnection: close");
    size_t before = head + 4 - c->answer;
    int whole = length ? c->have >= before + atol(length + 17) : !strcmp(c->answer + c->have - 5, "0\r\n\r\n");
    int code = atoi(c->answer + 9), keep = !stay;
    head[0] = '\r';
    if (whole) end(c, now(), code, keep);
}

static void read_bodies(const char *file, const char *host, const char *path) {
    FILE *in = fopen(file, "r");
    char *line = NULL;
    size_t size = 0;
    ssize_t length;
    if (!in) fail(file);
    while ((length = getline(&line, &size, in)) > 1) {
        line[--length] = 0;
        texts = realloc(texts, (bodies + 1) * sizeof *texts);
        lengths = realloc(lengths, (bodies + 1) * sizeof *lengths);
        lengths[bodies] = asprintf(&texts[bodies],
            "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %zd\r\n\r\n%s",
            path, host, length, line);
        bodies++;
    }
    if (!bodies) fail("no bodies");
}

int main(int count, char **words) {
    if (count != 10) return fprintf(stderr, "poisson HOST PORT PATH RATE SECONDS SEED CONNECTIONS WAIT_S BODIES\n"), 2;
    double rate = atof(words[4]), seconds = atof(words[5]), wait_s = atof(words[8]), last = 0;
    uint64_t state = strtoull(words[6], NULL, 10) * 2654435761u + 88172645463325252ULL;
    int most = atoi(words[7]);
    if (most < 1 || most > MOST || rate <= 0) return 2;
    where.sin_family = AF_INET, where.sin_port = htons(atoi(words[2]));
    if (!inet_aton(words[1], &where.sin_addr)) return 2;
    read_bodies(words[9], words[1], words[3]);
    long room = rate * seconds + 10 * sqrt(rate * seconds) + 100;
    due = calloc(room, sizeof *due), took = calloc(room, sizeof *took), status = calloc(room, sizeof *status);
    while (planned < room && (last -= log(uniform(&state)) / rate) < seconds) due[planned++] = last;
    connections = calloc(most, sizeof *connections), idle = calloc(most, sizeof *idle);
    poll_fd = epoll_create1(0);
    for (int at = 0; at < most; at++) open_one(connections + at), idle[idles++] = most - 1 - at;
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event ring = {.events = EPOLLIN, .data.ptr = NULL}, events[256];
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, timer, &ring);
    double begin = now() + 0.1, finish = begin + seconds + wait_s;
    for (double t = now(); closed < planned && t < finish; t = now()) {
        while (arrived < planned && begin + due[arrived] <= t) arrived++;
        start(t);
        double next = arrived < planned ? begin + due[arrived] : finish;
        struct itimerspec until = {.it_value = {(time_t)next, (long)((next - floor(next)) * 1e9)}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &until, NULL);
        int ready = epoll_wait(poll_fd, events, 256, 1000);
        for (int at = 0; at < ready; at++) {
            uint64_t rings;
            if (events[at].data.ptr) take(events[at].data.ptr);
            else if (read(timer, &rings, sizeof rings) < 0 && errno != EAGAIN) fail("timer");
        }
    }
    for (long at = 0; at < planned; at++)
        printf("%.6f %.4f %d\n", due[at], status[at] ? (took[at] - begin - due[at]) * 1e3 : -1.0, status[at]);
    return 0;
}
