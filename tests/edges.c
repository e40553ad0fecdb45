/* What dtls.h says of errors, limits and misuse, tried call by call, and what OpenSSL's escape hatches may do to us. Time is
 * virtual; datagrams go through memory where no socket is what is tried. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <openssl/pem.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    POLL_MS = 50, /* real time, where sockets are */
    POLLS = 100,
    TIMERS = 70, /* the heap has room for 63 and grows then */
    BURST = 40,  /* messages, more than one system call reads */
    POSTS_MAX = 65536,
    JUNK = 1000,
    SIGNALS_MAX = 16,
    NO_SIGNAL = 9999
};

static int drop_all(const struct datagram *d)
{
    (void)d;
    return 1;
}

/* One more client that shows its cookie to the server and hears no more. */
static void half_open(void)
{
    client_addr.port++;
    connect_client(NULL);
    for (int i = 0; i < 3; i++)
        turn();
    wire_len = 0;
}

/* ---- texts, frees, the loop ---- */

static void test_texts(void)
{
    int good = 1;
    for (int code = 0; code >= DTLS_ERR_LIMIT; code--)
        good &= dtls_strerror(code)[0] != 0 && strcmp(dtls_strerror(code), "unknown error") != 0;
    CHECK_THAT(good && strcmp(dtls_strerror(1), "unknown error") == 0 &&
                   strcmp(dtls_strerror(DTLS_ERR_LIMIT - 1), "unknown error") == 0,
               "each error has a text, others have none");
    good = 1;
    for (int i = 0; i < DTLS_DROP_COUNT; i++)
        good &= strcmp(dtls_drop_name((dtls_drop)i), "unknown") != 0;
    CHECK_THAT(good && strcmp(dtls_drop_name(DTLS_DROP_COUNT), "unknown") == 0, "each reason to drop has a name");
    CHECK_TEXT(dtls_version(), DTLS_C_VERSION, "version of header and code");
}

static void test_addresses(void)
{
    const struct sockaddr unknown = {.sa_family = AF_UNIX};
    const struct sockaddr_in6 six = {.sin6_family = AF_INET6};
    dtls_addr a, b[4];
    int equal = 0;
    dtls_addr_parse(&a, "[fe80::1%1]:1", NULL);
    for (int i = 0; i < 4; i++)
        b[i] = a;
    b[0].ip[15]++;
    b[1].port++;
    b[2].scope++;
    b[3].family = 4;
    for (int i = 0; i < 4; i++)
        equal += dtls_addr_equal(&a, &b[i]);
    CHECK_THAT(dtls_addr_equal(&a, &a) && equal == 0, "equal addresses are equal in everything");
    CHECK_THAT(dtls_addr_from_sockaddr(&a, &unknown, sizeof six) == DTLS_ERR_ADDR &&
                   dtls_addr_from_sockaddr(&a, (const struct sockaddr *)&six, sizeof six - 1) == DTLS_ERR_ADDR &&
                   dtls_addr_from_sockaddr(&a, (const struct sockaddr *)&six, sizeof six) == 0,
               "a sockaddr of another family, one cut short");
    struct sockaddr_storage back;
    dtls_addr again, none = {0};
    CHECK_THAT(dtls_addr_to_sockaddr(&a, (struct sockaddr *)&back, sizeof back) == sizeof(struct sockaddr_in6) &&
                   dtls_addr_from_sockaddr(&again, (struct sockaddr *)&back, sizeof back) == 0 &&
                   dtls_addr_equal(&a, &again) && dtls_addr_parse(&a, "192.0.2.1:77", NULL) == 0 &&
                   dtls_addr_to_sockaddr(&a, (struct sockaddr *)&back, sizeof(struct sockaddr_in)) ==
                       sizeof(struct sockaddr_in) &&
                   dtls_addr_from_sockaddr(&again, (struct sockaddr *)&back, sizeof(struct sockaddr_in)) == 0 &&
                   dtls_addr_equal(&a, &again),
               "and the way back");
    CHECK_THAT(dtls_addr_to_sockaddr(&none, (struct sockaddr *)&back, sizeof back) == 0 &&
                   dtls_addr_to_sockaddr(&a, (struct sockaddr *)&back, sizeof(struct sockaddr_in) - 1) == 0,
               "no address, no room");
}

static void nothing(void *user)
{
    (void)user;
}

static int state_errors;

static void misuse(void *user)
{
    state_errors = (dtls_loop_poll(user, 0) == DTLS_ERR_STATE) + (dtls_loop_run(user) == DTLS_ERR_STATE);
    dtls_loop_stop(user);
}

static void test_loop(void)
{
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    dtls_timer_free(NULL);
    dtls_watch_free(NULL);
    dtls_endpoint_free(NULL);
    dtls_loop_free(NULL);
    dtls_loop *plain = dtls_loop_new(&(dtls_loop_config){0});
    CHECK_THAT(plain && dtls_loop_now(plain) > 0, "a zeroed loop configuration is the default");
    dtls_loop_free(plain);
    dtls_timer *t = dtls_timer_new(loop, misuse, loop);
    dtls_timer_set(t, (int64_t)INT_MAX * 3);
    CHECK_EQ(dtls_loop_timeout(loop), INT_MAX, "a timer beyond all int milliseconds");
    dtls_timer_set(t, -1);
    CHECK_EQ(dtls_loop_timeout(loop), -1, "a negative delay stops a timer");
    dtls_timer_set(t, 0);
    CHECK_THAT(dtls_loop_run(loop) == 0 && state_errors == 2, "no turn inside a turn");
    int posted = 0;
    while (posted < POSTS_MAX && dtls_loop_post(loop, nothing, NULL) == 0)
        posted++;
    CHECK_THAT(posted == POSTS_MAX && dtls_loop_post(loop, nothing, NULL) == DTLS_ERR_AGAIN,
               "65,536 posts wait, not more");
    dtls_loop_poll(loop, 0);
    CHECK_EQ(dtls_loop_post(loop, nothing, NULL), 0, "and there is room again after a turn");
    dtls_loop_free(loop);
}

static dtls_timer *own_timer;
static int own_fired;

static void free_own_timer(void *user)
{
    (void)user;
    own_fired++;
    dtls_timer_free(own_timer);
    dtls_timer_free(own_timer);
    dtls_timer_set(own_timer, 0);
}

static void stop_timer(void *other)
{
    own_fired++;
    dtls_timer_set(other, -1);
}

static void test_stopped_timer(void)
{
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    dtls_timer *second = dtls_timer_new(loop, free_own_timer, NULL);
    dtls_timer *first = dtls_timer_new(loop, stop_timer, second);
    own_fired = 0;
    dtls_timer_set(first, 0);
    dtls_timer_set(second, 0);
    dtls_loop_poll(loop, 0);
    CHECK_EQ(own_fired, 1, "a timer stopped by another one of the same turn");
    CHECK_EQ(dtls_loop_timeout(loop), -1, "and no other is set");
    dtls_loop_free(loop);
}

/* Memory goes away at the end of the turn, so until then a freed timer may be met again. */
static void test_freed_timers(void)
{
    int timeout = 0;
    own_fired = 0;
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    for (int i = 0; i < TIMERS; i++) {
        dtls_timer_set(dtls_timer_new(loop, nothing, NULL), INT64_MAX);
        own_timer = dtls_timer_new(loop, free_own_timer, NULL);
        dtls_timer_set(own_timer, 0);
        dtls_loop_poll(loop, 0);
        dtls_loop_poll(loop, 0);
        timeout = dtls_loop_timeout(loop);
    }
    CHECK_EQ(own_fired, TIMERS, "a timer freed in its own callback, twice, and set");
    CHECK_EQ(timeout, INT_MAX, "and the others are as they were");
    int posted = dtls_loop_post(loop, free_own_timer, NULL);
    dtls_loop_free(loop);
    CHECK_THAT(posted == 0 && own_fired == TIMERS, "what is posted to a loop that is freed is not called");
}

