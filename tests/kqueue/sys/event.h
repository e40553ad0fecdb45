/* kqueue for Linux, as much of it as dtls.c uses: cc -DDTLS_USE_KQUEUE -Itests/kqueue ... runs the kqueue backend, and
 * what goes with it on the BSDs, on epoll.
 *
 * It keeps to what kqueue does where epoll differs: an event for each filter instead of a mask, so that a descriptor that
 * is readable and writable comes twice and one filter's change leaves the other alone; ENOENT for what was not added;
 * signals that are counted, not taken from a descriptor; EV_EOF; regular files that can be watched, and tell nothing at
 * their end; no /dev/tty. Of sockets it has IP_RECVDSTADDR and IP_SENDSRCADDR in place of IP_PKTINFO, one datagram a call,
 * EISCONN for a destination on a connected one, send buffers that are refused above a limit, and SO_SNDBUF as the limit of
 * a datagram. Not receive buffers: a small one only loses more in a flood.
 *
 * Limits: one source file includes it (all of it is static), the first queue is made before there are threads, a descriptor
 * or signal is on one queue at a time, the only EVFILT_USER is number 0, and a call either changes one event or waits. With
 * -DKQUEUE_WITHOUT_USER there is no EVFILT_USER at all, as on OpenBSD before 7.8; with -DKQUEUE_OF_MACOS there is IP_PKTINFO
 * after all, without the local address in ipi_spec_dst. */
#ifndef KQUEUE_SHIM_H
#define KQUEUE_SHIM_H

#include <errno.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define EVFILT_READ (-1)
#define EVFILT_WRITE (-2)
#define EVFILT_SIGNAL (-6)
#ifndef KQUEUE_WITHOUT_USER
#define EVFILT_USER (-11)
#endif
#define EV_ADD 0x0001
#define EV_DELETE 0x0002
#define EV_CLEAR 0x0020
#define EV_EOF 0x8000
#define NOTE_TRIGGER 0x01000000

struct kevent {
    uintptr_t ident;
    short filter;
    unsigned short flags;
    unsigned fflags;
    intptr_t data;
    void *udata;
};

#define EV_SET(e, i, fi, fl, ff, d, u) (*(e) = (struct kevent){(i), (fi), (fl), (ff), (d), (u)})

enum { KQ_DESCRIPTORS = 1 << 16, KQ_SIGNALS = 65, KQ_EVENTS = 64, KQ_READ = 1, KQ_WRITE = 2 };
enum kq_kind { KQ_DESCRIPTOR, KQ_SIGNAL, KQ_USER };

/* By number; epoll's data is a kind and a number. A descriptor's entry may be that of an earlier descriptor with its
 * number, which epoll tells: it does not know it any more. */
static struct kq_descriptor {
    unsigned filters; /* KQ_READ, KQ_WRITE */
    void *read_udata, *write_udata;
} kq_descriptors[KQ_DESCRIPTORS];

static struct kq_signal {
    int fd; /* a signalfd; 0: none */
    bool was_blocked;
    void *udata;
} kq_signals[KQ_SIGNALS];

static struct epoll_event kq_event(uint32_t events, enum kq_kind kind, uintptr_t ident)
{
    return (struct epoll_event){.events = events, .data.u64 = (uint64_t)kind << 32 | ident};
}

static uint32_t kq_interest(unsigned filters)
{
    return (filters & KQ_READ ? (uint32_t)(EPOLLIN | EPOLLRDHUP) : 0) | (filters & KQ_WRITE ? (uint32_t)EPOLLOUT : 0);
}

static int kqueue(void)
{
    return epoll_create1(0);
}

static int kq_change_descriptor(int kq, const struct kevent *e)
{
    unsigned bit = e->filter == EVFILT_READ ? KQ_READ : KQ_WRITE;
    int fd = (int)e->ident;
    struct stat st;
    if (e->ident >= KQ_DESCRIPTORS) {
        errno = EBADF;
        return -1;
    }
    struct kq_descriptor *d = &kq_descriptors[e->ident];
    unsigned filters = e->flags & EV_ADD ? d->filters | bit : d->filters & ~bit;
    struct epoll_event event = kq_event(kq_interest(filters), KQ_DESCRIPTOR, e->ident);
    if (e->flags & EV_DELETE && !(d->filters & bit)) {
        errno = ENOENT;
        return -1;
    }
    bool adds = e->flags & EV_ADD && fstat(fd, &st) == 0;
    if (adds && S_ISREG(st.st_mode))
        return 0;
    if (adds && S_ISCHR(st.st_mode) && st.st_rdev == makedev(5, 0)) {
        errno = EINVAL; /* /dev/tty, as on macOS */
        return -1;
    }
    int r = epoll_ctl(kq, filters ? EPOLL_CTL_MOD : EPOLL_CTL_DEL, fd, &event);
    if (r < 0 && errno == ENOENT && e->flags & EV_ADD) { /* new, or its number is */
        filters = bit;
        event.events = kq_interest(filters);
        r = epoll_ctl(kq, EPOLL_CTL_ADD, fd, &event);
    }
    if (r < 0)
        return -1;
    d->filters = filters;
    if (e->flags & EV_ADD)
        *(bit == KQ_READ ? &d->read_udata : &d->write_udata) = e->udata;
    return 0;
}

