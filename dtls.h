/* dtls.h - DTLS 1.2 over UDP in one C file, on OpenSSL.
 *
 * Copyright (c) 2026 the dtls.c authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright
 * notice and this permission notice shall be included in all copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 *
 * How the pieces fit:
 *
 *   loop      descriptors, timers, signals; epoll or kqueue. Runs by itself or inside another loop.
 *   endpoint  one identity (certificate, key, CA), its listening sockets, its connections.
 *   conn      one DTLS association with one peer. You get messages from it and send messages to it.
 *
 * So: dtls_loop_new(), a dtls_config with files and on_event, dtls_endpoint_new(), then dtls_endpoint_listen() or
 * dtls_endpoint_connect(), then dtls_loop_run(). Compile dtls.c along with your own files and link -lssl
 * -lcrypto, with -pthread.
 *
 * Threads: a loop and everything made on it belong to one thread, the one that polls it. The only call for other
 * threads is dtls_loop_post(). Loops share nothing, so several of them in several threads are independent.
 *
 * Errors: calls that can fail return 0 or a negative DTLS_ERR_ value, calls that make something return NULL. Those that
 * take a dtls_error fill it with the code and one line of text; it may be NULL. Nothing here prints, exits or aborts.
 *
 * Callbacks run inside dtls_loop_poll(), dtls_loop_run(), dtls_endpoint_input() or the call that caused them. They may
 * call anything in this header except dtls_loop_poll(), dtls_loop_run() and dtls_loop_free(); closing or freeing any
 * object from any callback is safe: memory goes away at the end of the turn. Some of the configuration's run in the middle
 * of OpenSSL's work (send, psk, on_peer, on_keylog): they may post, but call nothing else here. Hooks that on_ssl_ctx sets must not ask OpenSSL to call them
 * again later (SSL_ERROR_WANT_X509_LOOKUP and the like): that ends the handshake.
 *
 * Time is in milliseconds where a name ends in _ms. In the configuration 0 always means the default written beside the
 * field, and DTLS_NEVER switches off what says so there.
 */
#ifndef DTLS_H
#define DTLS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DTLS_C_VERSION "0.1.0"
#define DTLS_NEVER (-1)
#define DTLS_MESSAGE_MAX 16384 /* bytes in one message: one DTLS record, RFC 6347 section 4.1 */

struct sockaddr; /* <sys/socket.h> */
struct ssl_st;   /* OpenSSL's SSL, SSL_CTX and SSL_SESSION, so that this header needs none of OpenSSL's */
struct ssl_ctx_st;
struct ssl_session_st;

typedef struct dtls_loop dtls_loop;
typedef struct dtls_watch dtls_watch;
typedef struct dtls_timer dtls_timer;
typedef struct dtls_endpoint dtls_endpoint;
typedef struct dtls_conn dtls_conn;

/* The version of the compiled dtls.c, "0.1.0"; compare with DTLS_C_VERSION. Any thread. */
const char *dtls_version(void);

/* ---- errors ------------------------------------------------------------------------------------------------------ */

enum {
    DTLS_ERR_ARG = -1,    /* an argument is missing or out of range */
    DTLS_ERR_ADDR = -2,   /* text that is no address */
    DTLS_ERR_MEMORY = -3, /* out of memory; nothing was changed */
    DTLS_ERR_SYSTEM = -4, /* a system call failed: the text has errno's words */
    DTLS_ERR_CERT = -5,   /* certificate, key or CA unreadable, mismatched, expired or missing */
    DTLS_ERR_TLS = -6,    /* OpenSSL refused: the text has its reason */
    DTLS_ERR_STATE = -7,  /* not possible now: not connected yet, closed, or called from where it must not be */
    DTLS_ERR_SIZE = -8,   /* a message of 0 bytes, or of more than this peer takes: nothing was sent */
    DTLS_ERR_AGAIN = -9,  /* a send queue is full: nothing was sent, drop the message or try later */
    DTLS_ERR_LIMIT = -10  /* a configured limit is reached */
};

typedef struct dtls_error {
    int code;       /* DTLS_ERR_ value */
    char text[248]; /* one line, no newline */
} dtls_error;

/* A constant text for a DTLS_ERR_ value. Any thread. */
const char *dtls_strerror(int code);

/* ---- addresses --------------------------------------------------------------------------------------------------- */

/* An IPv4 or IPv6 address and port, in one canonical form: equal addresses are equal byte for byte. IPv4-mapped IPv6
 * becomes IPv4, unused bytes are zero. A transport of your own may put any 16 bytes into ip. */