static dtls_watch *watches[2];
static int fired;

static void free_both(void *user, int fd, unsigned events)
{
    (void)user, (void)fd, (void)events;
    fired++;
    dtls_watch_free(watches[0]);
    dtls_watch_free(watches[1]);
    dtls_watch_free(watches[1]);
}

static int set_after_free;

static void free_and_set(void *user, int fd, unsigned events)
{
    (void)user, (void)fd, (void)events;
    fired++;
    dtls_watch_free(watches[0]);
    set_after_free = dtls_watch_set(watches[0], DTLS_READ);
}

static void silence_both(void *user, int fd, unsigned events)
{
    (void)user, (void)fd, (void)events;
    fired++;
    dtls_watch_set(watches[0], 0);
    dtls_watch_set(watches[1], 0);
}

static void test_watches(void)
{
    int ends[2][2];
    loop = dtls_loop_new(NULL);
    for (int i = 0; i < 2; i++) {
        REQUIRE(pipe(ends[i]) == 0 && write(ends[i][1], "x", 1) == 1, "a pipe");
        watches[i] = dtls_watch_new(loop, ends[i][0], DTLS_READ, silence_both, NULL);
    }
    dtls_loop_poll(loop, 1000);
    CHECK_EQ(fired, 1, "a watch set to nothing in another one's callback is silent at once");
    fired = 0;
    for (int i = 0; i < 2; i++) {
        dtls_watch_free(watches[i]);
        watches[i] = dtls_watch_new(loop, ends[i][0], DTLS_READ, free_both, NULL);
    }
    dtls_loop_poll(loop, 1000);
    dtls_loop_poll(loop, 0);
    CHECK_EQ(fired, 1, "a watch freed in another one's callback is silent at once");
    fired = 0;
    watches[0] = dtls_watch_new(loop, ends[0][0], DTLS_READ, free_and_set, NULL);
    CHECK_THAT(!dtls_watch_new(loop, ends[0][0], DTLS_READ, free_both, NULL) && errno == EEXIST,
               "no second watch on a descriptor");
    CHECK_THAT(dtls_watch_set(watches[0], 4) == DTLS_ERR_ARG &&
                   !dtls_watch_new(loop, ends[1][0], DTLS_READ | 8, free_both, NULL) && errno == EINVAL,
               "event bits that do not exist are refused");
    dtls_loop_poll(loop, 1000);
    dtls_loop_poll(loop, 0);
    CHECK_THAT(fired == 1 && set_after_free == DTLS_ERR_STATE, "a watch set after it was freed in the same turn");
    CHECK_THAT(!dtls_watch_new(loop, -1, DTLS_READ, free_both, NULL), "no watch on a closed descriptor");
    FILE *f = tmpfile();
    watches[0] = dtls_watch_new(loop, fileno(f), 0, free_both, NULL);
    CHECK_THAT(watches[0] && dtls_watch_set(watches[0], DTLS_READ) == DTLS_ERR_SYSTEM && errno == EPERM &&
                   !dtls_watch_new(loop, fileno(f), DTLS_READ | DTLS_WRITE, free_both, NULL) && errno == EPERM,
               "no watch on a regular file");
    fclose(f);
    dtls_loop_free(loop);
    for (int i = 0; i < 4; i++)
        close(ends[i / 2][i % 2]);
}

static int signals[2];

static void count_signal(void *user, int signo)
{
    (void)signo;
    ++*(int *)user;
}

/* Any of these would end the process where the signal is not watched any more. */
static void raise_at_end(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s, (void)conn;
    if (event == DTLS_EV_CLOSED)
        raise(SIGTERM);
}

static void test_signals_at_the_end(void)
{
    sigset_t now;
    dtls_loop *loops[2];
    int before = signals[1];
    bool one_queue = false;
#if defined(DTLS_USE_KQUEUE) && defined(__linux__)
    one_queue = true;
    test_skip("two loops that watch one signal", "in tests/kqueue a signal is on one queue");
#endif
    for (int i = 0; i < 2 && !one_queue; i++) {
        loops[i] = dtls_loop_new(NULL);
        dtls_loop_signal(loops[i], SIGUSR1, count_signal, &signals[i]);
    }
    if (!one_queue) {
        dtls_loop_free(loops[0]);
        raise(SIGUSR1);
        dtls_loop_poll(loops[1], 1000);
        CHECK_EQ(signals[1], before + 1, "a loop that goes leaves the signal to another one that watches it");
        dtls_loop_free(loops[1]);
        sigprocmask(SIG_BLOCK, NULL, &now);
        CHECK_EQ(sigismember(&now, SIGUSR1), 0, "and the last one puts it back as it was");
    }

    start((dtls_config){0}, (dtls_config){0});
    connected();
    dtls_loop_signal(loop, SIGTERM, count_signal, &signals[0]);
    client.inside = raise_at_end;
    stop();
    CHECK_THAT(sigprocmask(SIG_BLOCK, NULL, &now) == 0 && sigismember(&now, SIGTERM) == 0,
               "a signal while the loop is freed does not cut that short");
}

static void test_signals(void)
{
    static const int some[SIGNALS_MAX + 1] = {SIGHUP,  SIGINT,  SIGQUIT,  SIGUSR1, SIGUSR2, SIGPIPE,
                                              SIGALRM, SIGTERM, SIGCHLD,  SIGCONT, SIGTSTP, SIGTTIN,
                                              SIGTTOU, SIGURG,  SIGWINCH, SIGIO,   SIGXCPU};
    sigset_t set, now;
    int taken = 0;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    sigprocmask(SIG_BLOCK, &set, NULL);
    loop = dtls_loop_new(NULL);
    while (taken <= SIGNALS_MAX && dtls_loop_signal(loop, some[taken], count_signal, &signals[0]) == 0)
        taken++;
    CHECK_THAT(taken == SIGNALS_MAX && dtls_loop_signal(loop, SIGXCPU, count_signal, NULL) == DTLS_ERR_LIMIT,
               "16 signals, not more");
    CHECK_EQ(dtls_loop_signal(loop, SIGXCPU, NULL, NULL), 0, "a signal that is not watched may be let go");
    dtls_loop_signal(loop, SIGUSR1, count_signal, &signals[1]);
    raise(SIGUSR1);
    dtls_loop_poll(loop, 1000);
    CHECK_EQ(signals[1], 1, "a second function takes the first one's place");
    CHECK_EQ(signals[0], 0, "which is not called");
    dtls_loop_free(loop);
    sigprocmask(SIG_BLOCK, NULL, &now);
    CHECK_THAT(sigismember(&now, SIGUSR2) == 1 && sigismember(&now, SIGUSR1) == 0, "signals are blocked as before");
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    loop = dtls_loop_new(NULL);
    CHECK_EQ(dtls_loop_signal(loop, 0, count_signal, NULL), DTLS_ERR_ARG, "signal 0 is none");
    CHECK_THAT(dtls_loop_signal(loop, NO_SIGNAL, count_signal, NULL) < 0 &&
                   dtls_loop_signal(loop, SIGKILL, count_signal, NULL) == DTLS_ERR_ARG &&
                   dtls_loop_signal(loop, SIGSTOP, count_signal, NULL) == DTLS_ERR_ARG,
               "a signal that does not exist, two that nobody can catch");
    dtls_loop_free(loop);
}

/* ---- configuration and files ---- */

