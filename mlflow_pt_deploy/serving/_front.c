/* Requests whose heads are known, read and refused by a thread that never holds the GIL.

   A connection is lent by the event loop, which has accepted it and answered a request on it. While
   it is lent, what comes on it is read here. A whole request whose head, byte by byte, is one that
   Python made known waits to be taken, and Python is told, though not before it wants to be; where
   too many wait already it is refused at once, with an answer that Python wrote. Whatever else
   comes (another head, part of a request, more than one, the end) is given back together with the
   connection. So there is no parser of HTTP in here, and nothing is decided but "one of those" and
   "too many".

   One mutex guards all that both sides touch; nobody waits for the GIL, or for the kernel, while he
   holds it. Linux only (epoll). What Python may call stands in _front.pyi. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MOST_READ = 32 * 1024,
    MOST_EVENTS = 256,
    MOST_HEADS = 1024,
    TABLE = 4 * MOST_HEADS,
    MOST_KINDS = 16,
    MOST_REFUSAL = 1024,
};
static const struct timespec NAP = {.tv_nsec = 250000};
static const uint64_t STOP = UINT64_MAX; /* no slot */

/* Told once of all that came; whoever does not read it then has to ask again. */
#define EVENT(slot) {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.u64 = (slot)}

/* What was read on a connection, and when; 0: the connection comes back with it. */
typedef struct {
    uint64_t connection;
    size_t at, length;
    double since;
} Item;

/* Items, and what was read, one after the other. */
typedef struct {
    double oldest; /* when the first request came; 0: a connection comes back */
    Item *items;
    size_t count, room;
    char *bytes;
    size_t used, size;
} Inbox;

typedef enum {
    FREE, /* not lent */
    IDLE, /* all requests are answered */
    BUSY, /* one waits for its answer */
    BACK, /* given back, not yet recalled */
} State;

typedef struct {
    uint64_t name; /* Python's */
    int fd;
    State state;
    bool reading; /* here, so that it must not be closed */
    bool sending; /* an answer, so that no refusal may come before it */
    bool again;   /* something came meanwhile */
    double heard; /* when the last request came */
    uint32_t slot;
    uint32_t next; /* free slot */
} Connection;

typedef struct {
    char *text; /* NULL: empty */
    size_t length, body;
    uint64_t hash;
    int kind;
} Head;

/* Requests that are refused together: how many may wait to be taken, and do so; how many may come
   until Python says anew, and have come; how many were refused. */
typedef struct {
    long room, waiting, most, came, refused;
    char *refusal;
    size_t length;
} Kind;