typedef struct dtls_addr {
    uint8_t ip[16];   /* network order; IPv4 in the first four bytes */
    uint32_t scope;   /* interface index of an IPv6 link-local address, otherwise 0 */
    uint16_t port;    /* host order */
    uint8_t family;   /* 4 or 6; 0: no address */
    uint8_t reserved; /* 0 */
} dtls_addr;

#define DTLS_ADDR_TEXT 80 /* bytes that hold any formatted address */

/* Reads "127.0.0.1:1234", "[::1]:1234" or "[fe80::1%eth0]:1234". Port 0 is accepted (the system picks one on listen).
 * Host names are not resolved. Returns 0 or DTLS_ERR_ADDR with the reason. Any thread. */
int dtls_addr_parse(dtls_addr *addr, const char *text, dtls_error *err);

/* Writes the form that dtls_addr_parse() reads and returns buf; cuts at size. Any thread. */
char *dtls_addr_format(const dtls_addr *addr, char *buf, size_t size);

/* 1 if both are the same address and port. Any thread. */
int dtls_addr_equal(const dtls_addr *a, const dtls_addr *b);

/* From a sockaddr_in or sockaddr_in6 of len bytes. Returns 0 or DTLS_ERR_ADDR. Any thread. */
int dtls_addr_from_sockaddr(dtls_addr *addr, const struct sockaddr *sa, size_t len);

/* To a sockaddr_in or sockaddr_in6, size bytes at most. Returns its length; 0: no address, or no room. Any thread. */
size_t dtls_addr_to_sockaddr(const dtls_addr *addr, struct sockaddr *sa, size_t size);

/* ---- loop -------------------------------------------------------------------------------------------------------- */

typedef struct dtls_loop_config {
    int64_t (*now_us)(void *user); /* a clock that never goes back, in microseconds; NULL: the system's monotonic one */
    void *user;                    /* handed to now_us */
} dtls_loop_config;

/* A new loop; config may be NULL. NULL when out of memory or descriptors. For one process: make it after fork(). */
dtls_loop *dtls_loop_new(const dtls_loop_config *config);

/* Frees the loop with every endpoint (their peers get close_notify, their events are raised), watch, timer and signal
 * still on it. Functions still posted are not called. NULL is fine. Not from a callback. */
void dtls_loop_free(dtls_loop *loop);

/* Turns until dtls_loop_stop(). Returns 0, or DTLS_ERR_SYSTEM if the system's event call fails. */
int dtls_loop_run(dtls_loop *loop);

/* Makes dtls_loop_run() return after the present turn, or at once if it was not called yet. From another thread: post a
 * function that calls this. */
void dtls_loop_stop(dtls_loop *loop);

/* One turn: waits up to timeout_ms (-1: until something happens, 0: not at all; never past the next timer), runs what
 * is due, sends what was queued, frees what was closed. Returns 0 or a negative error; DTLS_ERR_STATE from a
 * callback. */
int dtls_loop_poll(dtls_loop *loop, int timeout_ms);

/* For embedding: the one descriptor that becomes readable when dtls_loop_poll(loop, 0) has something to do. Watch it
 * level-triggered; it is the loop's, do not close it. */
int dtls_loop_fd(const dtls_loop *loop);

/* For embedding: milliseconds until dtls_loop_poll(loop, 0) must be called even if the descriptor stays silent; -1: no
 * timer is set. Ask again after every poll and after every other call into this library. */
int dtls_loop_timeout(dtls_loop *loop);

/* The loop's clock, microseconds. */
int64_t dtls_loop_now(const dtls_loop *loop);

/* From any thread: fn(arg) runs on the loop's thread, in the order of posting. Returns 0, DTLS_ERR_MEMORY, or
 * DTLS_ERR_AGAIN while 65,536 functions are waiting. The loop must outlive the call. */
int dtls_loop_post(dtls_loop *loop, void (*fn)(void *arg), void *arg);

/* Calls fn when the process gets the signal (signalfd or EVFILT_SIGNAL: the signal is blocked or caught for as long as
 * any loop watches it, so call this before starting threads). fn NULL: no longer. At most 16. Returns 0 or an error. A
 * program that is started meanwhile by fork() and exec() inherits what is blocked: unblock it between the two
 * (sigprocmask, or posix_spawnattr_setsigmask). */