/* NULL, if such an endpoint is refused with this code and these words. */
static const char *refusal(dtls_config cfg, int code, const char *words)
{
    static char wrong[400];
    dtls_error err = {0};
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    snprintf(wrong, sizeof wrong, "wanted %d \"%s\", got %d \"%s\"", code, words, ep ? 0 : err.code,
             ep ? "an endpoint" : err.text);
    int good = !ep && err.code == code && strstr(err.text, words) && !strchr(err.text, '\n');
    dtls_endpoint_free(ep);
    return good ? NULL : wrong;
}

#define CHECK_REFUSED(cfg, code, words, ...) check_print(__LINE__, refusal(cfg, code, words), __VA_ARGS__)

static void test_ranges(void)
{
    static const dtls_config bad[] = {
        {.mtu_bytes = 255},
        {.mtu_bytes = 65536},
        {.retransmit_max_ms = 600001},
        {.retransmit_ms = -1},
        {.retransmit_ms = 7000},
        {.handshake_timeout_ms = -1},
        {.idle_repeat_ms = -1},
        {.idle_timeout_ms = -2},
        {.idle_ms = -2},
        {.cookie_ms = -1},
        {.max_conns = -1},
        {.max_handshakes = -1},
        {.datagrams_per_turn = -1},
        {.send_queue_bytes = -1},
        {.socket_buffer_bytes = -1},
        {.session_cache = -2},
        {.unanswered_ms = -2},
        {.max_chain_bytes = 511},
        {.max_chain_bytes = 65537},
        {.max_conns_per_address = -2},
        {.max_conns_per_identity = -2},
        {.roam_trials = -2},
        {.roam_trials_each = -1},
        {.cid_bytes = DTLS_CID_MAX + 1},
        {.cid_bytes = DTLS_CID_EMPTY - 1},
    };
    const char *wrong = NULL;
    loop = dtls_loop_new(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad && !wrong; i++)
        wrong = refusal(bad[i], DTLS_ERR_ARG, bad[i].mtu_bytes ? "MTU" : "");
    check_print(__LINE__, wrong, "each value out of range is refused");
    dtls_loop_free(loop);
}

static char folder[] = "/tmp/dtls-edges-XXXXXX";

static const char *file(const char *name)
{
    static char path[64][128];
    static int next;
    char *p = path[next++ % 64];
    snprintf(p, sizeof path[0], "%s/%s", folder, name);
    return p;
}

static void write_cert(const char *name, const struct identity *id)
{
    FILE *f = fopen(file(name), "w");
    if (f && PEM_write_X509(f, id->cert) == 1)
        fclose(f);
}

static void write_key(const char *name, const struct identity *id, const char *password)
{
    FILE *f = fopen(file(name), "w");
    if (f && PEM_write_PrivateKey(f, id->key, password ? EVP_aes_128_cbc() : NULL, NULL, 0, NULL,
                                  (void *)(uintptr_t)password) == 1)
        fclose(f);
}

static void write_text(const char *name, const char *text)
{
    FILE *f = fopen(file(name), "w");
    if (f && fputs(text, f) >= 0)
        fclose(f);
}

