/* What the foreign peers have in common: arguments, sockets, and the loop around a session of their library. Each
 * includes this and defines the functions that are declared below.
 *
 *   PROGRAM client HOST PORT CERTS_DIR [resume] [mtu=BYTES] [suite=NAME] [psk=IDENTITY:HEX] [cid=BYTES]
 *   PROGRAM server HOST PORT CERTS_DIR [mtu=BYTES] [suite=NAME] [psk=IDENTITY:HEX] [cid=BYTES]
 *
 * HOST is an IPv4 address. CERTS_DIR has ca.pem, client.pem and client.key, server.pem and server.key; both sides
 * verify each other. With psk they have that pre-shared key in place of certificates. A client sends each line of its
 * input as a message and prints each answer as a line; it leaves at the end of its input. With resume it connects,
 * closes, and connects again with the session it got. A server serves one client after the other: it answers "ping" by
 * "pong", "bye" by closing, anything else by the same, or by "N bytes" where the library sends no message of that size.
 * Both print "connected: NAME, SUITE", and "closed by the peer" or "failed: REASON".
 *
 * With cid=BYTES they offer, or take, connection IDs (RFC 9146): so long is the one that the peer is to put into its
 * records, 0 means that it puts none. "connection IDs: IN in, OUT out" tells their bytes, or "none". At the line "/rebind" a
 * client goes on from another port, and prints "rebound: PORT". A server that has a connection ID of its own follows such
 * a client and prints "moved: PORT". */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    MESSAGE_MAX = 16384,
    PATH_BYTES = 512,
    IDENTITY_BYTES = 128,
    KEY_BYTES = 64,
    CID_MAX = 20,
    RECORD_HEADER = 13, /* RFC 6347 section 4.1; behind it stands a handshake message's type */
    HEADERS = RECORD_HEADER + 12,
    CID_AT = 11, /* in a record that has one, RFC 9146 section 4 */
    TYPE_HANDSHAKE = 22,
    TYPE_CID = 25,
    CLIENT_HELLO = 1
};

/* From session_read(); what is positive is a message's length. */
enum { SESSION_EMPTY = 0, SESSION_CLOSED = -1, SESSION_FAILED = -2 };

struct options {
    bool server, resume;
    const char *certs;             /* the folder */
    const char *suite;             /* the only one to take, by the library's name; NULL: the library's choice */
    int mtu;                       /* bytes in a datagram of the handshake; 0: the library's choice */
    char identity[IDENTITY_BYTES]; /* of the pre-shared key; "": certificates are used */
    unsigned char key[KEY_BYTES];
    size_t key_len;
    bool cid; /* connection IDs are wanted, and peers are to use */
    int cid_len;
};

/* The library's part. Every failure has been printed when these return. */
static bool library_start(const struct options *options);
static bool session_open(int fd, const struct options *options); /* the whole handshake, on a connected socket */
static int session_read(char *data, size_t size);                /* one message, or SESSION_ value; does not wait */
static bool session_write(const char *data, size_t len);
static bool session_cids(int *in, int *out); /* bytes of the connection IDs in records; false: none were agreed upon */
static void session_follow(void);            /* from now on datagrams go through link_receive() and link_send() */
static int session_max(void);                /* bytes in the largest message that it sends */
static void session_close(void);             /* close_notify, and forget it: but for what a client needs to resume */

static void say(const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 1, 2)))
#endif
    ;

static void say(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    fflush(stdout);
}

static const char *certs_path(const struct options *options, const char *name, char path[PATH_BYTES])
{
    snprintf(path, PATH_BYTES, "%s/%s", options->certs, name);
    return path;
}

/* A server whose client may move. None of the libraries follows by itself: the socket is no longer tied to one address, and
 * a datagram is let through from where the client is, or with our connection ID from anywhere. A message that the library
 * took from there moves the client. */
static struct link {
    int fd;
    struct sockaddr_in peer, from; /* where the client is, and where the last datagram came from */
    unsigned char cid[CID_MAX];    /* ours, of this session */
    size_t cid_len;
} link_;

static bool same_address(const struct sockaddr_in *a, const struct sockaddr_in *b)
{
    return a->sin_port == b->sin_port && a->sin_addr.s_addr == b->sin_addr.s_addr;
}