int dtls_loop_signal(dtls_loop *loop, int signo, void (*fn)(void *user, int signo), void *user);

enum { DTLS_READ = 1, DTLS_WRITE = 2 };

/* Calls fn while fd is readable or writable (level-triggered; errors and hang-ups count as both). The descriptor stays
 * yours; close it after dtls_watch_free(). A loop has one watch for a descriptor. NULL if the system cannot watch it: errno
 * is EPERM for regular files, and on macOS for named pipes, EEXIST if it is watched already; kqueue refuses to watch for
 * writing what nobody reads any more (EPIPE, EBADF). */
dtls_watch *dtls_watch_new(dtls_loop *loop, int fd, unsigned events, void (*fn)(void *user, int fd, unsigned events),
                           void *user);
/* 0: it is silent. Returns 0; DTLS_ERR_ARG for other bits, DTLS_ERR_STATE after dtls_watch_free(), or DTLS_ERR_SYSTEM. */
int dtls_watch_set(dtls_watch *watch, unsigned events);
void dtls_watch_free(dtls_watch *watch); /* NULL is fine */

/* A timer, not yet set; NULL when out of memory. It fires once per dtls_timer_set(). */
dtls_timer *dtls_timer_new(dtls_loop *loop, void (*fn)(void *user), void *user);
void dtls_timer_set(dtls_timer *timer, int64_t delay_ms); /* negative: stops it. Cannot fail. */
void dtls_timer_free(dtls_timer *timer);                  /* NULL is fine */

/* ---- endpoint ---------------------------------------------------------------------------------------------------- */

/* DTLS_EV_MOVED has data, the dtls_addr of before: a server's peer sends from another address now, or a client does, from
 * another local one (see dtls_conn_rebind()). It is raised before the message that showed it.
 * After DTLS_EV_IDLE an application may probe the peer: by a message that this answers, or by dtls_conn_renew().
 * DTLS_EV_RENEWED is a client's: another handshake is done, and the connection goes on with what that made, another local
 * port and other keys. What the peer had not answered by then may be lost, most of all if it was started again.
 * DTLS_EV_FAILED is a server's: a handshake came to nothing, as dtls_conn_info() and dtls_conn_reason() tell: to count, not
 * to ban an address, since whoever sees datagrams can cause it in another's name. No other event was or will be raised for
 * that conn. */
typedef enum dtls_event {
    DTLS_EV_CONNECTED, /* handshake done, peer verified; sending is possible from now on */
    DTLS_EV_MESSAGE,   /* data, len: one whole message, valid during the call */
    DTLS_EV_IDLE,      /* nothing authentic came for idle_ms; repeated every idle_repeat_ms */
    DTLS_EV_WRITABLE,  /* after DTLS_ERR_AGAIN: there is room again. Not with a transport of your own */
    DTLS_EV_RENEWED,
    DTLS_EV_MOVED,
    DTLS_EV_FAILED,
    DTLS_EV_CLOSED /* the last event, exactly once: see dtls_conn_reason(). The conn is gone after the call. */
} dtls_event;

typedef enum dtls_log { DTLS_LOG_ERROR, DTLS_LOG_WARNING, DTLS_LOG_INFO, DTLS_LOG_DEBUG } dtls_log;

/* Whom we take for whom. */
typedef enum dtls_auth {
    DTLS_AUTH_MUTUAL,   /* the default: both need a verified certificate, or a pre-shared key */
    DTLS_AUTH_OPTIONAL, /* a server asks for a certificate, and takes a client that has none; a bad one is refused */
    DTLS_AUTH_SERVER,   /* a server does not ask, a client has no certificate of its own */
    DTLS_AUTH_INSECURE  /* a client takes any server, and logs as a warning what it would have refused: for tests */
} dtls_auth;

/* One more certificate of a server, for clients that ask for one of its names (server_name, RFC 6066 section 3). */
typedef struct dtls_cert {
    const char *cert_file, *key_file; /* as in dtls_config */
} dtls_cert;

#define DTLS_PSK_MAX 64 /* bytes of a pre-shared key */
#define DTLS_CID_MAX 20 /* bytes of a connection ID of ours */
#define DTLS_CID_EMPTY (-2)

struct dtls_info;