static void remove_files(void)
{
    static const char *const names[] = {"ca",    "cert",  "key",  "other-key", "locked-key", "expired", "expired-key",
                                        "early", "empty", "text", "both",      "both-key",   "spoilt",  "spoilt-key"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        unlink(file(names[i]));
    rmdir(file("folder"));
    rmdir(folder);
}

/* For each test that needs them; only the first time counts. */
static void make_files(void)
{
    static bool made;
    if (made)
        return;
    made = true;
    struct identity expired = issue(10, "expired", "serverAuth"), early = issue(11, "early", "serverAuth");
    struct identity both = issue(12, "both", "serverAuth,clientAuth"), spoilt = issue(13, "spoilt", "DER:0500");
    REQUIRE(mkdtemp(folder) && mkdir(file("folder"), 0700) == 0, "a folder for files");
    atexit(remove_files);
    ASN1_TIME_set_string(X509_getm_notAfter(expired.cert), "20210101000000Z");
    ASN1_TIME_set_string(X509_getm_notBefore(early.cert), "20900101000000Z");
    X509_sign(expired.cert, ca.key, EVP_sha256());
    X509_sign(early.cert, ca.key, EVP_sha256());
    write_cert("ca", &ca);
    write_cert("cert", &server_id);
    write_key("key", &server_id, NULL);
    write_key("other-key", &client_id, NULL);
    write_key("locked-key", &server_id, "secret");
    write_cert("expired", &expired);
    write_key("expired-key", &expired, NULL);
    write_cert("early", &early);
    write_cert("both", &both);
    write_key("both-key", &both, NULL);
    write_cert("spoilt", &spoilt);
    write_key("spoilt-key", &spoilt, NULL);
    write_text("empty", "");
    write_text("text", "no PEM\n");
    identity_free(&spoilt);
    identity_free(&both);
    identity_free(&expired);
    identity_free(&early);
}

static int give_up(void *user, SSL_CTX *ctx)
{
    (void)user, (void)ctx;
    return 1;
}

static int with_cbc(void *user, SSL_CTX *ctx)
{
    (void)user;
    return SSL_CTX_set_cipher_list(ctx, "ECDHE-ECDSA-AES128-SHA") != 1;
}

/* The reason stands at the end, and the end must not be lost to a path of any length. */
static void test_long_path(void)
{
    make_files();
    char path[300];
    dtls_config cfg = {.cert_file = path, .key_file = file("expired-key"), .ca_file = file("ca")};
    snprintf(path, sizeof path, "%s", folder);
    while (strlen(path) < sizeof path - 12)
        strcat(path, "/.");
    strcat(path, "/expired");
    loop = dtls_loop_new(NULL);
    CHECK_REFUSED(cfg, DTLS_ERR_CERT, "expired on", "the reason is there however long the path");
    dtls_loop_free(loop);
}

static int with_cert(void *user, SSL_CTX *ctx)
{
    (void)user;
    return SSL_CTX_use_certificate(ctx, server_id.cert) != 1;
}

static void test_files(void)
{
    make_files();
    const dtls_config good = {.cert_file = file("cert"), .key_file = file("key"), .ca_file = file("ca")};
    const struct {
        const char *cert, *key, *ca, *words;
    } bad[] = {{"none", "key", "ca", "No such file"},          {"empty", "key", "ca", "empty"},
               {"folder", "key", "ca", "directory"},           {"text", "key", "ca", "no certificate in PEM"},
               {"spoilt", "spoilt-key", "ca", "certificate"}, /* who says so depends on OpenSSL's version */
               {"expired", "expired-key", "ca", "expired on"}, {"early", "key", "ca", "not valid before"},
               {"cert", "none", "ca", "No such file"},         {"cert", "empty", "ca", "empty"},
               {"cert", "text", "ca", "no private key"},       {"cert", "locked-key", "ca", "password"},
               {"cert", "other-key", "ca", "does not match"},  {"cert", "key", "none", "No such file"},
               {"cert", "key", "text", "no CA certificate"},   {"cert", "key", "folder", "directory"}};
    loop = dtls_loop_new(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dtls_config cfg = {.cert_file = file(bad[i].cert), .key_file = file(bad[i].key), .ca_file = file(bad[i].ca)};
        CHECK_REFUSED(cfg, DTLS_ERR_CERT, bad[i].words, "files %s, %s, %s: %s", bad[i].cert, bad[i].key, bad[i].ca,
                      bad[i].words);
    }
    dtls_config cfg = good;
    cfg.on_ssl_ctx = give_up;
    CHECK_REFUSED(cfg, DTLS_ERR_TLS, "on_ssl_ctx gave up", "a hook that gives up");
    cfg.on_ssl_ctx = with_cbc;
    CHECK_REFUSED(cfg, DTLS_ERR_ARG, "AEAD", "a hook that wants CBC");
    CHECK_REFUSED(((dtls_config){.ca_file = good.ca_file}), DTLS_ERR_CERT, "needed", "no certificate at all");
    CHECK_REFUSED(((dtls_config){.cert_file = good.cert_file}), DTLS_ERR_CERT, "needed", "a certificate and no key");
    CHECK_REFUSED(((dtls_config){.on_ssl_ctx = with_cert}), DTLS_ERR_CERT, "needed", "the same by a hook");
    CHECK_REFUSED(((dtls_config){.cert_file = good.cert_file, .key_file = good.key_file}), DTLS_ERR_CERT, "CA",
                  "nobody to trust");
    CHECK_REFUSED(((dtls_config){.key_file = good.key_file}), DTLS_ERR_CERT, "needed", "a key and no certificate");
    dtls_loop_free(loop);
}

/* ---- listening and connecting ---- */

static void test_listening(void)
{
    dtls_error err = {0};
    loop = dtls_loop_new(NULL);
    dtls_endpoint *ep = endpoint_new(loop, "server", (dtls_config){0}),
                  *other = endpoint_new(loop, "server", (dtls_config){0});
    dtls_endpoint *not_a_server = endpoint_new(loop, "client", (dtls_config){0});
    dtls_addr none = {0}, a = address("127.0.0.1:0"), again, everywhere = address("[::]:0");
    CHECK_THAT(dtls_endpoint_listen(ep, NULL, &err) == DTLS_ERR_ARG &&
                   dtls_endpoint_listen(ep, &none, &err) == DTLS_ERR_ARG,
               "listening on no address");
    CHECK_THAT(dtls_endpoint_listen(not_a_server, &a, &err) == DTLS_ERR_CERT && strstr(err.text, "server"),
               "listening with a client's certificate");
    dtls_target t = {.peer = address("127.0.0.1:9")};
    CHECK_THAT(!dtls_endpoint_connect(ep, &t, &err) && err.code == DTLS_ERR_CERT && strstr(err.text, "client"),
               "connecting with a server's certificate");
    CHECK_THAT(dtls_endpoint_listen(ep, &a, &err) == 0 && a.port != 0, "port 0 becomes a port");
    dtls_addr beside[] = {address("127.0.0.2:0"), address("[::1]:0")};
    for (int i = 0; i < 2; i++) {
        beside[i].port = a.port;
        if (dtls_endpoint_listen(ep, &beside[i], &err) < 0)
            test_skip("the same port elsewhere", err.text);
        else
            CHECK_THAT(dtls_endpoint_listen(ep, &beside[i], &err) == 1,
                       "the same port on another address is another socket");
    }
    again = a;
    CHECK_EQ(dtls_endpoint_listen(ep, &again, &err), 1, "the same address again is covered");
    CHECK_THAT(dtls_endpoint_listen(other, &again, &err) == DTLS_ERR_SYSTEM && strstr(err.text, strerror(EADDRINUSE)),
               "an address in use");
    dtls_addr any = address("0.0.0.0:0"), both = address("[::]:0");
    int first = dtls_endpoint_listen(ep, &any, &err);
    both.port = any.port;
    CHECK_THAT(first == 0 && dtls_endpoint_listen(ep, &both, &err) == 0 && dtls_endpoint_listen(ep, &both, &err) == 1,
               "[::]:p behind 0.0.0.0:p adds what that leaves out");
    dtls_addr six = {.family = 6, .port = a.port};
    CHECK_EQ(dtls_endpoint_listen(other, &six, &err), DTLS_ERR_SYSTEM, "[::]:p where 127.0.0.1:p is another's");
    CHECK_THAT(dtls_endpoint_listen(other, &everywhere, &err) == 0 && everywhere.port != 0,
               "[::]:0 finds a port for both");
    dtls_addr four = {.family = 4, .port = everywhere.port, .ip = {127, 0, 0, 1}};
    CHECK_EQ(dtls_endpoint_listen(other, &four, &err), 1, "and covers IPv4");
    dtls_loop_free(loop);
}

/* A client's own socket has an address, too, and does not listen. */
static void test_listening_on_own(void)
{
    make_files();
    dtls_error err = {0};
    dtls_info info;
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    dtls_endpoint *ep = dtls_endpoint_new(
        loop, &(dtls_config){.cert_file = file("both"), .key_file = file("both-key"), .ca_file = file("ca")}, &err);
    dtls_target t = {.peer = address("127.0.0.1:9")}, none = {0}, no_port = {.peer = address("127.0.0.1:0")};
    dtls_conn *c = ep ? dtls_endpoint_connect(ep, &t, &err) : NULL;
    REQUIRE(c, "endpoint in both roles: %s", err.text);
    dtls_conn_info(c, &info);
    CHECK_EQ(dtls_endpoint_listen(ep, &info.local, &err), DTLS_ERR_SYSTEM, "a client's own address is not listened on");
    CHECK_THAT(!dtls_endpoint_connect(ep, &none, &err) && err.code == DTLS_ERR_ARG &&
                   !dtls_endpoint_connect(ep, &no_port, &err) && err.code == DTLS_ERR_ARG,
               "connecting to no address, to no port");
    dtls_loop_free(loop);
}

static dtls_endpoint *burst_server, *burst_client;
static dtls_conn *burst_conn;
static int burst_messages, burst_closed;

static void free_at_message(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    (void)data, (void)len;
    dtls_conn_info(conn, &info);
    burst_closed += event == DTLS_EV_CLOSED;
    if (event == DTLS_EV_CONNECTED && !info.server)
        burst_conn = conn;
    if (event != DTLS_EV_MESSAGE)
        return;
    burst_messages++;
    dtls_endpoint_free(burst_server);
    dtls_endpoint_free(burst_client);
}

/* The other datagrams of the same system call, and the other socket's events of the same turn, find nobody. */
static void test_freed_in_a_burst(void)
{
    dtls_error err = {0};
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    burst_server = endpoint_new(loop, "server", (dtls_config){.on_event = free_at_message});
    burst_client = endpoint_new(loop, "client", (dtls_config){.on_event = free_at_message});
    dtls_addr a = address("127.0.0.1:0");
    int good = dtls_endpoint_listen(burst_server, &a, &err) == 0 &&
               dtls_endpoint_connect(burst_client, &(dtls_target){.peer = a}, &err);
    for (int i = 0; i < POLLS && good && !burst_conn; i++)
        dtls_loop_poll(loop, POLL_MS);
    for (int i = 0; i < BURST && burst_conn; i++)
        dtls_conn_send(burst_conn, "x", 1);
    for (int i = 0; i < POLLS && burst_conn && burst_closed < 2; i++)
        dtls_loop_poll(loop, POLL_MS);
    CHECK_EQ(burst_messages, 1, "both ends freed at the first of many messages");
    CHECK_EQ(burst_closed, 2, "and each is told once");
    dtls_loop_free(loop);
}

static dtls_addr asked_on;

static void note_local(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    (void)data, (void)len;
    dtls_conn_info(conn, &info);
    if (event == DTLS_EV_CONNECTED && info.server)
        asked_on = info.local;
}

/* A client's socket is connected: it takes nothing from another address than the one it asked. */
static void test_wildcard(void)
{
    const char *what = "a wildcard socket answers from the address it was asked on";
    dtls_error err = {0};
    dtls_addr any = address("0.0.0.0:0"), second = address("127.0.0.2:0");
    loop = dtls_loop_new(NULL);
    dtls_endpoint *listening = endpoint_new(loop, "server", (dtls_config){.on_event = note_local});
    dtls_endpoint *connecting = endpoint_new(loop, "client", (dtls_config){0});
    if (dtls_endpoint_listen(listening, &second, &err) < 0) {
        test_skip(what, err.text);
    } else {
        dtls_target t = {.peer = second, .name = "localhost"};
        int good = dtls_endpoint_listen(listening, &any, &err) == 0;
        t.peer.port = any.port;
        good = good && dtls_endpoint_connect(connecting, &t, &err);
        for (int i = 0; i < POLLS && good && !asked_on.family; i++)
            dtls_loop_poll(loop, POLL_MS);
        char got[DTLS_ADDR_TEXT], wanted[DTLS_ADDR_TEXT];
        dtls_addr_format(&asked_on, got, sizeof got);
        CHECK_TEXT(got, dtls_addr_format(&t.peer, wanted, sizeof wanted), "%s", what);
    }
    dtls_loop_free(loop);
}

static int poll_for(const int *count, int value)
{
    for (int i = 0; i < POLLS && *count < value; i++)
        dtls_loop_poll(loop, POLL_MS);
    return *count >= value;
}

static int descriptors(void)
{
    int n = 0;
    for (int fd = 0; fd < 256; fd++)
        n += fcntl(fd, F_GETFD) != -1;
    return n;
}

/* Through sockets. A client has one more for a while, however often it goes on from another port. */
static void test_rebinding(void)
{
    for (int cid_bytes = DTLS_NEVER; cid_bytes <= 0; cid_bytes++) {
        dtls_addr addr = address("127.0.0.1:0");
        dtls_info before, after;
        loop = server.loop = client.loop = dtls_loop_new(NULL);
        side_open(&server, "server", (dtls_config){.cid_bytes = cid_bytes});
        side_open(&client, "client", (dtls_config){0});
        server.echo = 1;
        dtls_endpoint_listen(server.ep, &addr, NULL);
        dtls_target t = {.peer = addr, .name = "localhost"};
        dtls_conn *c = dtls_endpoint_connect(client.ep, &t, NULL);
        CHECK_EQ(dtls_conn_rebind(c), DTLS_ERR_STATE, "not before it is connected");
        REQUIRE(poll_for(&client.connected, 1) && poll_for(&server.connected, 1), "a connection");
        CHECK_EQ(dtls_conn_rebind(server.conn), DTLS_ERR_STATE, "a server has one socket for all");
        dtls_conn_send(c, "before", 6);
        CHECK(poll_for(&client.messages, 1));
        dtls_conn_info(c, &before);
        int fds = descriptors();
        for (int i = 1; i <= 5; i++) {
            CHECK(dtls_conn_rebind(c) == 0 && client.moved == i);
            dtls_conn_info(c, &after);
            CHECK(after.local.port != before.local.port && dtls_addr_equal(&client.before, &before.local));
            before = after;
            dtls_conn_send(c, "behind", 6);
            CHECK(poll_for(&client.messages, 1 + i) && server.moved == i);
            dtls_conn_info(server.conn, &after);
            CHECK(dtls_addr_equal(&after.peer, &before.local));
        }
        CHECK_EQ(descriptors(), fds + 1, "%s: five moves, and one old socket",
                 cid_bytes ? "without an ID" : "with one");
        dtls_conn_close(c);
        CHECK(poll_for(&server.closed, 1));
        dtls_loop_poll(loop, 0);
        CHECK_EQ(descriptors(), fds - 1, "and none behind its end");
        dtls_loop_free(loop);
        memset(&server, 0, sizeof server);
        memset(&client, 0, sizeof client);
    }
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    CHECK_EQ(dtls_conn_rebind(client.conn), DTLS_ERR_STATE, "a transport of one's own has its own addresses");
    stop();
}

static void count_drops(const char *what, const dtls_addr *to, const void *data, size_t len, dtls_endpoint *ep,
                        dtls_drop drop)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(to->port)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0), one = 1;
    dtls_counters n = {0};
    memcpy(&in.sin_addr, to->ip, 4);
    setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &one, sizeof one);
    if (sendto(fd, data, len, 0, (struct sockaddr *)&in, sizeof in) != (ssize_t)len) {
        test_skip(what, strerror(errno));
    } else {
        for (int i = 0; i < POLLS && n.dropped[drop] == 0; i++) {
            dtls_loop_poll(loop, POLL_MS);
            dtls_endpoint_counters(ep, &n);
        }
        CHECK_EQ(n.dropped[drop], 1, "%s", what);
    }
    close(fd);
}

