#!/usr/bin/env python3
"""Foreign peers: other DTLS libraries, each as client and as server, against the program. harness.py says how it runs.

OpenSSL's s_client and s_server (what e2e.py has of them is not repeated here), GnuTLS's gnutls-cli and gnutls-serv,
socat, libcoap's coap-client and coap-server, and small programs for wolfSSL and Mbed TLS, which are compiled from
tests/peers/ when their headers are there. A peer that is not installed is skipped. Debian has them in gnutls-bin, socat,
libcoap3-bin, libwolfssl-dev and libmbedtls-dev.

The tests with "roaming" in their names are about addresses that change. Those with connection IDs (RFC 9146) need the
libraries that tests/peers/build.sh builds, which ./test.sh all has it do.
"""

import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (Authority, BIN, CC, CERTS, FOLDERS, HANDSHAKE, IP_UDP_BYTES, Identity, MESSAGE_MAX, OPENSSL, PROMPT,
                     Proc, ROOT, Skip, Term, can_bind, check, equal, free_port, main, split_addr, test,
                     wait_until)  # noqa: E402

LOSS = 0.1
LOSS_SEEDS = 3, 4, 5
LOSS_WAIT = 60.0  # seconds for a handshake under loss: some peers double their waits up to a minute
REFUSAL_WAIT = 15.0  # a refusal is believed after some seconds of silence, since anybody can send an alert
UNKNOWN_ISSUER = "certificate refused: .*(issuer|self.signed|verify the first certificate)"
CLIENT_HELLO, CERTIFICATE = 1, 11
RECORD_HEADER = 13
SMALL_MTU = 128  # bytes in a datagram: less than a ClientHello

# ---- the peers -------------------------------------------------------------------------------------------------------


class Foreign(Proc):
    """A foreign program; out has all that it says."""

    ours = False

    def __init__(self, case, title, argv):
        super().__init__(case, case.title(title), ["sh", "-c", 'exec "$@" 2>&1', "sh", *argv])

    def says(self, pattern, nth=1, timeout=REFUSAL_WAIT):
        return self.out.wait(pattern, nth, timeout, partial=True)

    def shows(self, text, nth=1):
        """The same for a text, which may be long."""
        self.out.until(lambda: self.out.text.count(text) >= nth, f"text of {len(text)} bytes")

    def ask(self, line, answer):
        """Sends a line and waits for one more of this answer."""
        before = self.out.text.count(answer)
        self.send(line)
        self.shows(answer, before + 1)


class Peer:
    """How one foreign implementation is run and what it says. Below, `certs` is a folder like CERTS, or a Key."""

    name = None
    program = None
    certs = CERTS  # where a test does not say
    connected = None  # what its client says once it is connected and has verified us
    closed = None  # and when we closed
    ready = None  # what its server says once it can be connected to
    noticed = None  # and when we closed
    refused = None  # what both say when we refused their certificate
    refuses = None  # and when they refuse ours
    resume = ()  # arguments that have its client connect twice, with one session
    small = ()  # and that have it send a handshake in datagrams of SMALL_MTU bytes
    link_mtu = 1500  # the largest MTU that we may assume
    sends = MESSAGE_MAX  # bytes of the largest message that its client sends, the end of the line included
    takes = MESSAGE_MAX  # and of the largest that it reads
    suffix = ""  # what its client sends behind a line

    def need(self):
        """Skips the test where the peer is not installed."""

    def client_argv(self, host, port, certs):
        raise NotImplementedError

    def server_argv(self, port, certs):
        raise NotImplementedError

    def client(self, t, where, *more, certs=None):
        host, port = split_addr(getattr(where, "addr", where))
        return Foreign(t, f"{self.name} client", [*self.client_argv(host, port, certs or self.certs), *more])

    def server(self, t, *more, certs=None):
        port = free_port()
        server = Foreign(t, f"{self.name} server", [*self.server_argv(port, certs or self.certs), *more])
        server.addr = f"127.0.0.1:{port}"
        server.says(self.ready)
        return server

    def echo(self, text):
        """The lines that come back from its server."""
        return [text]


class Installed(Peer):
    """One that is a command."""

    commands = ()

    def need(self):
        for command in self.commands:
            if not shutil.which(command):
                raise Skip(f"no {command}")


class OpenSSL(Installed):
    """s_client sends 8,192 bytes at most (BUFSIZZ in apps/s_client.c); s_server does not echo, it shows what comes."""

    name = "openssl"
    commands = "openssl",
    connected = r"Verify return code: 0 \(ok\)"
    closed = "closed$"
    ready = "ACCEPT"
    noticed = "DONE"
    refused = "alert unknown ca"
    refuses = "certificate verify failed"
    sends = 8192
    suffix = "\n"

    @staticmethod
    def argv(mode, certs, who):
        return [OPENSSL, mode, "-dtls1_2", "-CAfile", f"{certs}/ca.pem", "-verify_return_error",
                "-cert", f"{certs}/{who}.pem", "-key", f"{certs}/{who}.key", "-cert_chain", f"{certs}/{who}.pem"]

    def client_argv(self, host, port, certs):
        return [*self.argv("s_client", certs, "client"), "-connect", f"{host}:{port}", "-verify_ip", "127.0.0.1"]

    def server_argv(self, port, certs):
        return [*self.argv("s_server", certs, "server"), "-accept", f"127.0.0.1:{port}", "-listen", "-Verify", "2"]


class GnuTLS(Installed):
    """gnutls-cli reads 4,096 bytes at a time (MAX_BUF in src/cli.c) and sends them if told a large MTU; gnutls-serv
    echoes in pieces of 254 (src/udp-serv.c), never closes, and speaks into a buffer."""

    name = "gnutls"
    commands = "gnutls-cli", "gnutls-serv", "stdbuf"
    connected = "Handshake was completed"
    closed = "Peer has closed the GnuTLS connection"
    ready = "Waiting for connection"
    noticed = "EOF"
    refused = "A TLS fatal alert has been received"
    refuses = "The certificate issuer is unknown"
    sends = 4096
    suffix = "\n"
    resume = "--resume",
    small = "--mtu", str(SMALL_MTU)
    large = "--mtu", "17000"
    piece = 254

    def argv(self, command, certs, who, port):
        return [command, "--udp", "--x509cafile", f"{certs}/ca.pem", "--port", str(port),
                "--x509certfile", f"{certs}/{who}.pem", "--x509keyfile", f"{certs}/{who}.key"]

    def client(self, t, where, *more, certs=None):
        return super().client(t, where, *more, *(() if self.small[0] in more else self.large), certs=certs)

    def client_argv(self, host, port, certs):
        return [*self.argv("gnutls-cli", certs, "client", port), host]

    def server_argv(self, port, certs):
        return ["stdbuf", "-oL", *self.argv("gnutls-serv", certs, "server", port), *self.large, "--echo",
                "--require-client-cert", "--verify-client-cert"]

    def echo(self, text):
        return [text[at:at + self.piece] for at in range(0, len(text), self.piece)]