/* Start from a zeroed one: that is the safe default. Strings are copied or used up during dtls_endpoint_new(). */
typedef struct dtls_config {
    /* Who we are and whom we trust: PEM files. Verification is mutual unless `auth` says otherwise: a peer needs a
     * certificate from ca_file for the right purpose (extendedKeyUsage clientAuth or serverAuth), a server also the
     * expected name. NULL where on_ssl_ctx provides the same, or where only pre-shared keys are used. Nothing prompts.
     *
     * With OpenSSL 3 key_file may be the URI of a store that a provider has ("pkcs11:..."). on_password is asked for the
     * password of an encrypted key, while the endpoint is made: it writes that, and returns its length, or -1. Where crl_file
     * is given, a peer's certificate is refused if the list of its CA has it, is missing or is too old. */
    const char *cert_file; /* own certificate, then its intermediates */
    const char *key_file;
    const char *ca_file;
    const char *crl_file; /* revocation lists of those CAs, as many as there are; NULL: none */
    int ca_system;        /* 1: also the CAs that this system trusts (SSL_CTX_set_default_verify_paths) */
    dtls_auth auth;
    int (*on_password)(void *user, const char *file, char *password, int size); /* NULL: no encrypted keys */
    int allow_no_ems; /* 1: also peers without the extended master secret (RFC 7627); 0: they are refused */

    /* Names. The first certificate is used whose subjectAltName has what a client asks for, otherwise cert_file's. alpn are
     * application protocols, the best first, as in "coap,echo" (RFC 7301); a server refuses a client that offers only others.
     */
    const dtls_cert *certs; /* a server's further ones */
    size_t certs_len;
    int strict_names; /* 1: a client that asks for a name that none has is refused (unrecognized_name) */
    const char *alpn; /* NULL: none are offered or chosen */

    /* Pre-shared keys, beside certificates or without any (RFC 4279, 5487, 7905): ECDHE_PSK, then PSK, with AEAD suites. Keys
     * are chance, best of 32 bytes, and not passwords: anybody who talks to us may try to guess them at home. A server's
     * callback writes that identity's key and returns its length, or 0 if there is none, which looks like a wrong key from
     * outside (RFC 4279 section 2). It runs in the middle of OpenSSL's work, as the next two do: they may post, but call
     * nothing else here. */
    const char *psk_identity; /* a client's: 1 to 127 bytes */
    const uint8_t *psk_key;   /* its key. Copied, wiped with the endpoint */
    size_t psk_key_len;       /* 1 to DTLS_PSK_MAX */
    size_t (*psk)(void *user, const char *identity, uint8_t key[DTLS_PSK_MAX]);
    int psk_ccm8; /* 1: also TLS_PSK_WITH_AES_128_CCM_8, for constrained peers (RFC 7925) */

    /* Who may come in: called when a peer has proved who it is, before DTLS_EV_CONNECTED, and already when it asks to resume a
     * session, which anybody may repeat in its name.
     * Returns 0, or not 0 and the reason, which is logged: then the peer gets the alert access_denied, where the protocol
     * lets us tell it (a client in a full handshake), otherwise close_notify. NULL: all that are verified. */
    int (*on_peer)(void *user, const struct dtls_info *info, char *reason, size_t size);
    /* Secrets for Wireshark, a line each (SSLKEYLOGFILE's format): whoever has them reads everything. NULL: no. */
    void (*on_keylog)(void *user, const char *line);

    void (*on_event)(dtls_conn *conn, dtls_event event, const void *data, size_t len);
    void (*on_log)(void *user, dtls_log level, const char *line); /* one line per connect, close and failure */
    int (*on_ssl_ctx)(void *user, struct ssl_ctx_st *ctx);        /* last change to the SSL_CTX; not 0: give up */
    void *user;                                                   /* see dtls_endpoint_user() */

    /* Timers. Each retransmission waits half as long again as the one before it, from the first value to the largest
     * (RFC 6347 section 4.2.4). */
    int retransmit_ms;        /* 250 */
    int retransmit_max_ms;    /* 6,000; at most 1,000 until the first ClientHello is answered. OpenSSL gives up */
                              /* after 12 in a row: then a server ends the handshake, a client begins it anew */
    int handshake_timeout_ms; /* 30,000: gives up on a handshake */
    int idle_ms;              /* silence before DTLS_EV_IDLE; 0 and DTLS_NEVER: no such event */
    int idle_repeat_ms;       /* 5,000: between repeated DTLS_EV_IDLE */
    int idle_timeout_ms;      /* 120,000: silence after which the peer counts as gone; or DTLS_NEVER */
    int unanswered_ms; /* a client's: something was sent, and for so long nothing authentic came: it asks by another */
                       /* handshake, see dtls_conn_renew(). For traffic that goes one way. 0 and DTLS_NEVER: no */
    int cookie_ms;     /* 60,000: a cookie secret is used for so long, and stays valid as long again */

    /* Sizes and limits. */
    int mtu_bytes; /* 1,500: the link's MTU with IP and UDP headers, 256 to 65,535; sizes handshake flights */
    int max_conns; /* 4,096, those in handshake included; a restarted peer has two during its handshake */
    int max_conns_per_address; /* half of max_conns and one, connected from one IPv4 address or IPv6 /64; or DTLS_NEVER */
    int max_conns_per_identity; /* half of max_conns and one, connected with the same certificate; or DTLS_NEVER */
    int max_handshakes; /* 512 accepted handshakes in progress. A client more has to ask again, unless another address */
                        /* (IPv4, or IPv6 /64 in a /48) has more of them than its own, or had its time: 3 s */
    int datagrams_per_turn;  /* 64 read from one socket before the others get their turn */
    int send_queue_bytes;    /* 1,048,576 waiting per socket when the system will not take more; macOS and the BSDs */
                             /* drop instead, and nothing waits */
    int socket_buffer_bytes; /* 1,048,576 asked for SO_RCVBUF and SO_SNDBUF, at least 18,432; the system may give less */
    int session_cache;       /* 4,096 sessions kept for resumption by a server, each with the peer's certificate; */
                             /* DTLS_NEVER: none */
    int max_chain_bytes; /* 8,192: of a peer's certificate with its intermediates, 512 to 65,536; and one certificate */
                         /* for each 1,600 bytes, unless on_ssl_ctx sets a message callback of its own */

    /* Addresses that change: a NAT gives its client another port, a phone another network. A server goes on with the same
     * connection, whose newest record is the only proof that its peer is there now; never during a handshake. It knows the
     * connection by its connection ID where the client has those (RFC 9146), otherwise by what the nonces of AES-GCM give
     * away (OpenSSL's and wolfSSL's do), otherwise by trying the keys of connections from the same IPv4 address or IPv6 /64.
     * Until another record comes from the new address, or the peer answered from there where it can be asked (RFC 9853), at
     * most three times as many bytes are sent there as came from there. The address before is kept for 10 s: who copies
     * records to move a connection loses it to the next one that its peer sends.
     *
     * With a connection ID its records look the same to everybody who sees them, wherever its peer goes. */
    int cid_bytes; /* of the connection ID that peers are to put into their records: 1 to DTLS_CID_MAX; 0: a server's 8, a */
                   /* client's DTLS_CID_EMPTY: records to us have none, those to the peer may. DTLS_NEVER: neither */
    const uint8_t *cid_prefix; /* a server's number, for load balancers: how each connection ID begins. Copied */
    size_t cid_prefix_len;     /* at least 4 bytes less than a connection ID has */
    int roam_trials; /* 20,000 connections looked at in a second, besides one for each datagram; or DTLS_NEVER: without */
                     /* a connection ID nobody moves */
    int roam_trials_each; /* 256 of them for one datagram */

    /* A transport of your own: takes one datagram, returns 0, or not 0 if it cannot take it now. Then this endpoint
     * opens no sockets; hand what arrives to dtls_endpoint_input(), but never from inside this call: queue it. */
    int (*send)(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to);
} dtls_config;