static void test_odd_datagrams(void)
{
    static unsigned char large[20000];
    dtls_counters n;
    loop = dtls_loop_new(NULL);
    dtls_endpoint *ep = endpoint_new(loop, "server", (dtls_config){0});
    dtls_addr a = address("0.0.0.0:0");
    dtls_endpoint_listen(ep, &a, NULL);
    dtls_addr to = address("127.0.0.1:0"), everybody = address("127.255.255.255:0");
    to.port = everybody.port = a.port;
    count_drops("a datagram larger than any record", &to, large, sizeof large, ep, DTLS_DROP_OVERSIZE);
    count_drops("a broadcast has no address to answer from", &everybody, "x", 1, ep, DTLS_DROP_STRANGER);
    dtls_loop_free(loop);

    start((dtls_config){0}, (dtls_config){0});
    dtls_endpoint_input(server.ep, large, sizeof large, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &n);
    CHECK_EQ(n.dropped[DTLS_DROP_OVERSIZE], 1, "the same through a transport of one's own");
    stop();
}

/* A ClientHello without a cookie and one with it, for hellos. */
static void record_hellos(void)
{
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = keep_hellos;
    REQUIRE(connected() && hellos[0].len > 0, "a handshake to record");
    stop();
}

/* Hellos without a cookie, and what anybody can write in the name of a peer. */
static void junk(dtls_endpoint *ep, const dtls_addr *from, const dtls_addr *to)
{
    static const unsigned char forged[][32] = {{23, 254, 253, 0, 1, 0, 0, 0, 0, 0, 9, 0, 8},  /* short, encrypted */
                                               {23, 254, 253, 0, 0, 0, 0, 0, 0, 0, 9, 0, 16}, /* not encrypted */
                                               {21, 254, 253, 0, 0, 0, 0, 0, 0, 0, 9, 0, 2, 2, 40},
                                               {22, 254, 253, 0, 0, 0, 0, 0, 0, 0, 9, 0, 12, 1, 0, 1},
                                               {0}};
    for (int i = 0; i < JUNK; i++) {
        dtls_addr stranger = *from;
        stranger.port = (uint16_t)(10000 + i);
        dtls_endpoint_input(ep, hellos[0].data, hellos[0].len, &stranger, to);
        dtls_endpoint_input(ep, hellos[0].data, hellos[0].len, from, to);
        for (size_t k = 0; k < sizeof forged / sizeof *forged; k++) {
            size_t len = forged[k][0] == 0 ? 32 : 13 + (size_t)forged[k][12];
            dtls_endpoint_input(ep, forged[k], len, from, to);
            dtls_endpoint_input(ep, forged[k], len, &stranger, to);
        }
        wire_len = 0; /* a real client among them would be answered as well */
    }
}

static void test_junk_and_timers(void)
{
    record_hellos();
    start((dtls_config){0}, (dtls_config){0});
    junk(server.ep, &client_addr, &server_addr);
    CHECK_EQ(dtls_loop_timeout(loop), -1, "no timer for strangers' hellos and junk");
    CHECK_THAT(connected(), "a client gets in after them");
    turn();
    int before = dtls_loop_timeout(loop);
    junk(server.ep, &client_addr, &server_addr);
    junk(client.ep, &server_addr, &client_addr);
    CHECK_THAT(before > 0 && dtls_loop_timeout(loop) == before, "no timer for junk in a peer's name");
    stop();
}