typedef struct {
    PyObject_HEAD
    pthread_t thread;
    pthread_mutex_t lock;
    bool running;
    bool told;   /* Python: that there is something to take */
    double hold; /* seconds for which it need not be told of a request */
    int epoll, bell, stop;
    Connection **connections; /* by slot; never freed before the end, events may still name them */
    uint32_t count, size, free;
    Head heads[TABLE];
    size_t known;
    Kind kinds[MOST_KINDS];
    Inbox inboxes[2];
    Inbox *inbox; /* the one that is filled; the other one is Python's */
    char buffer[MOST_READ];
} Front;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t hash_of(const char *text, size_t length) {
    uint64_t hash = length * 0x9E3779B97F4A7C15u, word;
    for (; length >= 8; text += 8, length -= 8) {
        memcpy(&word, text, 8);
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    word = 0;
    memcpy(&word, text, length);
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    return hash ^ (hash >> 32);
}

/* Where a head is, or would be. */
static Head *find(Front *self, const char *text, size_t length, uint64_t hash) {
    for (size_t at = hash % TABLE;; at = (at + 1) % TABLE) {
        Head *head = &self->heads[at];
        if (!head->text || (head->hash == hash && head->length == length &&
                            !memcmp(head->text, text, length)))
            return head;
    }
}

/* Whether there was memory for one more. */
static bool put(Inbox *inbox, uint64_t connection, const char *bytes, size_t length, double since) {
    if (inbox->count == inbox->room) {
        size_t room = inbox->room ? 2 * inbox->room : 256;
        Item *items = realloc(inbox->items, room * sizeof *items);
        if (!items)
            return false;
        inbox->items = items;
        inbox->room = room;
    }
    if (inbox->size - inbox->used < length) {
        size_t size = 2 * (inbox->size + length);
        char *more = realloc(inbox->bytes, size);
        if (!more)
            return false;
        inbox->bytes = more;
        inbox->size = size;
    }
    if (length)
        memcpy(inbox->bytes + inbox->used, bytes, length);
    if (!inbox->count || !since)
        inbox->oldest = since;
    inbox->items[inbox->count++] = (Item){connection, inbox->used, length, since};
    inbox->used += length;
    return true;
}

/* With the lock. */
static void give_back(Front *self, Connection *connection, const char *bytes, size_t length) {
    connection->state = BACK;
    /* Without memory what came is lost, and with it the connection's sense: it ends. */
    if (!put(self->inbox, connection->name, bytes, length, 0))
        shutdown(connection->fd, SHUT_RDWR);
}

/* Answer a request that there is no room for; whether its connection may go on. */
static bool refuse(Connection *connection, const char *refusal, size_t length) {
    ssize_t sent = send(connection->fd, refusal, length, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == (ssize_t)length)
        return true;
    shutdown(connection->fd, SHUT_RDWR); /* he does not read his answers */
    return false;
}

/* Read what has come on a connection, which is `over` if it will be all; the lock is held only
   where nothing is read or written. */
static void read_request(Front *self, uint64_t slot, bool over) {
    char *buffer = self->buffer, refusal[MOST_REFUSAL];
    pthread_mutex_lock(&self->lock);
    Connection *connection = self->connections[slot];
    if (connection->sending)
        connection->again = true;
    if (connection->state == FREE || connection->state == BACK || connection->sending) {
        pthread_mutex_unlock(&self->lock);
        return;
    }
    connection->reading = true;
    pthread_mutex_unlock(&self->lock);

    ssize_t count;
    do
        count = recv(connection->fd, buffer, MOST_READ, MSG_DONTWAIT);
    while (count < 0 && errno == EINTR);
    bool nothing = count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    size_t length = count > 0 ? (size_t)count : 0;
    char *gap = length ? memmem(buffer, length, "\r\n\r\n", 4) : NULL;
    size_t text = gap ? (size_t)(gap - buffer) : 0, body = gap ? length - text - 4 : 0;
    uint64_t hash = gap ? hash_of(buffer, text) : 0;
    double heard = now();

    pthread_mutex_lock(&self->lock);
    connection->reading = false;
    if (nothing) {
        pthread_mutex_unlock(&self->lock);
        return;
    }
    bool fit = gap && !over && connection->state == IDLE && !connection->sending;
    Head *head = fit ? find(self, buffer, text, hash) : NULL;
    if (!head || !head->text || head->body != body) {
        give_back(self, connection, buffer, length);
        pthread_mutex_unlock(&self->lock);
        return;
    }
    Kind *kind = &self->kinds[head->kind];
    connection->heard = heard;
    if (kind->waiting < kind->room && kind->came < kind->most) {
        kind->waiting++;
        kind->came++;
        connection->state = BUSY;
        if (!put(self->inbox, connection->name, buffer, length, heard))
            shutdown(connection->fd, SHUT_RDWR);
        pthread_mutex_unlock(&self->lock);
        return;
    }
    kind->refused++;
    size_t size = kind->length;
    memcpy(refusal, kind->refusal, size);
    connection->reading = true;
    pthread_mutex_unlock(&self->lock);

    bool goes_on = refuse(connection, refusal, size);

    pthread_mutex_lock(&self->lock);
    connection->reading = false;
    if (!goes_on)
        give_back(self, connection, NULL, 0);
    pthread_mutex_unlock(&self->lock);
}

/* Say so once. */
static void ring(int bell) {
    uint64_t one = 1;
    ssize_t written = write(bell, &one, sizeof one);
    (void)written; /* it fails only if it has been rung 2^64 times */
}

static void *run(void *argument) {
    Front *self = argument;
    struct epoll_event events[MOST_EVENTS];
    int timeout = -1;
    for (;;) {
        int count = epoll_wait(self->epoll, events, MOST_EVENTS, timeout);
        if (count < 0 && errno != EINTR)
            return NULL;
        for (int at = 0; at < count; at++) {
            if (events[at].data.u64 == STOP)
                return NULL;
            read_request(self, events[at].data.u64,
                         events[at].events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
        }
        pthread_mutex_lock(&self->lock);
        bool waits = self->told; /* what was read before has not been taken yet */
        bool news = self->inbox->count && !waits;
        double left = news ? self->inbox->oldest + self->hold - now() : 0;
        bool tell = news && left <= 0;
        self->told |= tell;
        pthread_mutex_unlock(&self->lock);
        timeout = left > 0 ? 1 + (int)(1000 * left) : -1;
        if (tell)
            ring(self->bell);
        if (waits) /* nobody is in a hurry, and many at a time cost less, also who sends them */
            nanosleep(&NAP, NULL);
    }
}

/* From here on: what Python calls. */

/* The thread gets no signals: they are Python's. */
static int start(Front *self) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&self->thread, NULL, run, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return error;
}

static PyObject *front_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    (void)args, (void)kwargs;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Front *self = (Front *)alloc(type, 0);
    if (!self)
        return NULL;
    self->free = UINT32_MAX;
    self->inbox = &self->inboxes[0];
    for (int kind = 0; kind < MOST_KINDS; kind++)
        self->kinds[kind].room = self->kinds[kind].most = LONG_MAX;
    pthread_mutex_init(&self->lock, NULL);
    self->epoll = epoll_create1(EPOLL_CLOEXEC);
    self->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    self->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = STOP};
    if (self->epoll < 0 || self->bell < 0 || self->stop < 0 ||
        epoll_ctl(self->epoll, EPOLL_CTL_ADD, self->stop, &event) || start(self)) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    self->running = true;
    return (PyObject *)self;
}