/* Another connection ID for each session; the tests need no better randomness. */
static void link_choose_cid(const struct options *options)
{
    static unsigned char number;
    link_.cid_len = (size_t)options->cid_len;
    memset(link_.cid, getpid() & 0xff, sizeof link_.cid);
    link_.cid[0] = ++number;
}

/* A datagram of the client, or -1 with errno EAGAIN. Does not wait. */
static inline int link_receive(unsigned char *data, size_t size)
{
    for (;;) {
        socklen_t len = sizeof link_.from;
        ssize_t got = recvfrom(link_.fd, data, size, MSG_DONTWAIT, (struct sockaddr *)&link_.from, &len);
        bool ours = got > CID_AT + (ssize_t)link_.cid_len && data[0] == TYPE_CID &&
                    memcmp(data + CID_AT, link_.cid, link_.cid_len) == 0;
        if (got < 0 || ours || same_address(&link_.from, &link_.peer))
            return (int)got;
    }
}

static inline int link_send(const unsigned char *data, size_t len)
{
    return (int)sendto(link_.fd, data, len, 0, (struct sockaddr *)&link_.peer, sizeof link_.peer);
}

static void link_moved(void)
{
    if (link_.from.sin_port == 0 || same_address(&link_.from, &link_.peer))
        return;
    link_.peer = link_.from;
    say("moved: %u", (unsigned)ntohs(link_.peer.sin_port));
}

static int udp_socket(const struct sockaddr_in *addr, bool server)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    const struct sockaddr *sa = (const struct sockaddr *)addr;
    if (fd >= 0 && (server ? bind(fd, sa, sizeof *addr) : connect(fd, sa, sizeof *addr)) == 0)
        return fd;
    perror(server ? "bind" : "connect");
    exit(2);
}

/* Ties the server's socket to whoever sends the next ClientHello. What earlier clients still send is thrown away. */
static void udp_accept(int fd)
{
    struct sockaddr_in from;
    socklen_t len = sizeof from;
    unsigned char head[HEADERS] = {0};
    while (recvfrom(fd, head, sizeof head, MSG_PEEK, (struct sockaddr *)&from, &len) != HEADERS ||
           head[0] != TYPE_HANDSHAKE || head[RECORD_HEADER] != CLIENT_HELLO)
        recv(fd, head, sizeof head, 0);
    connect(fd, (struct sockaddr *)&from, len);
}

static void udp_release(int fd)
{
    struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    connect(fd, &nobody, sizeof nobody);
}

static void link_start(int fd)
{
    socklen_t len = sizeof link_.peer;
    link_.fd = fd;
    link_.from.sin_port = 0;
    getpeername(fd, (struct sockaddr *)&link_.peer, &len);
    udp_release(fd);
    session_follow();
}

/* A client's: the descriptor stays, another port is behind it. */
static void udp_rebind(int fd)
{
    struct sockaddr_in addr;
    socklen_t len = sizeof addr;
    getpeername(fd, (struct sockaddr *)&addr, &len);
    int other = udp_socket(&addr, false);
    dup2(other, fd);
    close(other);
    getsockname(fd, (struct sockaddr *)&addr, &len);
    say("rebound: %u", (unsigned)ntohs(addr.sin_port));
}

/* The handshake, on a connected socket. */
static bool begin(int fd, const struct options *options)
{
    int in = 0, out = 0;
    link_choose_cid(options);
    if (!session_open(fd, options))
        return false;
    if (options->cid && session_cids(&in, &out))
        say("connection IDs: %d in, %d out", in, out);
    else if (options->cid)
        say("connection IDs: none");
    if (options->server && in > 0)
        link_start(fd);
    return true;
}

static bool serve_message(const char *data, int len)
{
    char text[32];
    if (len == 4 && memcmp(data, "ping", 4) == 0)
        return session_write("pong", 4);
    if (len > session_max())
        return session_write(text, (size_t)snprintf(text, sizeof text, "%d bytes", len));
    return session_write(data, (size_t)len);
}

static void serve(int fd)
{
    static char data[MESSAGE_MAX];
    struct pollfd in = {.fd = fd, .events = POLLIN};
    int len = SESSION_EMPTY;
    while (len >= 0) {
        len = session_read(data, sizeof data);
        if (len == SESSION_EMPTY)
            poll(&in, 1, -1);
        if (len > 0)
            link_moved();
        if (len == 3 && memcmp(data, "bye", 3) == 0)
            break;
        if (len > 0 && !serve_message(data, len))
            break;
    }
    if (len == SESSION_CLOSED)
        say("closed by the peer");
    session_close();
}