/* Two messages in one batch, and the first one's callback ends it all. */

static dtls_endpoint *ending;
static int batch_connected, batch_messages;

static void end_at_message(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    (void)data, (void)len;
    batch_connected += event == DTLS_EV_CONNECTED;
    if (event != DTLS_EV_MESSAGE)
        return;
    batch_messages++;
    if (dtls_conn_endpoint(conn) == ending)
        dtls_endpoint_free(ending);
}

static void test_end_in_a_batch(void)
{
    dtls_loop *servers = dtls_loop_new(NULL), *clients = dtls_loop_new(NULL);
    ending = endpoint_new(servers, "server", (dtls_config){.on_event = end_at_message});
    dtls_addr a = address("127.0.0.1:0");
    dtls_endpoint_listen(ending, &a, NULL);
    dtls_endpoint *ep = endpoint_new(clients, "client", (dtls_config){.on_event = end_at_message});
    dtls_target t = {.peer = a};
    dtls_conn *conns[2] = {dtls_endpoint_connect(ep, &t, NULL), dtls_endpoint_connect(ep, &t, NULL)};
    for (int i = 0; i < 1000 && batch_connected < 4; i++) {
        dtls_loop_poll(servers, 5);
        dtls_loop_poll(clients, 5);
    }
    for (int i = 0; i < 4; i++)
        dtls_conn_send(conns[i % 2], "end", 3);
    for (int i = 0; i < 100 && batch_messages == 0; i++)
        dtls_loop_poll(servers, 50);
    CHECK_EQ(batch_connected, 4, "two connections, told of at both ends");
    CHECK_EQ(batch_messages, 1, "an endpoint freed with more datagrams in hand");
    dtls_loop_free(servers);
    dtls_loop_free(clients);
}

static void test_connecting(void)
{
    static char long_name[300];
    dtls_error err = {0};
    memset(long_name, 'a', sizeof long_name - 1);
    start((dtls_config){0}, (dtls_config){.max_conns = 1});
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = long_name};
    CHECK_THAT(!dtls_endpoint_connect(client.ep, &t, &err) && err.code == DTLS_ERR_ARG, "a name that is too long");
    dtls_conn *c = connect_client(NULL);
    dtls_info info;
    dtls_conn_info(c, &info);
    CHECK_THAT(c && !info.connected && info.cipher[0] == 0 && !dtls_conn_ssl(c) && !dtls_conn_session(c) &&
                   dtls_conn_payload_max(c) == 0 && dtls_conn_reason(c) == DTLS_CLOSE_NONE,
               "what there is to know before the handshake");
    CHECK_EQ(dtls_conn_send(c, "x", 1), DTLS_ERR_STATE, "no message before the handshake");
    t.name = "localhost";
    t.local.port++;
    CHECK_THAT(!dtls_endpoint_connect(client.ep, &t, &err) && err.code == DTLS_ERR_LIMIT, "no more than max_conns");
    stop();

    start((dtls_config){0}, (dtls_config){0});
    CHECK_THAT(connect_client(NULL) && !connect_client(NULL) && connect_error.code == DTLS_ERR_STATE,
               "no second connection between the same addresses");
    CHECK_THAT(wait_for(&client.connected, 1), "which does not harm the first");
    stop();
}

/* ---- inside callbacks ---- */

static int inside_good;

static void try_all_inside_send(struct side *s)
{
    dtls_error err;
    dtls_target t = {.peer = server_addr, .local = client_addr};
    inside_send = NULL;
    inside_good = dtls_endpoint_input(s->ep, "x", 1, &server_addr, &client_addr) == DTLS_ERR_STATE &&
                  !dtls_endpoint_connect(s->ep, &t, &err) && err.code == DTLS_ERR_STATE;
    if (client.conn) {
        inside_good &= dtls_conn_send(client.conn, "x", 1) == DTLS_ERR_STATE;
        dtls_conn_close(client.conn);
    }
    dtls_endpoint_free(s->ep);
}

static void try_after_free(struct side *s, dtls_conn *conn, dtls_event event)
{
    dtls_error err;
    dtls_target t = {.peer = server_addr, .local = client_addr};
    if (event != DTLS_EV_CONNECTED)
        return;
    dtls_endpoint_free(s->ep);
    dtls_endpoint_free(s->ep);
    dtls_conn_close(conn);
    inside_good = !dtls_endpoint_connect(s->ep, &t, &err) && err.code == DTLS_ERR_STATE &&
                  dtls_endpoint_listen(s->ep, NULL, &err) == DTLS_ERR_STATE &&
                  dtls_endpoint_input(s->ep, "x", 1, &server_addr, &client_addr) == 0 &&
                  dtls_conn_send(conn, "x", 1) == DTLS_ERR_STATE && dtls_conn_payload_max(conn) == 0;
    s->ep = NULL;
}

static void test_inside(void)
{
    start((dtls_config){0}, (dtls_config){0});
    connected();
    inside_send = try_all_inside_send;
    CHECK_THAT(dtls_conn_send(client.conn, "hello", 5) == 0 && inside_good && wait_for(&server.messages, 1) &&
                   !client.closed,
               "all is refused inside config.send, and nothing harmed");
    stop();

    start((dtls_config){0}, (dtls_config){0});
    client.inside = try_after_free;
    CHECK_THAT(connected() && inside_good && client.closed == 1, "an endpoint freed in this turn does nothing more");
    stop();
}

/* The application may end things while it is told of others: at the first line with this text in it. */
static const char *end_at;

static int is_the_end(const char *line)
{
    int end = end_at && strstr(line, end_at);
    end_at = end ? NULL : end_at;
    return end;
}

static void free_in_log(void *user, dtls_log level, const char *line)
{
    struct side *s = user;
    (void)level;
    if (!is_the_end(line))
        return;
    dtls_endpoint_free(s->ep);
    s->ep = NULL;
}

static void close_in_log(void *user, dtls_log level, const char *line)
{
    struct side *s = user;
    (void)level;
    if (is_the_end(line))
        dtls_conn_close(s->conn);
}

static void test_ends_in_the_log(void)
{
    start((dtls_config){.on_log = free_in_log}, (dtls_config){0});
    end_at = "connected";
    connect_client(NULL);
    for (int i = 0; i < 20; i++)
        turn();
    CHECK_THAT(!server.ep && server.connected == 0 && server.closed == 0,
               "a server freed while it logs its first client");
    stop();

    start((dtls_config){0}, (dtls_config){.on_log = close_in_log});
    connect_client(NULL);
    end_at = "connected";
    CHECK_THAT(wait_for(&client.closed, 1) && client.connected == 0 && client.reason == DTLS_CLOSE_LOCAL,
               "a client closed while its success is logged");
    stop();

    start((dtls_config){.on_log = free_in_log}, (dtls_config){0});
    connected();
    dtls_conn_close(client.conn);
    wire_len = 0;
    end_at = "replaced";
    connect_client(NULL);
    for (int i = 0; i < 20; i++)
        turn();
    CHECK_THAT(!server.ep && server.connected == 1 && server.closed == 1,
               "a server freed while a client replaces itself");
    stop();

    start((dtls_config){.max_handshakes = 1, .on_log = free_in_log}, (dtls_config){0});
    half_open();
    end_at = "gave way";
    now_us += 4 * 1000 * 1000; /* it had its time */
    half_open();
    CHECK_THAT(!server.ep, "a server freed while a handshake gives way to a newer one");
    stop();

    start((dtls_config){0}, (dtls_config){.on_log = close_in_log});
    connect_client(NULL);
    turn();
    turn();
    wire_drop = drop_all; /* from its cookie on */
    end_at = "anew";
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_LOCAL,
               "a client closed while it begins anew");
    stop();
}