/* A new endpoint on the loop. Loads and checks certificate, key and CA: a mismatch or an expired certificate is an
 * error here, not at the first handshake. */
dtls_endpoint *dtls_endpoint_new(dtls_loop *loop, const dtls_config *config, dtls_error *err);

/* Certificate, key, CA, revocation lists, further certificates, auth, alpn, on_password, and what there is of pre-shared keys,
 * anew from this configuration; all else in it is ignored. It is built and checked first: an error changes nothing. Open
 * connections live on (dtls_endpoint_each() shows whom to close), handshakes from now on see the new ones, and no session
 * from before is resumed. */
int dtls_endpoint_reload(dtls_endpoint *ep, const dtls_config *config, dtls_error *err);

/* Closes the connections whose peers would be refused now: by the CAs and revocation lists that the last reload brought, by
 * psk (a server's; a key that only changed is not noticed) or by on_peer. A connection that was resumed has no chain: one
 * that needs intermediates is closed. All their certificates are verified in this one call. */
void dtls_endpoint_recheck(dtls_endpoint *ep);

/* Accepts connections on a local address. Every IPv6 socket is IPv6 only; "[::]:p" also opens "0.0.0.0:p". A wildcard
 * socket answers from the address it was asked on. With port 0 the system picks one and addr gets it. With a transport
 * of your own addr may be NULL. Returns 0, 1 if a wildcard already opened covers the address, or an error. */