/* A signalfd gets only what is blocked; kqueue counts what any handler gets. */
static int kq_change_signal(int kq, const struct kevent *e)
{
    struct kq_signal *s = &kq_signals[e->ident % KQ_SIGNALS];
    struct epoll_event event = kq_event(EPOLLIN, KQ_SIGNAL, e->ident);
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, (int)e->ident);
    if (e->flags & EV_DELETE) {
        const struct timespec now = {0};
        if (s->fd == 0) {
            errno = ENOENT;
            return -1;
        }
        close(s->fd);
        s->fd = 0;
        while (!s->was_blocked && sigtimedwait(&set, NULL, &now) > 0)
            ; /* the handler would have had them */
        return s->was_blocked ? 0 : sigprocmask(SIG_UNBLOCK, &set, NULL);
    }
    if (s->fd != 0) {
        s->udata = e->udata;
        return 0;
    }
    if (sigprocmask(SIG_BLOCK, &set, &old) != 0)
        return -1;
    *s = (struct kq_signal){.fd = signalfd(-1, &set, SFD_NONBLOCK),
                            .was_blocked = sigismember(&old, (int)e->ident) == 1,
                            .udata = e->udata};
    if (s->fd > 0 && epoll_ctl(kq, EPOLL_CTL_ADD, s->fd, &event) == 0)
        return 0;
    int error = errno;
    if (s->fd > 0)
        close(s->fd);
    s->fd = 0;
    if (!s->was_blocked)
        sigprocmask(SIG_UNBLOCK, &set, NULL);
    errno = error;
    return -1;
}

#ifdef EVFILT_USER
/* One for the process that is always writable: a queue is woken by its taking an interest in it, once. */
static int kq_always[2] = {-1, -1};

static int kq_change_user(int kq, const struct kevent *e)
{
    if (kq_always[0] < 0 && pipe(kq_always) < 0)
        return -1;
    struct epoll_event event = kq_event((e->fflags & NOTE_TRIGGER ? (uint32_t)EPOLLOUT : 0) | EPOLLONESHOT, KQ_USER, 0);
    return epoll_ctl(kq, e->flags & EV_ADD ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, kq_always[1], &event);
}
#endif

static int kq_change(int kq, const struct kevent *e)
{
    switch (e->filter) {
    case EVFILT_READ:
    case EVFILT_WRITE:
        return kq_change_descriptor(kq, e);
    case EVFILT_SIGNAL:
        return kq_change_signal(kq, e);
#ifdef EVFILT_USER
    case EVFILT_USER:
        return kq_change_user(kq, e);
#endif
    default:
        errno = EINVAL;
        return -1;
    }
}

/* What one of epoll's events is to kqueue: up to two. */
static int kq_report(struct kevent *list, const struct epoll_event *event)
{
    uintptr_t ident = (uintptr_t)(event->data.u64 & 0xffffffff);
    unsigned short eof = event->events & (EPOLLHUP | EPOLLRDHUP) ? EV_EOF : 0;
    int n = 0;
    if (event->data.u64 >> 32 == KQ_SIGNAL) {
        struct signalfd_siginfo info;
        intptr_t count = 0;
        while (read(kq_signals[ident].fd, &info, sizeof info) == sizeof info)
            count++;
        if (count > 0)
            EV_SET(&list[n++], ident, EVFILT_SIGNAL, EV_CLEAR, 0, count, kq_signals[ident].udata);
    } else if (event->data.u64 >> 32 == KQ_DESCRIPTOR) {
        const struct kq_descriptor *d = &kq_descriptors[ident];
        uint32_t either = EPOLLERR | EPOLLHUP;
        if (d->filters & KQ_WRITE && event->events & (EPOLLOUT | either))
            EV_SET(&list[n++], ident, EVFILT_WRITE, eof, 0, 0, d->write_udata);
        if (d->filters & KQ_READ && event->events & (EPOLLIN | EPOLLRDHUP | either))
            EV_SET(&list[n++], ident, EVFILT_READ, eof, 0, 0, d->read_udata);
#ifdef EVFILT_USER
    } else {
        EV_SET(&list[n++], 0, EVFILT_USER, EV_CLEAR, 0, 0, NULL);
#endif
    }
    return n;
}

static int kevent(int kq, const struct kevent *changes, int n_changes, struct kevent *events, int n_events,
                  const struct timespec *timeout)
{
    struct epoll_event ready[KQ_EVENTS / 2];
    if (n_changes == 1 && n_events == 0)
        return kq_change(kq, changes);
    if (n_changes != 0 || n_events < 2) {
        errno = EINVAL;
        return -1;
    }
    int max = n_events < KQ_EVENTS ? n_events / 2 : KQ_EVENTS / 2, n = 0;
    int n_ready = epoll_wait(kq, ready, max, timeout ? (int)(timeout->tv_sec * 1000 + timeout->tv_nsec / 1000000) : -1);
    for (int i = 0; i < n_ready; i++)
        n += kq_report(events + n, &ready[i]);
    return n_ready < 0 ? -1 : n;
}