/* ---- hosts ---- */

static void test_hosts(void)
{
    dtls_error err;
    start((dtls_config){0}, (dtls_config){0});
    CHECK_THAT(!dtls_endpoint_connect(client.ep, &(dtls_target){.host = "localhost:1"}, &err) &&
                   err.code == DTLS_ERR_ARG,
               "a host through a transport of one's own: %s", err.text);
    REQUIRE(connected(), "a connection");
    uint8_t key[16];
    dtls_conn *conn = client.conn;
    CHECK_EQ(dtls_conn_export(conn, "EXPORTER-x", key, sizeof key), 0, "keys of a connection");
    CHECK_EQ(dtls_conn_renew(server.conn), DTLS_ERR_STATE, "a server does not renew");
    stop();
    loop = dtls_loop_new(NULL);
    dtls_endpoint *ep = endpoint_new(loop, "client", (dtls_config){0});
    static const char *const bad[] = {"", "host", "host:0", "host:65536", ":1", "1.2.3:1", "127.0.0.1:0"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_THAT(!dtls_endpoint_connect(ep, &(dtls_target){.host = bad[i]}, &err) && err.text[0], "\"%s\": %s",
                   bad[i], err.text);
    dtls_conn *unknown = dtls_endpoint_connect(ep, &(dtls_target){.host = "host.invalid:1"}, &err);
    dtls_info info;
    REQUIRE(unknown, "a host that may be known");
    dtls_conn_info(unknown, &info);
    CHECK_THAT(info.peer.family == 0 && !info.connected && dtls_conn_send(unknown, "x", 1) == DTLS_ERR_STATE &&
                   dtls_conn_renew(unknown) == DTLS_ERR_STATE &&
                   dtls_conn_export(unknown, "x", key, 1) == DTLS_ERR_STATE && !dtls_conn_ssl(unknown) &&
                   !dtls_conn_session(unknown) && dtls_conn_payload_max(unknown) == 0,
               "while it is looked up");
    dtls_conn_close(unknown);
    dtls_loop_free(loop);
}

/* ---- messages ---- */

static void test_sending(void)
{
    static char big[DTLS_MESSAGE_MAX + 1];
    start((dtls_config){0}, (dtls_config){0});
    connected();
    dtls_conn *c = client.conn;
    CHECK_THAT(dtls_conn_send(c, NULL, 5) == DTLS_ERR_SIZE && dtls_conn_send(c, big, 0) == DTLS_ERR_SIZE &&
                   dtls_conn_send(c, big, sizeof big) == DTLS_ERR_SIZE && wire_len == 0,
               "no message, an empty one, one byte too many");
    send_refuses = 1;
    CHECK_EQ(dtls_conn_send(c, "lost", 4), DTLS_ERR_AGAIN, "a transport that takes nothing now");
    send_refuses = 0;
    dtls_info info;
    int kept = dtls_conn_send(c, "kept!", 5) == 0 && wait_for(&server.messages, 1) && !client.closed;
    dtls_conn_info(server.conn, &info);
    CHECK_THAT(kept && info.messages_in == 1 && info.bytes_in == 5, "and takes the next, without the one it refused");
    stop();
}

static void test_mtus(void)
{
    static const int mtus[] = {256, 65535};
    for (size_t i = 0; i < sizeof mtus / sizeof *mtus; i++) {
        const dtls_config cfg = {.mtu_bytes = mtus[i]};
        start(cfg, cfg);
        connect_client(NULL);
        for (int turns = 0; turns < 3; turns++)
            turn();
        wire_drop = drop_all; /* the server's first flight is lost, and its second */
        for (int turns = 0; turns < 40; turns++)
            turn();
        wire_drop = NULL;
        CHECK_THAT(wait_for(&client.connected, 1) && wait_for(&server.connected, 1),
                   "a flight sent three times at MTU %d", mtus[i]);
        stop();
    }
}

static void test_suites(void)
{
    static const char *const suites[] = {"ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-CCM8:@SECLEVEL=0",
                                         "ECDHE-ECDSA-AES256-CCM"};
    for (size_t i = 0; i < sizeof suites / sizeof *suites; i++) {
        unsigned char forged[13 + 23] = {23, 0xfe, 0xfd, 0, 1, 0, 0, 0xff};
        server.ciphers = client.ciphers = suites[i];
        start((dtls_config){0}, (dtls_config){0});
        int good = connected();
        for (unsigned char len = 1; len <= 23; len++) {
            forged[12] = len;
            dtls_endpoint_input(server.ep, forged, 13u + len, &client_addr, &server_addr);
            dtls_endpoint_input(client.ep, forged, 13u + len, &server_addr, &client_addr);
        }
        good = good && dtls_conn_send(client.conn, "hello", 5) == 0 && wait_for(&server.messages, 1);
        CHECK_THAT(good && !client.closed && !server.closed, "%s, and short forged records", suites[i]);
        stop();
    }
}

/* ---- peers ---- */

static struct identity issue_as(const char *name, int length, long seconds)
{
    struct identity id = issue(20, "x", "clientAuth");
    X509_NAME *subject = X509_NAME_new();
    if (length > 0)
        X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8, (const unsigned char *)name, length, -1, 0);
    else
        X509_NAME_add_entry_by_txt(subject, "O", MBSTRING_ASC, (const unsigned char *)"nobody", -1, -1, 0);
    X509_set_subject_name(id.cert, subject);
    X509_NAME_free(subject);
    if (seconds)
        X509_time_adj_ex(X509_getm_notAfter(id.cert), 0, seconds, NULL);
    X509_sign(id.cert, ca.key, EVP_sha256());
    return id;
}

static void say_hello(dtls_conn *conn, void *user)
{
    (void)user;
    dtls_conn_send(conn, "hello", 5);
}

#define UMLAUTS "\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc\xc3\xbc"

static void test_names(void)
{
    static const struct {
        const char *name;
        int length;
        const char *shown, *what;
    } names[] = {{"", 0, "", "a peer without a common name"},
                 {"J\xc3\xbcrgen \xc2\xa9", 10, "J\xc3\xbcrgen \xc2\xa9", "a peer's name in UTF-8"},
                 {"a\nb\x7f"
                  "c\xc2\x9b"
                  "31m",
                  10, "a\\x0ab\\x7fc\\xc2\\x9b31m", "control characters in a peer's name"},
                 {"a\\x0ab", 6, "a\\x5cx0ab", "a name with what looks like an escape is another name"},
                 {"sixty-four characters are what a common name may have at the most", 64,
                  "sixty-four characters are what a common name may have at the mos", "a name of 64 characters"},
                 {"thirty characters and umlauts: " UMLAUTS UMLAUTS, 63,
                  "thirty characters and umlauts: " UMLAUTS UMLAUTS, "a name in UTF-8 that just fits"},
                 {"thirty characters and umlauts: " UMLAUTS UMLAUTS UMLAUTS, 79,
                  "thirty characters and umlauts: " UMLAUTS UMLAUTS UMLAUTS, "a longer one is whole"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        struct identity id = issue_as(names[i].name, names[i].length, 0);
        client.id = &id;
        start((dtls_config){0}, (dtls_config){0});
        CHECK(connected());
        CHECK_TEXT(server.peer_name, names[i].shown, "%s", names[i].what);
        stop();
        identity_free(&id);
    }
}

static SSL_SESSION *first_session(void)
{
    connected();
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 1);
    return session;
}