static void run_server(int fd, const struct options *options)
{
    say("listening");
    for (;;) {
        udp_accept(fd);
        if (begin(fd, options))
            serve(fd);
        udp_release(fd);
    }
}

/* Sends the next line, or does what it says; false: there is none. Byte by byte, so that poll() knows what is left. */
static bool send_line(int fd)
{
    static char line[MESSAGE_MAX + 1];
    size_t len = 0;
    while (read(STDIN_FILENO, &line[len], 1) == 1) {
        if (line[len] == '\n' && len == 7 && memcmp(line, "/rebind", 7) == 0) {
            udp_rebind(fd);
            return true;
        }
        if (line[len] == '\n')
            return len == 0 || session_write(line, len);
        if (len++ == MESSAGE_MAX)
            break;
    }
    return false;
}

static int talk(int fd)
{
    static char data[MESSAGE_MAX];
    struct pollfd in[] = {{.fd = fd, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}};
    for (;;) {
        int len = session_read(data, sizeof data);
        if (len > 0)
            say("%.*s", len, data);
        if (len == SESSION_CLOSED)
            say("closed by the peer");
        if (len < 0)
            return len == SESSION_FAILED;
        if (len == SESSION_EMPTY)
            poll(in, 2, -1);
        if (len == SESSION_EMPTY && in[1].revents && !send_line(fd))
            return 0;
    }
}

static int run_client(const struct sockaddr_in *addr, const struct options *options)
{
    int status = 1;
    for (int left = options->resume ? 2 : 1; left > 0; left--) {
        int fd = udp_socket(addr, false);
        if (begin(fd, options)) {
            status = left > 1 ? 0 : talk(fd);
            session_close();
        }
        close(fd);
    }
    return status;
}

static bool read_psk(const char *text, struct options *options)
{
    const char *colon = strrchr(text, ':');
    size_t len = colon ? (size_t)(colon - text) : 0;
    if (len == 0 || len >= IDENTITY_BYTES)
        return false;
    memcpy(options->identity, text, len);
    for (const char *hex = colon + 1; *hex; hex += 2) {
        if (options->key_len == KEY_BYTES || sscanf(hex, "%2hhx", &options->key[options->key_len++]) != 1 || !hex[1])
            return false;
    }
    return options->key_len > 0;
}

static bool read_cid(const char *text, struct options *options)
{
    char *end;
    long len = strtol(text, &end, 10);
    options->cid = true;
    options->cid_len = (int)len;
    return end != text && *end == 0 && len >= 0 && len <= CID_MAX;
}

static bool read_option(const char *text, struct options *options)
{
    if (strncmp(text, "psk=", 4) == 0)
        return read_psk(text + 4, options);
    if (strncmp(text, "cid=", 4) == 0)
        return read_cid(text + 4, options);
    if (strcmp(text, "resume") == 0)
        options->resume = true;
    else if (strncmp(text, "mtu=", 4) == 0)
        options->mtu = atoi(text + 4);
    else if (strncmp(text, "suite=", 6) == 0)
        options->suite = text + 6;
    else
        return false;
    return true;
}

static bool read_options(int argc, char **argv, struct options *options, struct sockaddr_in *addr)
{
    if (argc < 5 || inet_pton(AF_INET, argv[2], &addr->sin_addr) != 1)
        return false;
    addr->sin_family = AF_INET;
    addr->sin_port = htons((in_port_t)atoi(argv[3]));
    options->server = strcmp(argv[1], "server") == 0;
    options->certs = argv[4];
    for (int i = 5; i < argc; i++) {
        if (!read_option(argv[i], options))
            return false;
    }
    return options->server || strcmp(argv[1], "client") == 0;
}

int main(int argc, char **argv)
{
    static struct options options; /* wolfSSL's callbacks look at it */
    struct sockaddr_in addr = {0};
    if (!read_options(argc, argv, &options, &addr)) {
        fprintf(stderr,
                "usage: %s client|server HOST PORT CERTS_DIR [resume] [mtu=BYTES] [suite=NAME] "
                "[psk=IDENTITY:HEX] [cid=BYTES]\n",
                argv[0]);
        return 2;
    }
    if (!library_start(&options))
        return 2;
    if (options.server)
        run_server(udp_socket(&addr, true), &options);
    return run_client(&addr, &options);
}