class Socat(Installed):
    """Has no resumption, and its server takes one client in its life."""

    name = "socat"
    commands = "socat",
    connected = "SSL connection using"
    closed = "socket 2 .* is at EOF"
    ready = "listening on"
    noticed = "socket 1 .* is at EOF"
    refused = "alert unknown ca"
    refuses = "certificate verify failed"
    suffix = "\n"
    behind = "PIPE"  # what its server passes messages to: an echo

    @staticmethod
    def argv(certs, who, *ends):
        files = f"cafile={certs}/ca.pem,cert={certs}/{who}.pem,key={certs}/{who}.key,verify=1"
        return ["socat", "-d", "-d", "-b", str(2 * MESSAGE_MAX), *(end.replace("FILES", files) for end in ends)]

    def client_argv(self, host, port, certs):
        return self.argv(certs, "client", "-", f"OPENSSL-DTLS-CLIENT:{host}:{port},FILES")

    def server_argv(self, port, certs):
        return self.argv(certs, "server", f"OPENSSL-DTLS-SERVER:{port},bind=127.0.0.1,FILES", self.behind)


class ClosingSocat(Socat):
    behind = "EXEC:head -c 3"  # an echo of three bytes


class Compiled(Peer):
    """A program of tests/peers/, in both roles."""

    resume = "resume",
    ready = "listening"
    closed = noticed = "closed by the peer"
    before = ()  # headers that stand before
    header = None  # this one
    usable = "1"  # for the preprocessor
    libraries = ()
    lock = threading.Lock()
    folder = None  # for the programs of all
    source = None  # the file's name, where it is not that of the peer
    flags = ()

    def need(self):
        with self.lock:
            if not self.program:
                self.compile()

    def has(self, condition):
        """Whether the headers are there, and the preprocessor finds this true of them."""
        source = "".join(f"#include <{header}>\n" for header in (*self.before, self.header))
        source += f"#if !({condition})\n#error\n#endif\n"
        return subprocess.run([*CC, *self.flags, "-E", "-x", "c", "-"], input=source.encode(), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0

    def compile(self):
        if not self.has(self.usable):
            raise Skip(f"no {self.header}, or one that is too old or lacks what is needed")
        if not Compiled.folder:
            Compiled.folder = tempfile.mkdtemp(prefix="dtls-peers-bin-")
            FOLDERS.add(Compiled.folder)
        program = os.path.join(Compiled.folder, type(self).__name__)
        source = f"{self.source or self.name}.c"
        done = subprocess.run([*CC, "-O1", *self.flags, "-o", program, f"{ROOT}/tests/peers/{source}", *self.libraries],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        check(done.returncode == 0, f"{source} does not compile: {done.stdout.decode()[-300:]}")
        self.program = program

    def client_argv(self, host, port, certs):
        return [self.program, "client", host, str(port), certs]

    def server_argv(self, port, certs):
        return [self.program, "server", "127.0.0.1", str(port), certs]


class WolfSSL(Compiled):
    """Sends no message that would need IP fragments (wolfSSL_GetMaxOutputSize), and takes any before 5.6.4; from then on
    no larger ones. In a handshake it reads 1,400 bytes of a datagram (WOLFSSL_MAX_MTU in its internal.h) and, having lost
    what was behind them, puts no overlapping fragments together: with a chain that fills larger datagrams we need to be
    told."""

    name = "wolfssl"
    before = "wolfssl/options.h",
    header = "wolfssl/ssl.h"
    usable = "LIBWOLFSSL_VERSION_HEX >= 0x05000000"
    libraries = "-lwolfssl",
    connected = "connected: server, "
    refused = "failed: handshake: received alert"
    refuses = "failed: handshake: certificate verify failed"
    sends = 1300
    link_mtu = 1400
    chacha = "suite=ECDHE-ECDSA-CHACHA20-POLY1305"

    def compile(self):
        super().compile()
        if self.has("LIBWOLFSSL_VERSION_HEX >= 0x05006004"):
            self.takes = self.sends

    def echo(self, text):
        return [text if len(text) <= self.sends else f"{len(text)} bytes"]


class MbedTLS(Compiled):
    """Never fragments a ClientHello (mbedtls_ssl_get_current_mtu in its ssl_msg.c)."""

    name = "mbedtls"
    small = f"mtu={SMALL_MTU}",
    header = "mbedtls/ssl.h"
    libraries = "-lmbedtls", "-lmbedx509", "-lmbedcrypto"
    connected = "connected: CN=server, "
    refused = "failed: handshake: .*fatal alert"
    refuses = "failed: handshake: .*Certificate verification failed"
    chacha = "suite=TLS-ECDHE-ECDSA-WITH-CHACHA20-POLY1305-SHA256"


S_CLIENT = S_SERVER = OpenSSL()
GNUTLS, SOCAT, WOLFSSL, MBEDTLS = GnuTLS(), Socat(), WolfSSL(), MbedTLS()
EVERY = S_CLIENT, GNUTLS, SOCAT, WOLFSSL, MBEDTLS


# ---- the peers with pre-shared keys ----------------------------------------------------------------------------------


class Key(collections.namedtuple("Key", "identity text")):
    """libcoap takes keys as texts. The others, and we, have them in hex."""

    @property
    def hex(self):
        return self.text.encode().hex()

    def __str__(self):
        return f"{self.identity}:{self.hex}"


KEY = Key("sensor-1", "0123456789abcdef0123456789abcdef")
WRONG_KEY = KEY._replace(text=KEY.text[::-1])
UNKNOWN_IDENTITY = KEY._replace(identity="sensor-2")
DEADLINE_WAIT = 45.0  # seconds for what a handshake's deadline of 30 s ends
BEST = "ECDHE-PSK-CHACHA20-POLY1305"
CCM8 = "PSK-AES128-CCM8"


class Psk:
    """Mixed into a peer. Suites are those of ours that it has, by our names, each with the arguments that choose it."""

    certs = KEY
    client_suites = server_suites = ((BEST, ()),)
    resume_of_server = True  # whether it does
    one_identity = True  # for its server, other identities are unknown

    def talk(self, client, server, port):
        """A message from its client and one to it. `server` is ours."""
        client.ask("ping", "pong")
        client.ask("stats", f"127.0.0.1:{port} {KEY.identity}, ")

    def talk_of_server(self, client, server):
        """The same with our client."""
        client.ask("hello", "hello")

    def resuming(self, t, server):
        """Its client, connected for a second time."""
        client = self.client(t, server, *self.resume)
        client.says(self.connected, nth=2)
        return client


class PskOpenSSL(Psk, OpenSSL):
    """s_server warns of another identity and goes on, so the key decides. Without -listen it serves one client after the
    other."""

    one_identity = False
    connected = "PSK identity: "
    client_suites = server_suites = tuple((suite, ("-cipher", suite)) for suite in (
        BEST, "PSK-AES256-GCM-SHA384", "PSK-AES128-GCM-SHA256", "PSK-CHACHA20-POLY1305")) + (
            (CCM8, ("-cipher", f"{CCM8}:@SECLEVEL=0")),)

    def argv(self, mode, key):
        return [OPENSSL, mode, "-dtls1_2", "-psk", key.hex, "-psk_identity", key.identity]

    def client_argv(self, host, port, key):
        return [*self.argv("s_client", key), "-connect", f"{host}:{port}"]

    def server_argv(self, port, key):
        return [*self.argv("s_server", key), "-nocert", "-accept", f"127.0.0.1:{port}"]

    def talk_of_server(self, client, server):
        client.send("hello")
        server.shows("hello")
        server.send("answer")
        client.out.wait_line("answer")

    def resuming(self, t, server):
        session = t.path("session.pem")
        client = self.client(t, server, "-sess_out", session)
        client.says(self.connected)
        client.ask("ping", "pong")
        client.close_stdin()
        client.reap(PROMPT)
        return self.client(t, server, "-sess_in", session)


class PskGnuTLS(Psk, GnuTLS):
    """gnutls-cli 3.7 crashes once it has connected with ECDHE_PSK, to any server. Its library does not: libcoap uses it."""

    @staticmethod
    def priority(kx, *ciphers):
        only = ("-CIPHER-ALL", *ciphers) if ciphers else ()
        return "--priority", ":".join(("NORMAL:-VERS-ALL:+VERS-DTLS1.2:-KX-ALL", kx, *only))

    client_suites = (("PSK-AES256-GCM-SHA384", priority("+PSK", "+AES-256-GCM")),
                     ("PSK-AES128-GCM-SHA256", priority("+PSK", "+AES-128-GCM")),
                     ("PSK-CHACHA20-POLY1305", priority("+PSK", "+CHACHA20-POLY1305")),
                     (CCM8, priority("+PSK", "+AES-128-CCM-8")))
    server_suites = (BEST, priority("+ECDHE-PSK")), *client_suites
    resume = *GnuTLS.resume, *priority("+PSK")

    def client_argv(self, host, port, key):
        return ["gnutls-cli", "--udp", "--pskusername", key.identity, "--pskkey", key.hex, "--port", str(port), host]

    def server(self, t, *more, certs=None):
        key = certs or self.certs
        path = t.path("keys")
        pathlib.Path(path).write_text(f"{key}\n")
        return super().server(t, "--pskpasswd", path, *(more or self.priority("+ECDHE-PSK")), certs=key)

    def server_argv(self, port, key):
        return ["stdbuf", "-oL", "gnutls-serv", "--udp", "--port", str(port), *self.large, "--echo"]


class PskCompiled(Psk):
    connected = "connected: "

    def client_argv(self, host, port, key):
        return [*super().client_argv(host, port, "no-certs"), f"psk={key}"]

    def server_argv(self, port, key):
        return [*super().server_argv(port, "no-certs"), f"psk={key}"]


class PskWolfSSL(PskCompiled, WolfSSL):
    """As Debian builds it, it has no other suites of ours."""

    usable = f"{WolfSSL.usable} && !defined(NO_PSK)"
    client_suites = server_suites = tuple((suite, (f"suite={suite}",)) for suite in (BEST, "PSK-CHACHA20-POLY1305"))


class PskMbedTLS(PskCompiled, MbedTLS):
    client_suites = server_suites = tuple((ours, (f"suite={theirs}",)) for ours, theirs in (
        (BEST, "TLS-ECDHE-PSK-WITH-CHACHA20-POLY1305-SHA256"), ("PSK-AES256-GCM-SHA384", "TLS-PSK-WITH-AES-256-GCM-SHA384"),
        ("PSK-AES128-GCM-SHA256", "TLS-PSK-WITH-AES-128-GCM-SHA256"),
        ("PSK-CHACHA20-POLY1305", "TLS-PSK-WITH-CHACHA20-POLY1305-SHA256"), (CCM8, "TLS-PSK-WITH-AES-128-CCM-8")))


class PskLibCoAP(Psk, Installed):
    """Its client asks once, and takes no answer of ours for CoAP; its server answers a request by the index. It
    lets nobody choose the suite. Its server has one key for every identity, and its DTLS port is the one behind that of -p.
    """

    one_identity = False
    connected = "session connected"
    noticed = "session 0x[0-9a-f]+: closed"

    def __init__(self, library):
        self.name = f"libcoap {library}"
        self.commands = f"coap-client-{library}", f"coap-server-{library}"
        self.resume_of_server = library == "openssl"

    def client_argv(self, host, port, key):
        return [self.commands[0], "-v", "7", "-B", "5", "-u", key.identity, "-k", key.text, f"coaps://{host}:{port}/x"]

    def server_argv(self, port, key):
        return [self.commands[1], "-v", "7", "-A", "127.0.0.1", "-p", str(port - 1), "-k", key.text]

    def server(self, t, *more, certs=None):
        port = free_port()
        while not can_bind("127.0.0.1", port - 1):
            port = free_port()
        server = Foreign(t, f"{self.name} server", [*self.server_argv(port, certs or self.certs), *more])
        server.addr = f"127.0.0.1:{port}"
        wait_until(lambda: not server.running() or not can_bind("127.0.0.1", port), f"{self.name} server")
        check(server.running(), f"{self.name} server does not run")
        return server

    def talk(self, client, server, port):
        client.says("discard malformed PDU")

    def talk_of_server(self, client, server):
        client.send(b"\x40\x01\x12\x34")  # confirmable, GET, and a number of 16 bits (RFC 7252 section 3)
        client.out.wait("^`E\x124", partial=True)  # acknowledged, 2.05, with that number


PSK_EVERY = PskOpenSSL(), PskGnuTLS(), PskWolfSSL(), PskMbedTLS(), PskLibCoAP("openssl"), PskLibCoAP("gnutls")


def with_each(*peers, slow=False):
    """Registers a test once for each of these peers."""
    def register(function):
        for peer in peers:
            def one(t, peer=peer):
                peer.need()
                function(t, peer)
            one.__name__ = f"{peer.name}_{function.__name__}"
            test(one, slow=slow)
        return function
    return register


# ---- what the tests share --------------------------------------------------------------------------------------------


def text_of(size):
    """That many letters, none of which a tool takes for a command at the start of a line."""
    return ("abcdefghij" * (size // 10 + 1))[:size]


def stranger_folder(t, who):
    """A folder like CERTS for this side: our CA to trust, but a certificate of another to show."""
    folder = t.path("stranger")
    os.mkdir(folder)
    shown = t.other_authority().issue(who, usage=f"{who}Auth")
    shutil.copy(f"{CERTS}/ca.pem", folder)
    shutil.copy(shown.pem, f"{folder}/{who}.pem")
    shutil.copy(shown.key, f"{folder}/{who}.key")
    return folder


def our_client(t, server, *options, **more):
    """Foreign servers do not answer the pings of ours."""
    return t.client(server, "--keepalive", "0", *options, **more)


def lossy_relay(t, server, seed):
    """For a handshake: loss ends with it, since messages do not survive any."""
    relay = t.relay(server.addr, seed=seed)
    relay.loss = LOSS
    return relay


def our_terminal(t, server, *options):
    """On a terminal the client comes back by itself."""
    term = Term(t, [BIN, "client", "--certs", CERTS, "--keepalive", "0", *options, server.addr])
    term.shows_like("connected: server, .*, full handshake$")
    term.prompts()
    return term


# ---- tests: their client, our server ---------------------------------------------------------------------------------


@with_each(*EVERY)
def as_client(t, peer):
    """Both verify each other, messages of all sizes go both ways, and we notice at once that it closes."""
    server = t.server()
    client = peer.client(t, server)
    client.says(peer.connected)
    seen = server.connected()
    equal((seen["name"], seen["kind"]), ("client", "full handshake"), "certificate name and handshake in our log")
    client.ask("ping", "pong")
    client.ask("whoami", seen["addr"])
    client.ask("echo ~", "~")
    for size in (1200, peer.sends):
        text = text_of(size - len("echo ") - len(peer.suffix))
        client.ask("echo " + text, text)
    text = text_of(peer.takes - len("bc ")).upper()
    t.client(server).send("bc " + text)
    client.shows(text)
    client.close_stdin()
    server.err.wait_line(f"{seen['addr']} closed: closed by the peer", timeout=PROMPT)


@with_each(*EVERY)
def client_notices_that_we_close(t, peer):
    server = t.server()
    client = peer.client(t, server)
    client.ask("ping", "pong")
    server.stop()
    client.says(peer.closed, timeout=PROMPT)
    client.reap(PROMPT)


# s_client's resumption is in e2e.py. socat has none.
@with_each(GNUTLS, WOLFSSL, MBEDTLS)
def client_resumes(t, peer):
    server = t.server()
    client = peer.client(t, server, *peer.resume)
    client.says(peer.connected, nth=2)
    seen = server.connected(nth=2)
    equal((seen["name"], seen["kind"]), ("client", "resumed session"), "certificate name and handshake in our log")
    client.ask("ping", "pong")


# The same with s_client is in e2e.py.
@with_each(GNUTLS, SOCAT, WOLFSSL, MBEDTLS)
def client_from_another_ca_is_refused(t, peer):
    server = t.server()
    client = peer.client(t, server, certs=stranger_folder(t, "client"))
    server.err.wait(f"handshake failed: {UNKNOWN_ISSUER}")
    client.says(peer.refused)
    client.reap(PROMPT)
    equal(server.err.count("connected:"), 0, "connections")


@with_each(*EVERY, slow=True)
def client_refuses_a_server_from_another_ca(t, peer):
    folder = stranger_folder(t, "server")
    server = t.server(*Identity(f"{folder}/server.pem", f"{folder}/server.key").options)
    client = peer.client(t, server)
    client.says(peer.refuses)
    server.err.wait("handshake failed: refused by the peer: ")
    equal(server.err.count("connected:"), 0, "connections")


@with_each(S_CLIENT, GNUTLS, WOLFSSL, MBEDTLS, slow=True)
def client_through_loss(t, peer):
    server = t.server()
    relays = [lossy_relay(t, server, seed) for seed in LOSS_SEEDS]
    clients = [peer.client(t, relay) for relay in relays]
    for seed, relay, client in zip(LOSS_SEEDS, relays, clients):
        client.out.name += f" (seed {seed})"
        client.says(peer.connected, timeout=LOSS_WAIT)
        relay.loss = 0
        client.ask("ping", "pong")
    check(sum(relay.did["lost"] for relay in relays), f"nothing was lost with the seeds {LOSS_SEEDS}")


# ---- tests: our client, their server ---------------------------------------------------------------------------------


@with_each(GNUTLS, SOCAT, WOLFSSL, MBEDTLS)
def as_server(t, peer):
    """The same from the other side."""
    server = peer.server(t)
    client = our_client(t, server)
    equal(client.connected()["name"], "server", "certificate name in our log")
    wanted = []
    for text in (".", text_of(1200), text_of(peer.takes)):
        client.send(text)
        wanted += peer.echo(text)
        client.out.until(lambda: len(client.out.lines()) >= len(wanted), f"answer to {len(text)} bytes")
    client.ends()
    equal(client.out.lines(), wanted, "answers")
    server.says(peer.noticed, timeout=PROMPT)


@with_each(S_SERVER)
def server_and_large_messages(t, peer):
    server = peer.server(t)
    client = our_client(t, server)
    text = text_of(MESSAGE_MAX)
    client.send(text)
    server.shows(text)
    text = text[:MESSAGE_MAX - 1]  # its line's end belongs to the message
    server.send(text)
    client.out.until(lambda: text in client.out.lines(), f"text of {len(text)} bytes")
    client.ends()
    server.says(peer.noticed, timeout=PROMPT)


# gnutls-serv never closes, and of s_server's close ("q") nothing reaches the network.
@with_each(ClosingSocat(), WOLFSSL, MBEDTLS)
def server_closes(t, peer):
    server = peer.server(t)
    client = our_client(t, server)
    client.connected()
    client.send("bye")
    client.err.wait(f"^{server.addr} closed: closed by the peer$", timeout=PROMPT)
    client.exits(1, timeout=PROMPT)


# s_server and socat serve one client only.
@with_each(WOLFSSL, MBEDTLS)
def server_resumes(t, peer):
    server = peer.server(t)
    term = our_terminal(t, server)
    for nth in (1, 2):
        term.type("bye\r")
        term.shows_like("closed: closed by the peer$", nth)
        term.shows_like("connected: server, .*, resumed session$", nth)
        term.prompts()


@with_each(GNUTLS)
def server_resumes_after_silence(t, peer):
    """It does not close, so our client must lose it: it stands still until it was given up."""
    server = peer.server(t)
    term = our_terminal(t, server, "--keepalive", "0.3")
    server.send_signal(signal.SIGSTOP)
    term.shows_like("closed: idle for ")
    server.send_signal(signal.SIGCONT)
    term.shows_like("connected: server, .*, resumed session$")


# wolfSSL 5.5 as server does not send its last flight again when that is lost, whatever the client repeats.
@with_each(S_SERVER, GNUTLS, MBEDTLS, slow=True)
def server_through_loss(t, peer):
    relays = [lossy_relay(t, peer.server(t), seed) for seed in LOSS_SEEDS]
    clients = [our_client(t, relay) for relay in relays]
    for seed, client in zip(LOSS_SEEDS, clients):
        client.err.name += f" (seed {seed})"
        client.connected(timeout=LOSS_WAIT)
        client.ends()
    check(sum(relay.did["lost"] for relay in relays), f"nothing was lost with the seeds {LOSS_SEEDS}")


@with_each(GNUTLS)
def server_without_cookies(t, peer):
    server = peer.server(t, "--nocookie")
    relay = t.relay(server.addr)
    client = our_client(t, relay)
    client.ask("hello", "hello")
    client.ends()
    hellos = [one for one in relay.handshake(True) if one.data[RECORD_HEADER] == CLIENT_HELLO]
    equal(len(hellos), 1, "ClientHellos")


@with_each(*EVERY)
def server_from_another_ca_is_refused(t, peer):
    """Our client tries twice. socat is gone by then: the first try's reason counts."""
    server = peer.server(t, certs=stranger_folder(t, "server"))
    client = our_client(t, server, stdin=b"ping\n").exits(1)
    client.err.wait(f"handshake failed: {UNKNOWN_ISSUER}")
    equal(client.out.text, "", "stdout")
    server.says(peer.refused)


@with_each(*EVERY, slow=True)
def server_refuses_a_client_from_another_ca(t, peer):
    """Our client tries again. socat is gone by then, and gnutls-serv 3.7 has crashed: the first try's reason counts."""
    folder = stranger_folder(t, "client")
    server = peer.server(t)
    client = our_client(t, server, *Identity(f"{folder}/client.pem", f"{folder}/client.key").options, stdin=b"ping\n")
    client.exits(1)
    client.err.wait("handshake failed: refused by the peer: ")
    equal(client.out.text, "", "stdout")
    server.says(peer.refuses)


# ---- tests: what peers may be restricted to --------------------------------------------------------------------------


def fragments(relay, kind):
    """How many datagrams to the server begin with a part of a handshake message of this type."""
    bodies = [one.data[RECORD_HEADER:] for one in relay.handshake(True)]
    return sum(body[0] == kind and body[1:4] != body[9:12] for body in bodies)  # its length, and that of the fragment


@with_each(GNUTLS, MBEDTLS)
def client_in_small_fragments(t, peer):
    relay = t.relay(t.server())
    peer.client(t, relay, *peer.small).ask("ping", "pong")
    check(fragments(relay, CERTIFICATE) >= 4, "no certificate came in many fragments")
    if peer is GNUTLS:
        check(fragments(relay, CLIENT_HELLO) >= 2, "no ClientHello came in fragments")


@with_each(*EVERY)
def client_of_a_server_with_a_small_mtu(t, peer):
    client = peer.client(t, t.server("--mtu", "256"))
    client.says(peer.connected)
    client.ask("ping", "pong")


@with_each(MBEDTLS)
def server_in_small_fragments(t, peer):
    client = our_client(t, peer.server(t, *peer.small))
    client.ask("ping", "pong")
    client.ends()


@with_each(S_CLIENT)
def client_with_small_fragments(t, peer):
    """max_fragment_length: a broadcast that is too large for it does not reach that client, and does it no harm."""
    server = t.server()
    client = peer.client(t, server, "-maxfraglen", "512")
    client.says(peer.connected)
    client.ask("ping", "pong")
    other = t.client(server)
    text = text_of(600 - len("bc "))
    other.ask("bc " + text, text)
    client.ask("echo after", "after")
    check(text not in client.out.text, "it was sent more than it takes")
    other.ask("bc " + text[:512], text[:512])
    client.shows(text[:512])


@with_each(WOLFSSL, MBEDTLS)
def with_chacha_only(t, peer):
    server = t.server()
    peer.client(t, server, peer.chacha).ask("ping", "pong")
    equal(server.connected()["cipher"], "ECDHE-ECDSA-CHACHA20-POLY1305", "suite with their client")
    client = our_client(t, peer.server(t, peer.chacha))
    client.ask("ping", "pong")
    equal(client.connected()["cipher"], "ECDHE-ECDSA-CHACHA20-POLY1305", "suite with their server")
    client.ends()


@with_each(GNUTLS)
def client_refused_for_what_it_cannot(t, peer):
    """GnuTLS takes an alert seriously only when it comes again after its next ClientHello, so we may refuse twice. From
    OpenSSL 3.2 on both have the same record number, and it does not notice the second."""
    server = t.server()
    version = re.search(r"OpenSSL (\d+)\.(\d+)", subprocess.run([BIN, "--version"], stdout=subprocess.PIPE).stdout.decode())
    notices = tuple(map(int, version.groups())) < (3, 2)
    for priority, reason, alert in (("NORMAL:-VERS-ALL:+VERS-DTLS1.0", "unsupported protocol", "protocol version"),
                                    ("NORMAL:-CIPHER-ALL:+AES-128-CBC", "no shared cipher", "Handshake failed"),
                                    ("NORMAL:-KX-ALL:+DHE-RSA", "no shared cipher", "Handshake failed")):
        before = server.err.count(reason)
        client = peer.client(t, server, "--priority", priority)
        server.err.wait(f"handshake failed: protocol error: {reason}", nth=before + 1)
        if notices:
            client.says(f"Received alert .*{alert}")
            client.reap(PROMPT)
        else:
            client.kill()
    equal(server.err.count("connected:"), 0, "connections")


@with_each(MBEDTLS)
def client_with_cbc_only_is_refused(t, peer):
    server = t.server()
    client = peer.client(t, server, "suite=TLS-ECDHE-ECDSA-WITH-AES-128-CBC-SHA256")
    server.err.wait("handshake failed: protocol error: no shared cipher")
    client.says(peer.refused)


# ---- tests: pre-shared keys ------------------------------------------------------------------------------------------


def psk_server_of_ours(t, *options, certs=None):
    """Without certificates where no folder is named."""
    return t.server("--psk", KEY, *options, certs=certs or t.tmp)


def psk_client_of_ours(t, server, *options, key=KEY, **more):
    return our_client(t, server, "--psk", key, *options, certs=t.tmp, **more)


def is_named(seen, suite, kind="full handshake"):
    equal((seen["name"], seen["cipher"], seen["kind"]), (KEY.identity, suite, kind),
          "identity, suite and handshake in our log")


@with_each(*PSK_EVERY)
def psk_client(t, peer):
    """With each of the suites that both have: our log and our stats have the identity, messages go both ways."""
    server = psk_server_of_ours(t, "--psk-ccm8")
    other = psk_client_of_ours(t, server)
    server.connected()
    for nth, (suite, chosen) in enumerate(peer.client_suites, 2):
        client = peer.client(t, server, *chosen)
        client.says(peer.connected)
        seen = server.connected(nth)
        is_named(seen, suite)
        other.send("stats")
        other.out.wait(f"^{seen['addr']} {KEY.identity}, ")
        peer.talk(client, server, split_addr(seen["addr"])[1])
        client.close_stdin()
        server.err.wait_line(f"{seen['addr']} closed: closed by the peer")


@with_each(*PSK_EVERY)
def psk_server(t, peer):
    """The same from the other side."""
    for suite, chosen in peer.server_suites:
        server = peer.server(t, *chosen)
        client = psk_client_of_ours(t, server, "--psk-ccm8")
        equal(client.connected()["cipher"], suite, "suite in our log")
        peer.talk_of_server(client, server)
        client.ends()
        server.says(peer.noticed)


# libcoap's client has no resumption.
@with_each(*PSK_EVERY[:4])
def psk_client_resumes(t, peer):
    server = psk_server_of_ours(t)
    client = peer.resuming(t, server)
    seen = server.connected(nth=2)
    is_named(seen, seen["cipher"], "resumed session")
    peer.talk(client, server, split_addr(seen["addr"])[1])


@with_each(*PSK_EVERY)
def psk_server_resumes(t, peer):
    """libcoap with GnuTLS keeps no sessions: then it is a full handshake again."""
    server = peer.server(t)
    for kind in ("full handshake", "resumed session" if peer.resume_of_server else "full handshake"):
        client = psk_client_of_ours(t, server, "--session", t.path("session"))
        equal(client.connected()["kind"], kind, "handshake in our log")
        peer.talk_of_server(client, server)
        client.ends()


@with_each(*PSK_EVERY)
def psk_client_beside_certificates(t, peer):
    server = psk_server_of_ours(t, certs=CERTS)
    t.ping(server)
    equal(server.connected()["name"], "client", "certificate name in our log")
    suite, chosen = peer.client_suites[0]
    peer.client(t, server, *chosen).says(peer.connected)
    is_named(server.connected(nth=2), suite)


@with_each(PSK_EVERY[0], PSK_EVERY[1], PSK_EVERY[3])
def psk_client_with_ccm8_only_is_refused(t, peer):
    """By a server that was not told to take it."""
    server = psk_server_of_ours(t)
    peer.client(t, server, *dict(peer.client_suites)[CCM8])
    server.err.wait("handshake failed: protocol error: no shared cipher")
    equal(server.err.count("connected:"), 0, "connections")


def installed(peers):
    """Those of them; a test of several need not be skipped for one."""
    for peer in peers:
        try:
            peer.need()
            yield peer
        except Skip:
            pass


def answers(relay):
    """What came back, without numbers: the kinds of the records and of the messages in them, repetitions left out. What
    is encrypted tells its length only."""
    shapes = []
    for one in [one for one in relay.log if not one.to_server]:
        at = 0
        while at + RECORD_HEADER <= len(one.data):
            size = int.from_bytes(one.data[at + 11:at + RECORD_HEADER], "big")
            plain = one.data[at + 3:at + 5] == b"\0\0" and one.data[at] == HANDSHAKE
            shapes.append((one.data[at], one.data[at + RECORD_HEADER] if plain else None, size))
            at += RECORD_HEADER + size
    return sorted(set(shapes))


@test(slow=True)
def psk_clients_with_a_wrong_key_or_identity(t):
    """Of every peer at once, since our server waits for its deadline: it answers both in the same way."""
    server = psk_server_of_ours(t)
    relays, clients = [], []
    for peer in installed(PSK_EVERY):
        suite, chosen = peer.client_suites[0]
        for key in (WRONG_KEY, UNKNOWN_IDENTITY):
            relay = t.relay(server.addr)
            clients.append((peer, peer.client(t, relay, *chosen, certs=key)))
            relays.append(relay)
    server.err.wait("handshake failed: ", nth=len(clients), timeout=DEADLINE_WAIT)
    equal(server.err.count("connected:"), 0, "connections")
    for reason in (f"the pre-shared key may be wrong, for identity {WRONG_KEY.identity}",
                   f"no pre-shared key is known, for identity {UNKNOWN_IDENTITY.identity}"):
        equal(server.err.count(reason), len(clients) / 2, f"times that our log says '{reason}'")
    for (peer, client), wrong, unknown in zip(clients[::2], relays[::2], relays[1::2]):
        kinds = {kind for kind, message, size in answers(wrong)}
        equal(kinds, {HANDSHAKE}, f"kinds of the records that answer {peer.name}")
        equal(answers(unknown), answers(wrong), f"answers to an unknown identity and to a wrong key, {peer.name}")
    for peer, client in clients:
        equal(client.out.count(peer.connected), 0, f"connections of {client.title}")


@test(slow=True)
def psk_servers_with_another_key_or_identity(t):
    """Our client does not connect."""
    clients = []
    for peer in installed(PSK_EVERY):
        for key in (WRONG_KEY, UNKNOWN_IDENTITY):
            if key is WRONG_KEY or peer.one_identity:
                clients.append(psk_client_of_ours(t, peer.server(t), key=key, stdin=b"ping\n"))
    for client in clients:
        client.exits(1, timeout=2 * DEADLINE_WAIT)
        equal((client.out.text, client.err.count("connected:")), ("", 0), f"stdout and connections of {client.title}")


# ---- tests: RSA ------------------------------------------------------------------------------------------------------


class Rsa:
    """A folder like CERTS with keys of 4,096 bits and an intermediate CA, made once for all tests that need it."""

    NEWKEY = ["-newkey", "rsa:4096"]
    lock = threading.Lock()
    folder = None

    @classmethod
    def get(cls):
        with cls.lock:
            if not cls.folder:
                folder = pathlib.Path(tempfile.mkdtemp(prefix="dtls-peers-rsa-"))
                FOLDERS.add(folder)
                cls.make(folder)
                cls.folder = folder
        return str(cls.folder)

    @classmethod
    def make(cls, folder):
        root = Authority(folder / "root", newkey=cls.NEWKEY)
        between = Authority(folder / "between", *root.issue("intermediate", ca=True), newkey=cls.NEWKEY)
        shutil.copy(root.pem, folder / "ca.pem")
        for who in ("server", "client"):
            leaf = between.issue(who, usage=f"{who}Auth")
            shutil.copy(leaf.key, folder / f"{who}.key")
            chain = pathlib.Path(leaf.pem).read_bytes() + pathlib.Path(between.pem).read_bytes()
            (folder / f"{who}.pem").write_bytes(chain)


@with_each(*EVERY, slow=True)
def client_with_rsa_4096(t, peer):
    server = t.server("--mtu", str(peer.link_mtu), certs=Rsa.get())
    client = peer.client(t, server, certs=Rsa.get())
    client.says(peer.connected)
    client.ask("ping", "pong")
    equal(server.connected()["name"], "client", "certificate name in our log")


@with_each(GNUTLS, SOCAT, WOLFSSL, MBEDTLS, slow=True)
def server_with_rsa_4096(t, peer):
    if peer is SOCAT and b"socat version 1.7.4.1 " in subprocess.run(["socat", "-V"], stdout=subprocess.PIPE).stdout:
        raise Skip("socat 1.7.4.1 crashes then")
    server = peer.server(t, certs=Rsa.get())
    client = our_client(t, server, "--mtu", str(peer.link_mtu), certs=Rsa.get())
    equal(client.connected()["name"], "server", "certificate name in our log")
    client.ask("hello", peer.echo("hello")[0])
    client.ends()


# ---- tests: addresses that change -------------------------------------------------------------------------------------


class Built:
    """Mixed into a compiled peer: with the library that build.sh made, which has connection IDs."""

    built = pathlib.Path(ROOT, "tests/build/peers")

    def lacks(self):
        """Why it cannot be had; None: it can."""
        if (self.built / self.source).is_dir():
            return None
        why = self.built / f"{self.source}.why"
        return why.read_text().strip() if why.exists() else "tests/peers/build.sh tests/build/peers would build it"

    def compile(self):
        folder = self.built / self.source
        self.flags = f"-I{folder}/include", *(folder / "flags").read_text().split()
        self.libraries = f"{folder}/{self.source}.a",
        super().compile()

    declined = 5  # bytes of the connection ID that its client may offer to a server that agrees upon none

    @staticmethod
    def cids(came, went):
        return f"connection IDs: {came} in, {went} out"

    def suite(self, suite):
        return f"suite={self.suites[suite]}"


GCM128, GCM256, CHACHA = "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"


class BuiltMbedTLS(Built, MbedTLS):
    """With two empty connection IDs it says that there are none."""

    name, source = "mbedtls with cid", "mbedtls"
    suites = {GCM128: "TLS-ECDHE-ECDSA-WITH-AES-128-GCM-SHA256", GCM256: "TLS-ECDHE-ECDSA-WITH-AES-256-GCM-SHA384",
              CHACHA: "TLS-ECDHE-ECDSA-WITH-CHACHA20-POLY1305-SHA256", CCM8: "TLS-PSK-WITH-AES-128-CCM-8"}

    @staticmethod
    def cids(came, went):
        return Built.cids(came, went) if came or went else "connection IDs: none"


class BuiltWolfSSL(Built, WolfSSL):
    """A client of 5.9.2 drops every record after a ServerHello without the extension, if it had offered a connection ID that
    is not empty: DtlsCIDOnExtensionsParsed in its dtls.c is called for DTLS 1.3 only. The same with its own server."""

    name, source = "wolfssl with cid", "wolfssl"
    declined = 0
    suites = {GCM128: "ECDHE-ECDSA-AES128-GCM-SHA256", GCM256: "ECDHE-ECDSA-AES256-GCM-SHA384",
              CHACHA: "ECDHE-ECDSA-CHACHA20-POLY1305", CCM8: "PSK-AES128-CCM-8"}


def all_built(*peers):
    """Those of them. Of the others one test tells why they are not there, in place of all."""
    for peer in peers:
        if peer.lacks():
            def roaming(t, peer=peer):
                raise Skip(peer.lacks())
            roaming.__name__ = f"{peer.name}_roaming"
            test(roaming)
    return tuple(peer for peer in peers if not peer.lacks())


WITH_CID = all_built(BuiltMbedTLS(), BuiltWolfSSL())
MOVES = 2
CID_MAX = 20
SMALL_LINK = 256


def rebinds(client, nth):
    """A foreign client that goes on from another port, and its new address."""
    client.send("/rebind")
    return "127.0.0.1:" + client.says(r"rebound: (\d+)", nth)[1]


def follows(client, server, move, name="client"):
    """Our server follows its only client; move(nth) has that go on from another address, and returns it. Returns the last
    one."""
    addr = server.connected()["addr"]
    client.ask("ping", "pong")
    for nth in range(1, MOVES + 1):
        before, addr = addr, move(nth)
        client.ask(f"echo after move {nth}", f"after move {nth}")
        server.err.wait_line(f"{addr} moved from {before}")
        client.ask("whoami", addr)
        client.ask("stats", f"{addr} {name}, ")
    equal(server.err.count(" moved from "), MOVES, "moves in our log")
    equal(server.err.count("handshake failed|closed:"), 0, "what went wrong in our log")
    return addr


def leaves(client, server, addr):
    client.close_stdin()
    server.err.wait_line(f"{addr} closed: closed by the peer", timeout=PROMPT)


@with_each(*WITH_CID)
def roaming_client(t, peer):
    """Connection IDs of all lengths on either side."""
    for ours, theirs in ((None, 0), (None, 8), (1, 20), (20, 1)):
        server = t.server(*(() if ours is None else ("--cid", ours)))
        client = peer.client(t, server, f"cid={theirs}")
        client.says(peer.cids(theirs, 8 if ours is None else ours))
        leaves(client, server, follows(client, server, lambda nth: rebinds(client, nth)))


@with_each(*WITH_CID)
def roaming_client_that_offers_none(t, peer):
    """Nor does it get any."""
    server = t.server()
    client = peer.client(t, server)
    client.says(peer.connected)
    leaves(client, server, follows(client, server, lambda nth: rebinds(client, nth)))


@with_each(*WITH_CID)
def roaming_client_of_a_server_without_cid(t, peer):
    """It is followed all the same, by its keys."""
    for ours, theirs, said in (("never", peer.declined, "connection IDs: (none|0 in, 0 out)"), (0, 5, peer.cids(5, 0)),
                               (0, 0, peer.cids(0, 0))):
        server = t.server("--cid", ours)
        client = peer.client(t, server, f"cid={theirs}")
        client.says(said)
        leaves(client, server, follows(client, server, lambda nth: rebinds(client, nth)))


@with_each(*WITH_CID)
def roaming_client_with_each_suite(t, peer):
    for suite in peer.suites:
        server = t.server("--psk", KEY, "--psk-ccm8")
        client = peer.client(t, server, "cid=4", peer.suite(suite), *((f"psk={KEY}",) if suite == CCM8 else ()))
        equal(server.connected()["cipher"], suite, "suite in our log")
        name = KEY.identity if suite == CCM8 else "client"
        leaves(client, server, follows(client, server, lambda nth: rebinds(client, nth), name))


@with_each(*WITH_CID)
def roaming_client_resumes(t, peer):
    server = t.server()
    client = peer.client(t, server, "cid=4", *peer.resume)
    client.says(peer.cids(4, 8), nth=2)
    seen = server.connected(nth=2)
    equal((seen["name"], seen["kind"]), ("client", "resumed session"), "certificate name and handshake in our log")
    addr = seen["addr"]
    for nth in range(1, MOVES + 1):
        before, addr = addr, rebinds(client, nth)
        client.ask("whoami", addr)
        server.err.wait_line(f"{addr} moved from {before}")
    leaves(client, server, addr)


@with_each(*WITH_CID)
def roaming_client_and_sizes(t, peer):
    """Messages of all sizes from the new address, and a broadcast to it; then we close."""
    server = t.server()
    client = peer.client(t, server, "cid=20")
    follows(client, server, lambda nth: rebinds(client, nth))
    for size in (1, 2, 15, 16, 17, 1200, peer.sends - len("echo ")):
        text = text_of(size)
        client.ask("echo " + text, text)
    text = text_of(peer.takes - len("bc ")).upper()
    other = t.client(server)
    other.send("bc " + text)
    client.shows(text)
    other.out.wait_line(text)
    other.ends()
    rebinds(client, MOVES + 1)
    client.ask("ping", "pong")
    server.stop()
    client.says(peer.closed, timeout=PROMPT)
    client.reap(PROMPT)


@with_each(*WITH_CID, slow=True)
def roaming_client_through_loss(t, peer):
    """A handshake with connection IDs that loses datagrams, and a move behind it."""
    server = t.server()
    relays = [lossy_relay(t, server, seed) for seed in LOSS_SEEDS]
    clients = [peer.client(t, relay, "cid=4") for relay in relays]
    for seed, relay, client in zip(LOSS_SEEDS, relays, clients):
        client.out.name += f" (seed {seed})"
        client.says(peer.cids(4, 8), timeout=LOSS_WAIT)
        relay.loss = 0
        client.ask("ping", "pong")
        rebinds(client, 1)
        client.ask("ping", "pong")
    check(sum(relay.did["lost"] for relay in relays), f"nothing was lost with the seeds {LOSS_SEEDS}")
    equal(server.err.count(" moved from "), len(clients), "moves in our log")


@with_each(*WITH_CID)
def roaming_client_closes_from_another_port(t, peer):
    """Its close_notify is the first that comes from there."""
    server = t.server()
    client = peer.client(t, server, "cid=4")
    client.ask("ping", "pong")
    leaves(client, server, rebinds(client, 1))


@with_each(*WITH_CID)
def roaming_client_of_a_server_with_a_small_mtu(t, peer):
    """There is room for the longest connection ID in each datagram of ours."""
    relay = t.relay(t.server("--mtu", SMALL_LINK, "--cid", CID_MAX))
    client = peer.client(t, relay, f"cid={CID_MAX}")
    client.says(peer.cids(CID_MAX, CID_MAX))
    client.ask("ping", "pong")
    largest = max(len(one.data) for one in relay.log if not one.to_server)
    check(largest <= SMALL_LINK - IP_UDP_BYTES, f"a datagram of {largest} bytes")


@with_each(*WITH_CID)
def roaming_client_in_the_place_of_another(t, peer):
    """That has ended without a word; from its address, and with connection IDs of its own."""
    server = t.server()
    relay = t.relay(server, one_port=True)
    former = peer.client(t, relay, "cid=4")
    former.ask("ping", "pong")
    former.kill()
    client = peer.client(t, relay, "cid=5")
    client.says(peer.cids(5, 8))
    addr = server.connected(nth=2)["addr"]
    server.err.wait_line(f"{addr} closed: replaced by a new association from the same address")
    client.ask("whoami", addr)
    leaves(client, server, addr)


def goes_on(client, nth):
    """Our client from another port; the port."""
    client.send_signal(signal.SIGUSR1)
    return split_addr(client.err.wait(r"^\S+ goes on from (\S+)$", nth)[1])[1]


def followed(client, server):
    """Their server follows our client."""
    client.ask("hello", "hello")
    for nth in range(1, MOVES + 1):
        port = goes_on(client, nth)
        client.ask(f"after move {nth}", f"after move {nth}")
        server.says(f"moved: {port}\n")


@with_each(*WITH_CID)
def roaming_server(t, peer):
    """Its server follows our client. wolfSSL and Mbed TLS leave that to the application, tests/peers/peer.h here."""
    for theirs, ours in ((8, None), (8, 4), (1, 20), (20, 1)):
        server = peer.server(t, f"cid={theirs}")
        client = our_client(t, server, *(() if ours is None else ("--cid", ours)))
        server.says(peer.cids(theirs, ours or 0))
        followed(client, server)
        client.ends()
        server.says(peer.noticed, timeout=PROMPT)


@with_each(*WITH_CID)
def roaming_server_closes(t, peer):
    server = peer.server(t, "cid=8")
    client = our_client(t, server)
    followed(client, server)
    client.send("bye")
    client.err.wait(f"^{server.addr} closed: closed by the peer$", timeout=PROMPT)
    client.exits(1, timeout=PROMPT)


@with_each(*WITH_CID)
def roaming_server_with_each_suite(t, peer):
    for suite in peer.suites:
        psk = suite == CCM8
        server = peer.server(t, "cid=8", peer.suite(suite), *((f"psk={KEY}",) if psk else ()))
        client = our_client(t, server, *(("--psk", KEY, "--psk-ccm8") if psk else ()), certs=t.tmp if psk else None)
        equal(client.connected()["cipher"], suite, "suite in our log")
        followed(client, server)
        client.ends()


@with_each(*WITH_CID)
def roaming_server_resumes(t, peer):
    server = peer.server(t, "cid=8")
    for kind in ("full handshake", "resumed session"):
        client = our_client(t, server, "--session", t.path("session"), "--cid", "4")
        equal(client.connected()["kind"], kind, "handshake in our log")
        followed(client, server)
        client.ends()
        server.says(peer.noticed, nth=1 + (kind == "resumed session"), timeout=PROMPT)


@with_each(*WITH_CID)
def roaming_server_and_sizes(t, peer):
    server = peer.server(t, "cid=20")
    client = our_client(t, server, "--cid", "20")
    followed(client, server)
    for size in (1, 2, 15, 16, 17, 1200, peer.takes - 1):
        text = text_of(size).upper()
        client.ask(text, *peer.echo(text))
    client.ends()


@with_each(*WITH_CID)
def roaming_server_that_was_started_again(t, peer):
    """Our client asks by another handshake, and goes on with new connection IDs."""
    server = peer.server(t, "cid=8")
    client = our_client(t, server, "--cid", "4", "--unanswered", "1")
    followed(client, server)
    server.kill()
    server = Foreign(t, f"{peer.name} server", server.argv[4:])
    server.says(peer.ready)
    client.send("are you there")
    client.err.wait(" renewed: ")
    server.says(peer.cids(8, 4))
    client.ask("hello", "hello")
    port = goes_on(client, client.err.count(" goes on from ") + 1)
    client.ask("again", "again")
    server.says(f"moved: {port}\n")
    client.close_stdin()
    client.exits(1)  # since a line was lost


@with_each(*WITH_CID, slow=True)
def roaming_server_through_loss(t, peer):
    relays = [lossy_relay(t, peer.server(t, "cid=8"), seed) for seed in LOSS_SEEDS]
    clients = [our_client(t, relay, "--cid", "4") for relay in relays]
    for seed, relay, client in zip(LOSS_SEEDS, relays, clients):
        client.err.name += f" (seed {seed})"
        client.connected(timeout=LOSS_WAIT)
        relay.loss = 0
        client.ask("hello", "hello")
        goes_on(client, 1)
        client.ask("again", "again")
        client.ends()
    check(sum(relay.did["lost"] for relay in relays), f"nothing was lost with the seeds {LOSS_SEEDS}")


@with_each(*WITH_CID)
def roaming_among_themselves(t, peer):
    """Their client with their servers: what fails here is not ours."""
    for other in installed(WITH_CID):
        server = other.server(t, "cid=8")
        client = peer.client(t, server, "cid=4")
        client.says(peer.cids(4, 8))
        client.ask("hello", "hello")
        for nth in range(1, MOVES + 1):
            addr = rebinds(client, nth)
            client.ask(f"after move {nth}", f"after move {nth}")
            server.says(f"moved: {split_addr(addr)[1]}\n")
        client.close_stdin()
        server.says(other.noticed, timeout=PROMPT)


# Stock clients, none of which knows of connection IDs: a NAT gives them other ports. roam.py has more of it.
STOCK = ((S_CLIENT, GCM128, ("-cipher", GCM128)), (S_CLIENT, GCM256, ("-cipher", GCM256)),
         (S_CLIENT, CHACHA, ("-cipher", CHACHA)),
         (GNUTLS, "ECDHE-ECDSA-AES256-GCM-SHA384", ("--priority", "NORMAL:-CIPHER-ALL:+AES-256-GCM")),
         (GNUTLS, CHACHA, ("--priority", "NORMAL:-CIPHER-ALL:+CHACHA20-POLY1305")),
         (SOCAT, None, ()),
         *((WOLFSSL, suite, ("suite=" + BuiltWolfSSL.suites[suite],)) for suite in (GCM128, GCM256, CHACHA)),
         *((MBEDTLS, suite, ("suite=" + BuiltMbedTLS.suites[suite],)) for suite in (GCM128, GCM256, CHACHA)))


def with_stock(function):
    for peer, suite, chosen in STOCK:
        def one(t, peer=peer, suite=suite, chosen=chosen):
            peer.need()
            function(t, peer, suite, chosen)
        one.__name__ = f"{peer.name}_{function.__name__}{f'_{suite}' if suite else ''}"
        test(one)
    return function


@with_stock
def roaming_stock_client(t, peer, suite, chosen):
    server = t.server()
    nat = t.nat(server)
    client = peer.client(t, nat, *chosen)
    client.says(peer.connected)
    seen = server.connected()
    check(suite in (None, seen["cipher"]), f"the suite is {seen['cipher']}")
    leaves(client, server, follows(client, server, lambda nth: nat.rebind(0)))


@test
def roaming_of_all_at_once(t):
    """Behind one NAT, which gives all of them new ports, and then each that of another."""
    server = t.server()
    nat = t.nat(server)
    clients = []
    for peer, options in [*((peer, ()) for peer in installed(EVERY)), *((peer, ("cid=4",)) for peer in installed(WITH_CID))]:
        clients.append(peer.client(t, nat, *options))
        clients[-1].says(peer.connected)
        server.connected(nth=len(clients))
    for nth in range(3):
        nat.restart()
        for client in clients:
            client.send(f"echo restart {nth}")
        for client in clients:
            client.shows(f"restart {nth}")
        for other in range(1, len(clients)):
            nat.swap(other - 1, other)
        for client in clients:
            client.send(f"echo rotation {nth}")
        for client in clients:
            client.shows(f"rotation {nth}")
    for number, client in enumerate(clients):
        client.ask("whoami", nat.own_addr(number))
    equal(server.err.count("connected:"), len(clients), "connections that were ever made")
    equal(server.err.count("closed:"), 0, "connections closed")


@with_each(*EVERY)
def roaming_stock_client_that_we_close(t, peer):
    """Behind a NAT, from whose new port it has spoken."""
    server = t.server()
    nat = t.nat(server)
    client = peer.client(t, nat)
    client.says(peer.connected)
    follows(client, server, lambda nth: nat.rebind(0))
    server.stop()
    client.says(peer.closed, timeout=PROMPT)
    client.reap(PROMPT)


if __name__ == "__main__":
    sys.exit(main())