int dtls_endpoint_listen(dtls_endpoint *ep, dtls_addr *addr, dtls_error *err);

/* Where to. host is used instead of peer: "name:port", or an address as in dtls_addr_parse(). A name is looked up each time,
 * in a thread of its own (getaddrinfo(); 64 on a loop at once). Its addresses, 8 at most, are tried 250 ms apart, the next
 * one at once where one fails, and the first to complete is taken (RFC 8305). Strings are copied. */
typedef struct dtls_target {
    dtls_addr peer;
    const char *host;
    dtls_addr local;  /* with a transport of your own: the address to send from; otherwise left zero */
    const char *name; /* DNS name or IP that the server's certificate must have in its subjectAltName; */
                      /* NULL: the name in host, or the IP of peer */
    struct ssl_session_st
        *session;          /* from dtls_conn_session(), to resume; NULL: full handshake. Stays yours. One that */
                           /* cannot be resumed, with this name, leads to a full handshake */
    void *user;            /* for dtls_conn_user() */
    int64_t round_trip_us; /* what dtls_info had of an earlier connection to there; 0: not known */
} dtls_target;

/* Starts a connection; DTLS_EV_CONNECTED or DTLS_EV_CLOSED tells how it went, never before this call returns. NULL: it
 * could not start, no event follows. */
dtls_conn *dtls_endpoint_connect(dtls_endpoint *ep, const dtls_target *target, dtls_error *err);

/* One datagram that arrived through a transport of your own; the bytes stay yours. `from` is the peer, `to` the local
 * address (any constant will do). Whatever it holds, the return is 0, but DTLS_ERR_STATE from inside config.send. */
int dtls_endpoint_input(dtls_endpoint *ep, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to);

/* Calls fn for each connected peer (not those still in handshake); fn may close any of them. */
void dtls_endpoint_each(dtls_endpoint *ep, void (*fn)(dtls_conn *conn, void *user), void *user);

/* The same by turns, for very many: calls fn for each peer that is connected now, as long as it is, some in each turn of
 * the loop, so that nobody else has to wait; and then fn(NULL, user), also where the endpoint is freed meanwhile. The first
 * calls may come before this returns. 0; or DTLS_ERR_LIMIT (64 at once), _MEMORY or _STATE, and fn is not called. */
int dtls_endpoint_walk(dtls_endpoint *ep, void (*fn)(dtls_conn *conn, void *user), void *user);

/* config.user, and the loop it was made on (to stop it from a callback, say). */
void *dtls_endpoint_user(const dtls_endpoint *ep);
dtls_loop *dtls_endpoint_loop(const dtls_endpoint *ep);

/* Closes every connection (close_notify, DTLS_EV_CLOSED) and every socket, and frees the endpoint. NULL is fine. */
void dtls_endpoint_free(dtls_endpoint *ep);

/* Why datagrams or records were dropped before they could reach OpenSSL. */
typedef enum dtls_drop {
    DTLS_DROP_MALFORMED, /* no DTLS record, or cut short */
    DTLS_DROP_OVERSIZE,  /* larger than any record */
    DTLS_DROP_STRANGER,  /* neither a ClientHello nor from a known peer */
    DTLS_DROP_HELLO,     /* a ClientHello that is malformed, or repeated on a live connection */
    DTLS_DROP_LIMIT,     /* a limit is reached, or no memory */
    DTLS_DROP_EPOCH,     /* unprotected record on an established connection, or an epoch that cannot be */
    DTLS_DROP_SHORT,     /* protected record with no room for nonce and tag: fatal to OpenSSL */
    DTLS_DROP_ALERT,     /* unprotected alert during a handshake: anybody can send one */
    DTLS_DROP_DATA,      /* unprotected application data */
    DTLS_DROP_HANDSHAKE, /* handshake or ChangeCipherSpec record that no real peer sends */
    DTLS_DROP_EARLY,     /* protected records ahead of the handshake, beyond the handful that is kept */
    DTLS_DROP_SEND,      /* outgoing datagram that the system refused, or the transport, in a handshake */
    DTLS_DROP_DTLS13,    /* what looks like a record of DTLS 1.3 (RFC 9147) */
    DTLS_DROP_CID, /* a record with a connection ID (RFC 9146) that is nobody's, stale or forged; or one without, */
                   /* where it has to have one */
    DTLS_DROP_COUNT
} dtls_drop;