/* ---- sockets ---- */

enum { KQ_SEND_BUFFER = 9216, KQ_SEND_BUFFER_MAX = 262144 }; /* NetBSD's */

static int kq_socket(int family, int type, int protocol)
{
    const int bytes = KQ_SEND_BUFFER;
    int fd = socket(family, type, protocol);
    if (fd >= 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    return fd;
}

/* Whether a datagram is larger than the send buffer, of which Linux tells the double. */
static bool kq_too_long(int fd, const struct msghdr *m)
{
    int bytes = 0;
    socklen_t size = sizeof bytes;
    size_t len = 0;
    for (size_t i = 0; i < m->msg_iovlen; i++)
        len += m->msg_iov[i].iov_len;
    return getsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, &size) == 0 && len > (size_t)bytes / 2;
}

#ifndef KQUEUE_OF_MACOS
#define IP_RECVDSTADDR 1007 /* no option of Linux's */
#define IP_SENDSRCADDR IP_RECVDSTADDR
#endif

static int kq_setsockopt(int fd, int level, int name, const void *value, socklen_t len)
{
    int bytes = 0;
    memcpy(&bytes, value, len < sizeof bytes ? len : sizeof bytes);
    if (level == SOL_SOCKET && name == SO_SNDBUF && bytes > KQ_SEND_BUFFER_MAX) {
        errno = ENOBUFS;
        return -1;
    }
#ifdef IP_RECVDSTADDR
    if (level == IPPROTO_IP && name == IP_RECVDSTADDR)
        name = IP_PKTINFO;
#endif
    return setsockopt(fd, level, name, value, len);
}

/* By the calls that the epoll backend makes, so that tests/faults.c stands in front of these, too. */
static ssize_t kq_recvmsg(int fd, struct msghdr *m, int flags)
{
    struct mmsghdr one = {.msg_hdr = *m};
    if (recvmmsg(fd, &one, 1, flags, NULL) != 1)
        return -1;
    *m = one.msg_hdr;
    struct cmsghdr *h = m->msg_controllen > 0 ? CMSG_FIRSTHDR(m) : NULL;
    if (h && h->cmsg_level == IPPROTO_IP && h->cmsg_type == IP_PKTINFO) {
        struct in_pktinfo info;
        memcpy(&info, CMSG_DATA(h), sizeof info);
#ifdef IP_RECVDSTADDR
        h->cmsg_type = IP_RECVDSTADDR;
        h->cmsg_len = CMSG_LEN(sizeof info.ipi_addr);
        memcpy(CMSG_DATA(h), &info.ipi_addr, sizeof info.ipi_addr);
        m->msg_controllen = CMSG_SPACE(sizeof info.ipi_addr);
#else
        memset(&info.ipi_spec_dst, 0, sizeof info.ipi_spec_dst);
        memcpy(CMSG_DATA(h), &info, sizeof info);
#endif
    }
    return (ssize_t)one.msg_len;
}

static ssize_t kq_sendmsg(int fd, const struct msghdr *m, int flags)
{
    struct mmsghdr one = {.msg_hdr = *m};
    struct sockaddr_storage ss;
    socklen_t len = sizeof ss;
    if (m->msg_name && getpeername(fd, (struct sockaddr *)&ss, &len) == 0) {
        errno = EISCONN;
        return -1;
    }
    if (kq_too_long(fd, m)) {
        errno = EMSGSIZE;
        return -1;
    }
#ifdef IP_SENDSRCADDR
    _Alignas(struct cmsghdr) uint8_t control[CMSG_SPACE(sizeof(struct in_pktinfo))] = {0};
    struct cmsghdr *h = m->msg_controllen > 0 ? CMSG_FIRSTHDR(&one.msg_hdr) : NULL;
    if (h && h->cmsg_level == IPPROTO_IP && h->cmsg_type == IP_SENDSRCADDR) {
        struct in_pktinfo info = {0};
        memcpy(&info.ipi_spec_dst, CMSG_DATA(h), sizeof info.ipi_spec_dst);
        one.msg_hdr.msg_control = control;
        one.msg_hdr.msg_controllen = sizeof control;
        h = CMSG_FIRSTHDR(&one.msg_hdr);
        h->cmsg_level = IPPROTO_IP;
        h->cmsg_type = IP_PKTINFO;
        h->cmsg_len = CMSG_LEN(sizeof info);
        memcpy(CMSG_DATA(h), &info, sizeof info);
    }
#endif
    return sendmmsg(fd, &one, 1, flags) == 1 ? (ssize_t)one.msg_len : -1;
}

#define socket kq_socket
#define setsockopt kq_setsockopt
#define recvmsg kq_recvmsg
#define sendmsg kq_sendmsg

#endif