/* With the lock, or with the thread at its end. */
static void set_free(Front *self, Connection *connection) {
    close(connection->fd);
    connection->state = FREE;
    connection->next = self->free;
    self->free = connection->slot;
}

static void end(Front *self) {
    if (!self->running)
        return;
    ring(self->stop);
    Py_BEGIN_ALLOW_THREADS
    pthread_join(self->thread, NULL);
    Py_END_ALLOW_THREADS
    self->running = false;
    for (uint32_t at = 0; at < self->count; at++)
        if (self->connections[at]->state != FREE)
            set_free(self, self->connections[at]);
}

static void front_dealloc(PyObject *object) {
    Front *self = (Front *)object;
    PyTypeObject *type = Py_TYPE(object);
    end(self);
    for (uint32_t at = 0; at < self->count; at++)
        free(self->connections[at]);
    free(self->connections);
    for (int at = 0; at < TABLE; at++)
        free(self->heads[at].text);
    for (int at = 0; at < MOST_KINDS; at++)
        free(self->kinds[at].refusal);
    for (int at = 0; at < 2; at++) {
        free(self->inboxes[at].items);
        free(self->inboxes[at].bytes);
    }
    int files[] = {self->epoll, self->bell, self->stop};
    for (int at = 0; at < 3; at++)
        if (files[at] >= 0)
            close(files[at]);
    pthread_mutex_destroy(&self->lock);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *front_close(PyObject *object, PyObject *none) {
    (void)none;
    end((Front *)object);
    Py_RETURN_NONE;
}

static PyObject *front_fileno(PyObject *object, PyObject *none) {
    (void)none;
    return PyLong_FromLong(((Front *)object)->bell);
}

static PyObject *front_know(PyObject *object, PyObject *args) {
    Front *self = (Front *)object;
    const char *text;
    Py_ssize_t length, body;
    int kind;
    if (!PyArg_ParseTuple(args, "y#ni", &text, &length, &body, &kind))
        return NULL;
    if (kind < 0 || kind >= MOST_KINDS || body < 0) {
        PyErr_SetString(PyExc_ValueError, "no such kind or body");
        return NULL;
    }
    char *copy = malloc((size_t)length + 1);
    if (!copy)
        return PyErr_NoMemory();
    memcpy(copy, text, (size_t)length);
    uint64_t hash = hash_of(copy, (size_t)length);
    pthread_mutex_lock(&self->lock);
    Head *head = find(self, copy, (size_t)length, hash);
    bool full = !head->text && self->known >= MOST_HEADS;
    if (!full) {
        self->known += !head->text;
        free(head->text);
        *head = (Head){copy, (size_t)length, (size_t)body, hash, kind};
    }
    pthread_mutex_unlock(&self->lock);
    if (full) {
        free(copy);
        PyErr_SetString(PyExc_ValueError, "too many heads; forget them first");
        return NULL;
    }
    Py_RETURN_NONE;
}

/* How many have been refused of which kind, from now on anew; with the lock. */
static void count_refused(Front *self, long refused[MOST_KINDS]) {
    for (int kind = 0; kind < MOST_KINDS; kind++) {
        refused[kind] = self->kinds[kind].refused;
        self->kinds[kind].refused = 0;
    }
}

/* The same as a list of pairs. */
static PyObject *listed(const long refused[MOST_KINDS]) {
    PyObject *counts = PyList_New(0);
    for (int kind = 0; counts && kind < MOST_KINDS; kind++) {
        if (!refused[kind])
            continue;
        PyObject *one = Py_BuildValue("il", kind, refused[kind]);
        if (!one || PyList_Append(counts, one))
            Py_CLEAR(counts);
        Py_XDECREF(one);
    }
    return counts;
}

static PyObject *front_forget(PyObject *object, PyObject *none) {
    (void)none;
    Front *self = (Front *)object;
    long refused[MOST_KINDS];
    pthread_mutex_lock(&self->lock);
    count_refused(self, refused);
    for (int at = 0; at < TABLE; at++)
        free(self->heads[at].text);
    memset(self->heads, 0, sizeof self->heads);
    self->known = 0;
    pthread_mutex_unlock(&self->lock);
    return listed(refused);
}

static PyObject *front_room(PyObject *object, PyObject *args) {
    Front *self = (Front *)object;
    int number;
    long room, most;
    const char *refusal;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "illy#", &number, &room, &most, &refusal, &length))
        return NULL;
    if (number < 0 || number >= MOST_KINDS) {
        PyErr_SetString(PyExc_ValueError, "no such kind");
        return NULL;
    }
    if (length > MOST_REFUSAL) {
        PyErr_SetString(PyExc_ValueError, "the refusal is too long");
        return NULL;
    }
    Kind *kind = &self->kinds[number];
    bool same = kind->refusal && kind->length == (size_t)length &&
                !memcmp(kind->refusal, refusal, kind->length); /* only Python changes it */
    char *copy = same ? NULL : malloc((size_t)length + 1);
    if (!same && !copy)
        return PyErr_NoMemory();
    if (!same)
        memcpy(copy, refusal, (size_t)length);
    pthread_mutex_lock(&self->lock);
    kind->room = room;
    kind->most = most;
    kind->came = kind->waiting; /* of which Python does not know */
    if (!same) {
        free(kind->refusal);
        kind->refusal = copy;
        kind->length = (size_t)length;
    }
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *front_hold(PyObject *object, PyObject *number) {
    Front *self = (Front *)object;
    double seconds = PyFloat_AsDouble(number);
    if (PyErr_Occurred())
        return NULL;
    pthread_mutex_lock(&self->lock);
    self->hold = seconds;
    pthread_mutex_unlock(&self->lock);
    Py_RETURN_NONE;
}