static void test_sessions(void)
{
    start((dtls_config){.session_cache = DTLS_NEVER}, (dtls_config){0});
    SSL_SESSION *session = first_session();
    connect_client(session);
    CHECK_THAT(wait_for(&client.connected, 2) && !client.resumed, "no cache, no resumption");
    SSL_SESSION_free(session);
    stop();

    start((dtls_config){.session_cache = 1}, (dtls_config){0});
    SSL_SESSION *first = first_session();
    connect_client(NULL);
    wait_for(&client.connected, 2);
    session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 2);
    connect_client(session);
    int last = wait_for(&client.connected, 3) && client.resumed;
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 3);
    connect_client(first);
    CHECK_THAT(last && wait_for(&client.connected, 4) && !client.resumed, "a cache of one keeps the last session");
    SSL_SESSION_free(first);
    SSL_SESSION_free(session);
    stop();

    struct identity brief = issue_as("brief", 5, 2);
    client.id = &brief;
    start((dtls_config){0}, (dtls_config){0});
    session = first_session();
    while (ASN1_TIME_cmp_time_t(X509_get0_notAfter(brief.cert), time(NULL)) > 0)
        usleep(20000); /* the one thing here that no virtual clock moves */
    connect_client(session);
    CHECK_THAT(wait_for(&client.closed, 2) && server.connected == 1,
               "a session does not outlive the client's certificate");
    SSL_SESSION_free(session);
    stop();
    identity_free(&brief);
}

static void test_no_verification(void)
{
    server.trusting = 1;
    start((dtls_config){0}, (dtls_config){0});
    CHECK_THAT(connected() && server.peer_name[0] == 0, "a hook that asks for no certificate gets none");
    stop();
}

static void test_stale_cookie(void)
{
    static const int ages_ms[] = {59000, 121000}; /* cookie_ms is 60,000, and the last secret stays valid */
    dtls_counters before, after;
    for (int i = 0; i < 2; i++) {
        start((dtls_config){0}, (dtls_config){0});
        wire_drop = keep_hellos;
        connected();
        dtls_conn_close(client.conn);
        wait_for(&server.closed, 1);
        dtls_endpoint_counters(server.ep, &before);
        now_us += ages_ms[i] * (int64_t)1000;
        dtls_endpoint_input(server.ep, hellos[1].data, hellos[1].len, &client_addr, &server_addr);
        dtls_endpoint_counters(server.ep, &after);
        CHECK_THAT(after.handshakes == (i == 0) && after.cookies_sent == before.cookies_sent + (i == 1), "%s",
                   i ? "a stale cookie is answered with a new one" : "a cookie is good for its time");
        stop();
    }
}

static void test_hooks(void)
{
    server.options = SSL_OP_NO_QUERY_MTU;
    start((dtls_config){0}, (dtls_config){0});
    CHECK_THAT(connected(), "a hook that would keep libssl from asking for the MTU");
    stop();

    server.no_option = client.no_option = SSL_OP_NO_TICKET;
    start((dtls_config){0}, (dtls_config){0});
    SSL_SESSION *session = first_session();
    int ticket = SSL_SESSION_has_ticket(session);
    connect_client(session);
    CHECK_THAT(ticket && wait_for(&client.connected, 2) && client.resumed, "a hook that wants tickets: they resume");
    SSL_SESSION_free(session);
    stop();
}

/* ---- one endpoint in both roles ---- */

static void test_both_roles(void)
{
    struct identity both = issue(30, "both", "serverAuth,clientAuth");
    record_hellos();
    client.id = &both;
    start((dtls_config){0}, (dtls_config){0});
    dtls_endpoint_free(server.ep);
    server.ep = client.ep;
    dtls_endpoint_listen(client.ep, NULL, NULL);
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.connected, 2), "an endpoint that is its own client");
    dtls_endpoint_input(client.ep, hellos[0].data, hellos[0].len, &server_addr, &client_addr);
    dtls_endpoint_each(client.ep, say_hello, NULL);
    CHECK_THAT(wait_for(&client.messages, 2) && client.closed == 0,
               "a ClientHello from a client's server is nothing to it");
    server.ep = NULL;
    stop();
    identity_free(&both);
}

/* ---- handshakes that end ---- */

static void test_ends(void)
{
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = drop_all;
    connect_client(NULL);
    for (int64_t late_us = now_us + 20000000; now_us < late_us;) /* by then libssl has given up, after 12 times */
        turn();
    wire_drop = NULL;
    CHECK_THAT(wait_for(&client.connected, 1) && client.closed == 0,
               "a server that answers late is asked until the deadline");
    stop();

    start((dtls_config){.max_conns = 2, .max_handshakes = 2}, (dtls_config){.handshake_timeout_ms = 1000});
    for (int i = 0; i < 5; i++)
        half_open();
    client_addr.port++;
    connect_client(NULL);
    CHECK_THAT(wait_for(&server.connected, 1),
               "half-open ones leave room where max_conns and max_handshakes are the same");
    stop();
}

/* A peer that asks for a new handshake on a connection: it only happens with a hostile one. */
static void test_renegotiation(void)
{
    start((dtls_config){0}, (dtls_config){0});
    connected();
    SSL *ssl = dtls_conn_ssl(server.conn);
    SSL_clear_options(ssl, SSL_OP_NO_RENEGOTIATION);
    SSL_alloc_buffers(ssl);
    int asked = SSL_renegotiate(ssl) == 1 && SSL_do_handshake(ssl) == 1;
    for (int i = 0; i < 20; i++)
        turn();
    int answered = client.closed || (dtls_conn_send(client.conn, "alive", 5) == 0 && wait_for(&server.messages, 1));
    CHECK_THAT(asked && client.connected == 1 && answered, "a server that asks for renegotiation gets none");
    stop();

    start((dtls_config){0}, (dtls_config){0});
    connected();
    ssl = dtls_conn_ssl(client.conn);
    SSL_clear_options(ssl, SSL_OP_NO_RENEGOTIATION);
    SSL_alloc_buffers(ssl);
    asked = SSL_renegotiate(ssl) == 1;
    SSL_do_handshake(ssl);
    CHECK_THAT(asked && wait_for(&client.closed, 1) && server.connected == 1,
               "a client that renegotiates is done with");
    stop();
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"texts", test_texts},
        {"addresses", test_addresses},
        {"loop", test_loop},
        {"stopped timer", test_stopped_timer},
        {"freed timers", test_freed_timers},
        {"watches", test_watches},
        {"signals", test_signals},
        {"signals at the end", test_signals_at_the_end},
        {"ranges", test_ranges},
        {"files", test_files},
        {"long path", test_long_path},
        {"listening", test_listening},
        {"listening on own", test_listening_on_own},
        {"freed in a burst", test_freed_in_a_burst},
        {"wildcard", test_wildcard},
        {"rebinding", test_rebinding},
        {"odd datagrams", test_odd_datagrams},
        {"junk and timers", test_junk_and_timers},
        {"end in a batch", test_end_in_a_batch},
        {"connecting", test_connecting},
        {"inside", test_inside},
        {"ends in the log", test_ends_in_the_log},
        {"hosts", test_hosts},
        {"sending", test_sending},
        {"mtus", test_mtus},
        {"suites", test_suites},
        {"names", test_names},
        {"sessions", test_sessions},
        {"no verification", test_no_verification},
        {"hooks", test_hooks},
        {"stale cookie", test_stale_cookie},
        {"both roles", test_both_roles},
        {"ends", test_ends},
        {"renegotiation", test_renegotiation},
    };
    virtual_chance();
    virtual_identities();
    int status = RUN_TESTS("edges", tests, argc, argv);
    virtual_identities_free();
    return status;
}