typedef struct dtls_counters {
    uint64_t datagrams_in, datagrams_out;
    uint64_t cookies_sent;       /* HelloVerifyRequests */
    uint64_t handshakes_full;    /* completed, both roles */
    uint64_t handshakes_resumed; /* completed, both roles */
    uint64_t handshakes_failed;
    uint64_t retransmissions; /* flights sent again by our timer */
    uint64_t moves;           /* of peers to other addresses, and of ours */
    uint64_t trials;          /* keys that were tried to find whose record one from an unknown address is */
    uint64_t trials_refused;  /* such records that were dropped, since roam_trials were used up */
    uint64_t receive_errors;  /* errors the system reported on a socket; life goes on */
    uint64_t dropped[DTLS_DROP_COUNT];
    size_t conns;      /* now, those in handshake included */
    size_t handshakes; /* now */
} dtls_counters;

void dtls_endpoint_counters(const dtls_endpoint *ep, dtls_counters *counters);
const char *dtls_drop_name(dtls_drop reason); /* "malformed", ...; any thread */

/* ---- connection -------------------------------------------------------------------------------------------------- */

typedef enum dtls_reason {
    DTLS_CLOSE_NONE,     /* not closed */
    DTLS_CLOSE_LOCAL,    /* dtls_conn_close(), dtls_endpoint_free() */
    DTLS_CLOSE_PEER,     /* the peer's close_notify */
    DTLS_CLOSE_TIMEOUT,  /* the handshake did not finish in time, or gave way to newer ones */
    DTLS_CLOSE_IDLE,     /* nothing authentic came for idle_timeout_ms */
    DTLS_CLOSE_REPLACED, /* the same address completed a new association (RFC 6347 section 4.2.8) */
    DTLS_CLOSE_REFUSED,  /* the peer refused the handshake by an alert, or ICMP says that nobody listens there. */
                         /* Anybody can forge these, so they are believed if nothing else arrives for 3 s; */
                         /* an alert for 1 s, where a client has tried again */
    DTLS_CLOSE_VERIFY,   /* we refused the peer's certificate, or one connection more than we may have */
    DTLS_CLOSE_ERROR,    /* a protocol error, a fatal alert, no memory, or a host that is not known */
    DTLS_CLOSE_KEYS      /* its keys did as much as they safely can (RFC 9325 section 4.4): connect anew */
} dtls_reason;

typedef struct dtls_info {
    dtls_addr peer, local; /* peer: zero while its host is looked up */
    /* Whom the peer's certificate names; verified, like all of it. To decide who may do what use the fingerprint or a
     * subjectAltName that your CA controls; the commonName is good for logs. Names are UTF-8 with control characters, bytes
     * that are none of it and backslashes written as \x0a, so that different names differ here, too. */
    const char *peer_name;             /* the commonName, "" if there is none; above 256 bytes its peer is refused */
    const char *const *peer_alt_names; /* "DNS:host", "IP:192.0.2.1", "URI:...", "email:..."; then NULL */
    const char *peer_fingerprint;      /* SHA-256 of the certificate, 64 hexadecimal digits; "" without one */
    const char *peer_serial;           /* its serial number, hexadecimal; "" without one */
    int psk;               /* 1: peer_name is the identity of a pre-shared key; a server's, a client knows its own */
    const char *version;   /* "DTLSv1.2"; "" before DTLS_EV_CONNECTED, as the next */
    const char *alpn;      /* the application protocol that was agreed upon, or "" */
    const char *cipher;    /* OpenSSL's name; "" before the handshake chose one */
    int server;            /* 1: the peer connected to us */
    int connected;         /* 1 between DTLS_EV_CONNECTED and DTLS_EV_CLOSED */
    int resumed;           /* 1: the handshake was abbreviated */
    int64_t age_ms;        /* since the first datagram or dtls_endpoint_connect() */
    int64_t silent_ms;     /* since the last authentic message, or since connecting */
    int64_t round_trip_us; /* the quickest answer that the handshakes saw; 0: not known */
    uint64_t resends;      /* flights of its handshakes that were sent again: the path loses, or is slow */
    unsigned renewals;     /* DTLS_EV_RENEWED so far */
    unsigned moves;        /* DTLS_EV_MOVED so far */
    int cid_in, cid_out;   /* bytes of the connection ID in records that come and that go; -1: none were agreed upon */
    uint64_t messages_in, messages_out, bytes_in, bytes_out; /* application data */
} dtls_info;

