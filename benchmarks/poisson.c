/* An open-loop HTTP load generator: Poisson arrivals, no coordinated omission.
 *
 *   poisson RATE SECONDS SEED HOST PORT PATH BODIES MAX_CONNECTIONS DEADLINE_MS
 *
 * BODIES holds a JSON body a line, sent in turn. A request is due at its own time, whatever became
 * of those before it, and its latency counts from then: waiting for a free connection is included.
 * MAX_CONNECTIONS are opened before the first request is due, as a pool in use has them, and kept
 * alive; one that was closed is replaced when all others are busy. What is not answered within
 * DRAIN_S after the last one was due is an error. Each request says in X-Deadline-Ms for how long it
 * is of use, which a server may heed or not. Prints one line of JSON; `sent_late_p99_ms` is how late
 * a request was sent, which tells what of the others is this program's and the machine's own;
 * `refused_after_p99_ms` counts from when it was sent.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define DRAIN_S 5.0
#define POOL_S 0.3
#define ANSWER_BYTES 65536

typedef struct { double *at; size_t n, room; } Times;
typedef struct { char *bytes; size_t n; } Request;
typedef struct Connection {
  int fd, busy, connecting;
  double due, began;         /* when its request should have been sent, and when it was */
  const Request *request;
  size_t sent, got;
  char *answer;
  struct Connection *next;   /* in the list of idle ones */
} Connection;

static Times ok, refused, refused_after, late;
static long statuses[1000], errors, sent, answered;
static Connection *idle;
static int poller, opened, max_connections;
static struct sockaddr_in server;
static uint64_t state;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) { perror(what); exit(1); }

static double uniform(void) { /* xorshift64*, in (0, 1] */
  state ^= state >> 12; state ^= state << 25; state ^= state >> 27;
  return ((state * 2685821657736338717ULL >> 11) + 1) * 0x1p-53;
}

static void add(Times *times, double value) {
  if (times->n == times->room) {
    times->room = times->room ? times->room * 2 : 4096;
    if (!(times->at = realloc(times->at, times->room * sizeof(double)))) die("realloc");
  }
  times->at[times->n++] = value;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

/* The value that `share` of `of` values do not exceed; those that are missing are the longest. */
static void print_ms(const char *name, const Times *times, size_t of, double share) {
  size_t at = of ? (size_t)ceil(share * of) - 1 : 0;
  if (at < times->n) printf(", \"%s\": %.3f", name, times->at[at] * 1e3);
  else printf(", \"%s\": null", name);
}

static Request *read_bodies(const char *file, const char *host, const char *port, const char *path,
                            const char *deadline, size_t *count) {
  FILE *from = fopen(file, "r");
  Request *all = NULL;
  char *line = NULL;
  size_t room = 0;
  ssize_t n;
  if (!from) die(file);
  for (*count = 0; (n = getline(&line, &room, from)) > 0; ++*count) {
    while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) line[--n] = 0;
    if (!(all = realloc(all, (*count + 1) * sizeof *all))) die("realloc");
    int m = asprintf(&all[*count].bytes,
                     "POST %s HTTP/1.1\r\nHost: %s:%s\r\nContent-Type: application/json\r\n"
                     "X-Deadline-Ms: %s\r\nContent-Length: %zd\r\n\r\n%s",
                     path, host, port, deadline, n, line);
    if (m < 0) die("asprintf");
    all[*count].n = m;
  }
  fclose(from);
  if (!*count) { fprintf(stderr, "%s holds no bodies\n", file); exit(1); }
  return all;
}

static void watch(Connection *c, int how, uint32_t events) {
  struct epoll_event event = {.events = events, .data.ptr = c};
  if (epoll_ctl(poller, how, c->fd, &event)) die("epoll_ctl");
}

static void push(Connection *c) {
  c->busy = 0; c->request = NULL; c->next = idle; idle = c;
}

static void drop(Connection *c) {
  if (c->busy) { ++errors; ++answered; }
  else for (Connection **p = &idle; *p; p = &(*p)->next) if (*p == c) { *p = c->next; break; }
  close(c->fd);
  free(c->answer);
  free(c);
  --opened;
}

static Connection *dial(void) {
  int one = 1;
  Connection *c = calloc(1, sizeof *c);
  if (!c || !(c->answer = malloc(ANSWER_BYTES + 1))) die("malloc");
  if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) die("socket");
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (connect(c->fd, (struct sockaddr *)&server, sizeof server) && errno != EINPROGRESS) die("connect");
  ++opened;
  c->connecting = 1;
  watch(c, EPOLL_CTL_ADD, EPOLLOUT);
  return c;
}

static int push_bytes(Connection *c) { /* 0: the connection is broken */
  while (c->sent < c->request->n) {
    ssize_t n = send(c->fd, c->request->bytes + c->sent, c->request->n - c->sent, MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
      watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
      return 1;
    }
    if (n <= 0) return 0;
    c->sent += n;
  }
  return 1;
}

static void start(Connection *c, const Request *request, double due) {
  c->busy = 1; c->request = request; c->due = due; c->began = now(); c->sent = c->got = 0;
  add(&late, c->began - due);
  if (!c->connecting && !push_bytes(c)) drop(c);
}

/* Whether the answer is whole: 1; not yet: 0; nonsense: -1. */
static int whole(const Connection *c) {
  const char *end = strstr(c->answer, "\r\n\r\n"), *field;
  if (!end) return c->got >= ANSWER_BYTES ? -1 : 0;
  field = strcasestr(c->answer, "\r\ncontent-length:");
  if (field && field < end) return c->got >= (size_t)(end + 4 - c->answer) + strtoul(field + 17, NULL, 10);
  field = strcasestr(c->answer, "\r\ntransfer-encoding: chunked");
  if (field && field < end) return c->got > 7 && !memcmp(c->answer + c->got - 5, "0\r\n\r\n", 5);
  return -1;
}