static PyObject *front_lend(PyObject *object, PyObject *args) {
    Front *self = (Front *)object;
    int fd, busy;
    unsigned long long name;
    if (!PyArg_ParseTuple(args, "iKp", &fd, &name, &busy))
        return NULL;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* so that the number is ours until the recall */
    if (own < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    pthread_mutex_lock(&self->lock);
    uint32_t slot = self->free;
    if (slot == UINT32_MAX) {
        if (self->count == self->size) {
            uint32_t size = self->size ? 2 * self->size : 64;
            Connection **more = realloc(self->connections, size * sizeof *more);
            if (!more)
                goto no_memory;
            self->connections = more;
            self->size = size;
        }
        Connection *connection = calloc(1, sizeof *connection);
        if (!connection)
            goto no_memory;
        slot = self->count;
        self->connections[self->count++] = connection;
    } else {
        self->free = self->connections[slot]->next;
    }
    *self->connections[slot] = (Connection){
        .name = name, .fd = own, .state = busy ? BUSY : IDLE, .heard = now(), .slot = slot};
    struct epoll_event event = EVENT(slot);
    if (epoll_ctl(self->epoll, EPOLL_CTL_ADD, own, &event)) {
        int error = errno;
        set_free(self, self->connections[slot]);
        pthread_mutex_unlock(&self->lock);
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    pthread_mutex_unlock(&self->lock);
    return PyLong_FromUnsignedLong(slot);
no_memory:
    pthread_mutex_unlock(&self->lock);
    close(own);
    return PyErr_NoMemory();
}

/* The connection that is lent in a slot; NULL, and an error is set: there is none. */
static Connection *lent(Front *self, PyObject *number) {
    unsigned long slot = PyLong_AsUnsignedLong(number);
    if (PyErr_Occurred())
        return NULL;
    if (slot < self->count && self->connections[slot]->state != FREE)
        return self->connections[slot];
    PyErr_SetString(PyExc_ValueError, "no such connection is lent");
    return NULL;
}

static PyObject *front_answer(PyObject *object, PyObject *args) {
    Front *self = (Front *)object;
    PyObject *slot;
    const char *bytes;
    Py_ssize_t length;
    if (!PyArg_ParseTuple(args, "Oy#", &slot, &bytes, &length))
        return NULL;
    Connection *connection = lent(self, slot);
    if (!connection)
        return NULL;
    ssize_t sent;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&self->lock);
    if (connection->state == BUSY)
        connection->state = IDLE;
    connection->sending = true;
    pthread_mutex_unlock(&self->lock);
    sent = send(connection->fd, bytes, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
    pthread_mutex_lock(&self->lock);
    bool again = connection->again;
    connection->sending = connection->again = false;
    pthread_mutex_unlock(&self->lock);
    if (again) { /* tell it once more */
        struct epoll_event event = EVENT(connection->slot);
        epoll_ctl(self->epoll, EPOLL_CTL_MOD, connection->fd, &event);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromSsize_t(sent < 0 ? 0 : sent);
}

static PyObject *front_heard(PyObject *object, PyObject *slot) {
    Front *self = (Front *)object;
    Connection *connection = lent(self, slot);
    if (!connection)
        return NULL;
    pthread_mutex_lock(&self->lock);
    double heard = connection->heard;
    pthread_mutex_unlock(&self->lock);
    return PyFloat_FromDouble(heard);
}

static PyObject *front_recall(PyObject *object, PyObject *slot) {
    Front *self = (Front *)object;
    Connection *connection = lent(self, slot);
    if (!connection)
        return NULL;
    pthread_mutex_lock(&self->lock);
    while (connection->reading) {
        pthread_mutex_unlock(&self->lock);
        sched_yield();
        pthread_mutex_lock(&self->lock);
    }
    double heard = connection->heard;
    epoll_ctl(self->epoll, EPOLL_CTL_DEL, connection->fd, NULL);
    set_free(self, connection);
    pthread_mutex_unlock(&self->lock);
    return PyFloat_FromDouble(heard);
}

static PyObject *front_take(PyObject *object, PyObject *none) {
    (void)none;
    Front *self = (Front *)object;
    long refused[MOST_KINDS];
    uint64_t rung;
    ssize_t got = read(self->bell, &rung, sizeof rung);
    (void)got;
    pthread_mutex_lock(&self->lock);
    Inbox *inbox = self->inbox;
    self->inbox = inbox == &self->inboxes[0] ? &self->inboxes[1] : &self->inboxes[0];
    self->told = false;
    count_refused(self, refused);
    for (int kind = 0; kind < MOST_KINDS; kind++)
        self->kinds[kind].waiting = 0;
    pthread_mutex_unlock(&self->lock);
    PyObject *items = PyList_New((Py_ssize_t)inbox->count), *counts = listed(refused);
    for (size_t at = 0; items && counts && at < inbox->count; at++) {
        Item *item = &inbox->items[at];
        const char *bytes = item->length ? inbox->bytes + item->at : "";
        PyObject *one = Py_BuildValue("Ky#d", (unsigned long long)item->connection, bytes,
                                      (Py_ssize_t)item->length, item->since);
        if (!one || PyList_SetItem(items, (Py_ssize_t)at, one))
            Py_CLEAR(items);
    }
    inbox->count = inbox->used = 0;
    if (!items || !counts) {
        Py_XDECREF(items);
        Py_XDECREF(counts);
        return NULL;
    }
    return Py_BuildValue("NN", items, counts);
}

static PyMethodDef methods[] = {
    {"know", front_know, METH_VARARGS, NULL},     {"forget", front_forget, METH_NOARGS, NULL},
    {"room", front_room, METH_VARARGS, NULL},     {"hold", front_hold, METH_O, NULL},
    {"lend", front_lend, METH_VARARGS, NULL},     {"recall", front_recall, METH_O, NULL},
    {"heard", front_heard, METH_O, NULL},         {"answer", front_answer, METH_VARARGS, NULL},
    {"take", front_take, METH_NOARGS, NULL},      {"fileno", front_fileno, METH_NOARGS, NULL},
    {"close", front_close, METH_NOARGS, NULL},    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, front_new}, {Py_tp_dealloc, front_dealloc}, {Py_tp_methods, methods}, {0, NULL}};

static PyType_Spec spec = {"mlflow_pt_deploy.serving._front.Front", sizeof(Front), 0,
                           Py_TPFLAGS_DEFAULT, slots};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_front", NULL, 0, NULL, NULL, NULL,
                                    NULL, NULL};

PyMODINIT_FUNC PyInit__front(void) {
    PyObject *made = PyModule_Create(&module), *type = PyType_FromSpec(&spec);
    if (!made || !type || PyModule_AddObjectRef(made, "Front", type)) {
        Py_XDECREF(made);
        Py_CLEAR(made);
    }
    Py_XDECREF(type);
    return made;
}