/* Sends one message of 1 to DTLS_MESSAGE_MAX bytes as one record in one datagram (SSL_write); the bytes are copied. A peer
 * that negotiated max_fragment_length (RFC 6066 section 4) takes less: DTLS_ERR_SIZE.
 * A message may be lost or overtaken by a later one; it never arrives twice. It leaves at the end of the turn, at once if
 * no turn is under way. Returns 0; or DTLS_ERR_SIZE, _STATE or _AGAIN with the connection unharmed; or DTLS_ERR_TLS, after
 * DTLS_EV_CLOSED was raised. */
int dtls_conn_send(dtls_conn *conn, const void *data, size_t len);

/* The largest message that needs no IP fragmentation, as far as the handshake found out (DTLS_get_data_mtu), and that the
 * peer takes; 0 before it is done. */
size_t dtls_conn_payload_max(const dtls_conn *conn);

/* A client's: asks whether the peer is still there, in a way that every server and every application protocol has: by
 * another handshake, which resumes the session if the peer remembers it, from another local port (from the same address with
 * a transport of your own, which only a server understands that does as RFC 6347 section 4.2.8 says). Until it is done the
 * connection goes on as it is; then DTLS_EV_RENEWED is raised and the old association gets a close_notify. One that is not
 * done within handshake_timeout_ms changes nothing: a peer that serves one client at a time cannot answer it. The library
 * does this itself after unanswered_ms, and when ICMP tells that nobody listens there any more (which anybody can forge, so
 * it ends nothing), every 5 s at most. Returns 0, also if one is under way; DTLS_ERR_STATE if it is no client's or not
 * connected; or an error of dtls_endpoint_connect(). */
int dtls_conn_renew(dtls_conn *conn);

/* A client's: goes on with the same connection from another local port, and from another address if the way to its peer is
 * another one now. It needs a peer that follows: one with connection IDs (dtls_info.cid_out above 0), or a server made with
 * this library. DTLS_EV_MOVED is raised. Where the peer can be asked whether it is reached (RFC 9853), it is; otherwise it
 * learns of the move by the next message. The library does this itself when the system says that the old address is gone,
 * where the peer has a connection ID for us also when it does not answer for 5 s (asked by RFC 9853, otherwise half of
 * unanswered_ms, if that is set). Returns 0; DTLS_ERR_STATE if it is no client's, not connected or has a transport of your
 * own; or DTLS_ERR_SYSTEM, and nothing changed. */
int dtls_conn_rebind(dtls_conn *conn);

/* Sends close_notify once, raises DTLS_EV_CLOSED before it returns, and lets go; never waits. */
void dtls_conn_close(dtls_conn *conn);

/* Strings in info are valid until the connection is gone or renewed, alpn until the endpoint reloads. */
void dtls_conn_info(const dtls_conn *conn, dtls_info *info);

dtls_reason dtls_conn_reason(const dtls_conn *conn);
const char *dtls_conn_reason_text(const dtls_conn *conn); /* one line, until the conn is gone; "" while not closed */

dtls_endpoint *dtls_conn_endpoint(const dtls_conn *conn);
void *dtls_conn_user(const dtls_conn *conn);
void dtls_conn_set_user(dtls_conn *conn, void *user);

/* The session to resume later, from DTLS_EV_CONNECTED on: a reference that you free with SSL_SESSION_free(), or NULL. It
 * may be saved (i2d_SSL_SESSION) and used by another endpoint and process; it holds keys. */
struct ssl_session_st *dtls_conn_session(const dtls_conn *conn);

/* Bytes that only the two ends can know, for keys of your own (RFC 5705, SSL_export_keying_material); other ones after
 * DTLS_EV_RENEWED. Returns 0, DTLS_ERR_STATE if it is not connected, or DTLS_ERR_TLS. */
int dtls_conn_export(const dtls_conn *conn, const char *label, void *out, size_t len);

/* The SSL, to look things up, from DTLS_EV_CONNECTED on (NULL before: a client may begin its handshake anew, on
 * another), and another one from DTLS_EV_RENEWED on. Do not read, write, shut down or free it, and do not change its BIO. */
struct ssl_st *dtls_conn_ssl(const dtls_conn *conn);

#ifdef __cplusplus
}
#endif
#endif