static void receive(Connection *c) {
  ssize_t n = recv(c->fd, c->answer + c->got, ANSWER_BYTES - c->got, 0);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0 || !c->busy) { drop(c); return; }
  c->got += n;
  c->answer[c->got] = 0;
  int done = whole(c), status = 0;
  if (!done && c->got < ANSWER_BYTES) return;
  if (done != 1 || sscanf(c->answer, "HTTP/1.%*c %3d", &status) != 1 || status < 100) { drop(c); return; }
  ++statuses[status]; ++answered;
  if (status == 200) add(&ok, now() - c->due);
  if (status == 429) add(&refused, now() - c->due), add(&refused_after, now() - c->began);
  const char *close_it = strcasestr(c->answer, "\r\nconnection: close");
  push(c);
  if (close_it && close_it < strstr(c->answer, "\r\n\r\n")) drop(c);
}

static void on_event(Connection *c, uint32_t events) {
  if (events & EPOLLOUT) {
    int fault = 0;
    socklen_t size = sizeof fault;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &fault, &size);
    if (fault) { drop(c); return; }
    c->connecting = 0;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    if (!c->busy) push(c);
    else if (!push_bytes(c)) { drop(c); return; }
  }
  if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
}

static void open_pool(void) {
  struct epoll_event event;
  int open = 0;
  while (opened < max_connections) dial();
  while (open < max_connections && epoll_wait(poller, &event, 1, 1000) > 0) {
    on_event(event.data.ptr, event.events);
    ++open;
  }
  usleep(POOL_S * 1e6); /* the server may not have seen all of them yet */
}

int main(int n, char **word) {
  if (n != 10) {
    fprintf(stderr, "poisson RATE SECONDS SEED HOST PORT PATH BODIES MAX_CONNECTIONS DEADLINE_MS\n");
    return 2;
  }
  double rate = atof(word[1]), seconds = atof(word[2]);
  size_t bodies, head = 0;
  Request *requests = read_bodies(word[7], word[4], word[5], word[6], word[9], &bodies);
  Times due = {0};
  state = strtoull(word[3], NULL, 10) * 0x9E3779B97F4A7C15ULL + 1;
  max_connections = atoi(word[8]);
  server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(word[5]))};
  if (rate <= 0 || max_connections < 1 || inet_pton(AF_INET, word[4], &server.sin_addr) != 1) {
    fprintf(stderr, "RATE and MAX_CONNECTIONS must be above 0, HOST an IPv4 address\n");
    return 2;
  }
  for (int i = 0; i < 16; ++i) uniform();
  for (double t = -log(uniform()) / rate; t < seconds; t += -log(uniform()) / rate) add(&due, t);
  poller = epoll_create1(0);
  int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  struct epoll_event events[32], tick = {.events = EPOLLIN, .data.ptr = NULL};
  if (poller < 0 || timer < 0) die("epoll");
  open_pool();
  if (epoll_ctl(poller, EPOLL_CTL_ADD, timer, &tick)) die("epoll");
  double begin = now() + 0.05, end = begin + seconds + DRAIN_S;
  while ((head < due.n || answered < sent) && now() < end) {
    while (head < due.n && begin + due.at[head] <= now()) {
      Connection *c = idle;
      if (c) idle = c->next;
      else if (opened < max_connections) c = dial();
      else break; /* it is late already, and waits for a connection */
      start(c, &requests[head % bodies], begin + due.at[head]);
      ++sent; ++head;
    }
    double next = head < due.n ? begin + due.at[head] : end;
    if (next <= now()) next = now() + 0.001; /* connections are missing: an answer wakes us */
    struct itimerspec at = {.it_value = {(time_t)next, (long)((next - floor(next)) * 1e9)}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
    int ready = epoll_wait(poller, events, 32, 1000); /* a few: what is due must not wait for them */
    for (int i = 0; i < ready; ++i) {
      uint64_t ticks;
      if (events[i].data.ptr) on_event(events[i].data.ptr, events[i].events);
      else if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN) die("timer");
    }
  }
  qsort(ok.at, ok.n, sizeof(double), ascending);
  qsort(refused.at, refused.n, sizeof(double), ascending);
  qsort(refused_after.at, refused_after.n, sizeof(double), ascending);
  qsort(late.at, late.n, sizeof(double), ascending);
  printf("{\"rate\": %g, \"seconds\": %g, \"sent\": %zu, \"connections\": %d, \"errors\": %ld, \"statuses\": {",
         rate, seconds, due.n, opened, errors + (long)due.n - answered);
  for (int i = 0, some = 0; i < 1000; ++i)
    if (statuses[i]) printf("%s\"%d\": %ld", some++ ? ", " : "", i, statuses[i]);
  size_t in_time = 0;
  while (in_time < ok.n && ok.at[in_time] * 1e3 <= atof(word[9])) ++in_time;
  printf("}, \"in_time\": %zu", in_time);
  print_ms("p50_ms", &ok, ok.n, 0.5);
  print_ms("p99_ms", &ok, ok.n, 0.99);
  print_ms("p999_ms", &ok, ok.n, 0.999);
  print_ms("p99_all_ms", &ok, due.n, 0.99);
  print_ms("refused_p50_ms", &refused, refused.n, 0.5);
  print_ms("refused_p99_ms", &refused, refused.n, 0.99);
  print_ms("refused_after_p99_ms", &refused_after, refused_after.n, 0.99);
  print_ms("sent_late_p99_ms", &late, late.n, 0.99);
  printf("}\n");
  return 0;
}
