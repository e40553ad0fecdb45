#!/usr/bin/env python3
"""Hostile traffic and lossy links, on real sockets against the real server. harness.py says how it runs; with --all at
length.

Everything stays on loopback and is bounded in count and time. Memory and speed are measured on an optimized build,
which is made here with tests/crowd.c (many clients in one process) and tests/storm.c (many stock OpenSSL clients, and
attackers).
"""

import os
import pathlib
import random
import re
import resource
import shutil
import socket
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (ALERT, CC, CERTS, DATA, FOLDERS, HANDSHAKE, MESSAGE_MAX, Proc, ROOT, Skip, check, equal, main,
                     record, split_addr, test, wait_until)  # noqa: E402

ALL = "--all" in sys.argv
HELLOS = 1000000 if ALL else 100000  # in a flood
SEEDS = range(1, 6 if ALL else 3)  # of lossy and forging networks
SOURCES = 250  # sockets of a flood, each with an address of its own
GROWTH_KB = 1024  # what the allocator may keep back: a connection alone takes 40
SESSION_KB = 8  # of a client that was there: its session, kept for resumption
CONNECT_S = 2.0  # a real client gets in within this time, whatever goes on, and 20 times what it takes in quiet
MEDIAN_S = 1.5  # of handshakes through heavy loss, and ten times what they take without
ECHO_S = 1.0  # for an echo, and 20 times what it takes in quiet
DEADLINE_S = 30  # of a handshake
CONNECTED = re.compile(r"^connected (\d+) of \d+(?:, median ([\d.]+) s, slowest ([\d.]+) s)?$", re.M)
ALIVE = re.compile(r"^alive (\d+) of \d+, answered (\d+) of (\d+)(?:, median ([\d.]+) ms, slowest ([\d.]+) ms)?$", re.M)
GOT_IN = re.compile(r"^(?:rtt (\d+): )?connected (\d+) of (\d+)\b", re.M)  # what storm prints
PORTS = 700  # of an attacking host: more than the handshakes that a server has under way at once
CCS, RECORD_HEADER = 20, 13
COOKIE_LENGTH_AT = 13 + 12 + 2 + 32 + 1  # in a ClientHello's datagram without a session id


def say(text):
    print(f"# hostile: {text}", flush=True)


# ---- programs --------------------------------------------------------------------------------------------------------


class Fast:
    """The optimized programs, built once for all tests."""

    lock = threading.Lock()
    folder = None

    @classmethod
    def program(cls, name):
        with cls.lock:
            if not cls.folder:
                cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="dtls-hostile-bin-"))
                FOLDERS.add(str(cls.folder))
                for name_, words in (("dtls", ["-DDTLS_MAIN", "dtls.c", "-pthread", *flags("openssl", "-lssl", "-lcrypto"),
                                               *flags("libedit", "-ledit")]),
                                     ("crowd", ["tests/crowd.c", "dtls.c", "-pthread", *flags("openssl", "-lssl", "-lcrypto")]),
                                     ("storm", ["tests/storm.c", *flags("openssl", "-lssl", "-lcrypto")])):
                    subprocess.run([*CC, "-O2", "-I.", "-o", cls.folder / name_, *words],
                                   cwd=ROOT, check=True)
            return str(cls.folder / name)


def flags(package, *otherwise):
    found = subprocess.run(["pkg-config", "--cflags", "--libs", package], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL) if shutil.which("pkg-config") else None
    return found.stdout.decode().split() if found and found.returncode == 0 else otherwise


def fast_server(t, *options):
    return t.server(*options, program=Fast.program("dtls"))


# What anybody can send who knows the addresses, by kind: (chance, the real datagram that follows) -> the forged one.
# Whole plaintext handshake messages are not among it: in DTLS 1.2 nobody can tell those from the peer's.
FORGERIES = {
    "short": lambda r, real: record(r.choice((ALERT, DATA)), 1, ahead(r), r.randbytes(r.randrange(1, 24))),
    "sealed": lambda r, real: record(DATA, 1, ahead(r), r.randbytes(r.randrange(24, 124))),
    "fatal": lambda r, real: record(ALERT, 0, r.randrange(100), b"\x02\x28"),  # handshake_failure
    "closing": lambda r, real: record(ALERT, 0, r.randrange(100), b"\x01\x00"),  # close_notify
    "warning": lambda r, real: record(ALERT, 0, r.randrange(100), b"\x01\x5a"),  # libssl takes four in a row
    "plain": lambda r, real: record(DATA, 0, r.randrange(100), r.randbytes(r.randrange(1, 101))),
    "ahead": lambda r, real: record(HANDSHAKE, 0, ahead(r), r.randbytes(r.randrange(1, 201))),  # no header that holds
    "epoch": lambda r, real: record(DATA, r.randrange(2, 5), r.randrange(100), r.randbytes(40)),
    "early": lambda r, real: record(CCS, 0, r.choice((ahead(r), r.randrange(50))), b"\x01"),
    "garbage": lambda r, real: record(r.randrange(256), r.randrange(65536), ahead(r), r.randbytes(100))[
        :r.randrange(1, RECORD_HEADER + 100)],
    "falsified": lambda r, real: falsified(r, bytearray(real)),
}


def ahead(chance):
    """A sequence number that no real record comes near."""
    return chance.randrange(1 << 16) << 24


def falsified(chance, data):
    """The real one made false; a plaintext handshake message only gets a number far ahead."""
    if len(data) <= RECORD_HEADER:
        return bytes(data)
    if chance.random() < 0.5:
        return bytes(data[:chance.randrange(RECORD_HEADER, len(data))])  # cut short
    if data[4]:  # its epoch: it is protected
        data[chance.randrange(RECORD_HEADER, len(data))] ^= chance.randrange(1, 256)
    data[chance.randrange(5, 8)] ^= chance.randrange(1, 256)
    return bytes(data)


def forge(chance, real, kinds):
    kind = chance.choice(list(FORGERIES))
    kinds[kind] += 1
    return FORGERIES[kind](chance, real)


def happened(did, wanted):
    """Everything wanted of a network must have happened, or the test tried nothing."""
    idle = [what for what in wanted if did[what] == 0]
    check(not idle, f"the network did nothing of this: {' '.join(idle)}")


def crowd(t, where, clients, *more):
    return Proc(t, t.title("crowd"), [Fast.program("crowd"), where.addr, CERTS, clients, *more])


def connected(crowd, timeout=DEADLINE_S + 5):
    """How many got in, and the median and the largest of their handshakes' seconds."""
    found = crowd.out.wait(CONNECTED.pattern, timeout=timeout)
    return int(found[1]), float(found[2] or 0), float(found[3] or 0)


def alive(crowd, timeout):
    """How many are alive, answered and sent pings, and the median and the largest of the answers' milliseconds."""
    found = crowd.out.wait(ALIVE.pattern, timeout=timeout)
    return int(found[1]), int(found[2]), int(found[3]), float(found[4] or 0), float(found[5] or 0)


def storm(t, *words, sockets=0):
    """What that says of a fresh server, whose default limits are part of what is tried."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < sockets + 100:
        raise Skip(f"{sockets} sockets are more than this system lets a process have")
    server = fast_server(t)
    program = Proc(t, t.title("storm"), [Fast.program("storm"), server.addr, CERTS, *words], stdin=subprocess.DEVNULL)
    program.exits(0, 3 * DEADLINE_S)
    server.stop()
    say(f"storm {' '.join(map(str, words))}: " + "; ".join(program.out.lines()))
    return program.out.text


def left_out(t, *words, sockets=0):
    """Of the honest clients of a storm, a line for each kind that did not all get in."""
    found = GOT_IN.findall(storm(t, *words, sockets=sockets))
    check(found, "the storm had no clients")
    return [f"{' '.join(map(str, words))}: {got} of {clients}" + (f" with a round trip of {rtt} ms" if rtt else "")
            for rtt, got, clients in found if got != clients]


def rss_kb(proc):
    text = pathlib.Path(f"/proc/{proc.process.pid}/status").read_text()
    return int(re.search(r"^VmRSS:\s+(\d+)", text, re.M)[1])


def logged(server, what):
    """How many lines of strangers' doing: those that are in the log, and those that it sums up."""
    sums = re.findall(rf"^\S+ and (\d+) more in [\d.]+ s: {what}", server.err.text, re.M)
    return len(re.findall(rf"^\S+ {what}", server.err.text, re.M)) + sum(map(int, sums))


def counters(server):
    """Ends a server that was started with -v and returns what it counted."""
    server.stop()
    text = server.err.text
    found = {name: int(n) for n, name in re.findall(r"(\d+) ([a-z]+)", text[text.rindex("datagrams:"):])}
    found["cookies"] = int(re.search(r"cookies sent: (\d+)", text)[1])
    return found


def took(function, *arguments):
    began = time.monotonic()
    function(*arguments)
    return time.monotonic() - began


def connects_in(t, server):
    """Seconds until a real client is in and has left. It sends nothing: beside a flood the kernel may lose a message."""
    return took(lambda: t.client(server, stdin=b"").exits(0).connected())


# ---- floods ----------------------------------------------------------------------------------------------------------


class Flood(threading.Thread):
    """Sends datagrams to a server from many addresses, and counts what comes back."""

    def __init__(self, server, make, count):
        super().__init__(daemon=True)
        self.target, self.make, self.count = split_addr(server.addr), make, count
        self.sent = self.sent_bytes = self.received = self.received_bytes = self.largest = 0
        self.sockets = []
        for i in range(SOURCES):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((f"127.{i % 5 + 1}.{i // 5 + 1}.1", 0))
            sock.setblocking(False)
            self.sockets.append(sock)
        self.start()

    def run(self):
        while self.sent < self.count:
            for sock in self.sockets:
                data = self.make(self.sent)
                try:
                    sock.sendto(data, self.target)
                except OSError:
                    continue
                self.sent += 1
                self.sent_bytes += len(data)
            self.receive()
        self.receive()

    def receive(self):
        for sock in self.sockets:
            try:
                while True:
                    data = sock.recv(65535)
                    self.received += 1
                    self.received_bytes += len(data)
                    self.largest = max(self.largest, len(data))
            except OSError:
                pass

    def close(self):
        self.join()
        for sock in self.sockets:
            sock.close()


def while_flooded(t, server, make, count):
    """A flood of that many datagrams, with real clients all along, who must get in while the server must not grow."""
    patience = CONNECT_S + 20 * connects_in(t, server)  # a busy machine takes longer for both
    before = rss_kb(server)
    flood = Flood(server, make, count)
    times = []
    while flood.is_alive():
        times.append(connects_in(t, server))
    flood.close()
    growth, slowest = rss_kb(server) - before, max(times, default=0.0)
    say(f"{t.name}: {flood.sent} sent, {flood.received} answers, {flood.received_bytes / flood.sent_bytes:.2f} bytes "
        f"for each, server {growth:+} KB; meanwhile {len(times)} real clients were through within {slowest:.2f} s")
    check(slowest < patience, f"a real client took {slowest:.1f} s, more than {patience:.1f}")
    check(growth < GROWTH_KB + SESSION_KB * len(times), f"the server grew by {growth} KB")
    return flood


def client_hellos(t, server):
    """A real client's ClientHello without a cookie and with one, which is good for that client's address alone."""
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    first, second = [datagram.data for datagram in relay.handshake(to_server=True)][:2]
    client.ends()
    check(first[COOKIE_LENGTH_AT] == 0 and second[COOKIE_LENGTH_AT] > 0, "these are not the two ClientHellos")
    return first, second


def of_another(hello, number):
    """The same ClientHello with another client's random."""
    return hello[:27] + number.to_bytes(8, "big") + hello[35:]


@test(alone=True)
def flood_of_client_hellos(t):
    server = fast_server(t, "-v")
    hello, _ = client_hellos(t, server)
    flood = while_flooded(t, server, lambda n: of_another(hello, n), HELLOS)
    check(0 < flood.received <= flood.sent and flood.largest <= len(hello), "answers are more or larger than questions")
    counted = counters(server)
    check(counted["cookies"] >= flood.received, f"{counted['cookies']} cookies for {flood.received} answers")
    equal(counted["failed"], 0, "handshakes that failed")


@test(alone=True)
def flood_with_a_stolen_cookie(t):
    server = fast_server(t, "-v")
    _, hello = client_hellos(t, server)
    flood = while_flooded(t, server, lambda n: of_another(hello, n), HELLOS // 4)
    check(flood.received > 0 and flood.largest < len(hello), "answers are larger than questions")
    equal(counters(server)["failed"], 0, "handshakes that were begun with a cookie of another address")


@test(alone=True)
def flood_of_garbage(t):
    chance = random.Random(1)
    server = fast_server(t, "-v")
    hello, second = client_hellos(t, server)

    def garbage(number):
        kind = number % 3
        if kind == 0:
            return chance.randbytes(chance.randrange(1, 1400))
        if kind == 1:
            return of_another(hello, number)[:chance.randrange(1, len(hello))]
        return record(chance.randrange(18, 26), chance.randrange(3), chance.getrandbits(48), chance.randbytes(50))

    flood = while_flooded(t, server, garbage, HELLOS // 4)
    equal(flood.received, 0, "answers to garbage")
    equal(counters(server)["failed"], 0, "handshakes begun with garbage")


# ---- many at once ----------------------------------------------------------------------------------------------------


@test(alone=True)
def storm_of_honest_clients(t):
    """Clients with libssl's own timers, after a restart say: all get in, also when they are more than handshakes under
    way at once, and from one address."""
    out = []
    for clients, *more in ((500,), (2000,), (2000, "apart=1")) if ALL else ((300,),):
        out += left_out(t, "storm", clients, DEADLINE_S, *more, sockets=clients)
    check(not out, "not all got in: " + "; ".join(out))


@test(alone=True)
def honest_clients_beside_floods(t):
    """Attackers who have addresses, and prove them; and those who have none. The far away need the most patience."""
    ports, out = f"ports={PORTS}", []
    out += left_out(t, "attack", 1, DEADLINE_S, ports, *(() if ALL else ("rtt=600",)), sockets=PORTS)
    if ALL:
        out += left_out(t, "attack", 10, DEADLINE_S, ports, sockets=10 * PORTS)
        out += left_out(t, "forged", 10000, DEADLINE_S, sockets=2000)
    check(not out, "not all got in: " + "; ".join(out))


@test(alone=True)
def echo_beside_handshakes(t):
    """Figures only: how long an answer waits for others' handshakes depends on the machine."""
    for clients, seconds in ((128, 5), (400, 5)) if ALL else ((128, 2),):
        text = storm(t, "echo", clients, seconds, sockets=clients)
        for what in ("alone", "beside", "handshakes"):
            check(re.search(f"^{what} [1-9]", text, re.M), f"nothing of this: {what}")


# ---- in the name of live peers ---------------------------------------------------------------------------------------


@test(slow=True)
def replays_on_a_live_connection(t):
    server = t.server()
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    for n in range(20):
        client.ask(f"echo {n}", str(n))
    recorded = list(relay.log)
    for _ in range(3):
        for datagram in recorded:
            relay.forge(datagram.to_server, datagram.data)
        client.ask("ping", "pong")
    equal(client.out.text.count("pong"), 3, "answers to three pings")
    equal([client.out.lines().count(str(n)) for n in range(20)], [1] * 20, "how often each echo came")
    stats = rf"^127\S+ client, \d+ s, in {20 + 3 + 1} messages "
    client.send("stats")
    client.out.wait(stats)
    equal(server.err.count("closed:"), 0, "connections closed")
    client.ends()


@test
def garbage_in_a_live_peers_name(t):
    chance = random.Random(2)
    server = t.server()
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    client.ask("ping", "pong")
    real = [datagram for datagram in relay.log if datagram.data]
    for n in range(3000):
        datagram = chance.choice(real)
        data = bytearray(datagram.data)
        if n % 2:
            del data[chance.randrange(len(data)):]
        for _ in range(chance.randrange(1, 4) if data else 0):
            data[chance.randrange(len(data))] = chance.randrange(256)
        relay.forge(datagram.to_server, bytes(data))
        if n % 100 == 0:
            client.ask("ping", "pong")
    client.ask("stats", "users: 1")
    equal(server.err.count("closed:"), 0, "connections closed")
    client.ends()


@test(alone=True)
def handshakes_and_connections_among_forgeries(t):
    for seed in SEEDS:
        server = fast_server(t, "--idle-timeout", "5")
        network = t.relay(server, seed=seed, forging=0.3, forger=forge)
        before = rss_kb(server)
        clients = crowd(t, network, 60, 2)
        in_, median, slowest = connected(clients)
        check(in_ == 60, f"{in_} of 60 handshakes among 30 % forged datagrams, seed {seed}")
        living, *_ = alive(clients, 20)
        clients.exits(0 if living == 60 else 1)
        equal(living, 60, f"connections alive after 2 s of 30 % forged, seed {seed}")
        growth = rss_kb(server) - before
        check(growth < 60 * 100 + GROWTH_KB, f"the server grew by {growth} KB, seed {seed}")
        happened(network.forged, FORGERIES)
        forged = sum(network.forged.values())

        network = t.relay(server, seed=seed, forging=0.02, forger=forge)
        clients = crowd(t, network, 20, 10)
        connected(clients)
        living, answered, sent, *_ = alive(clients, 30)
        say(f"seed {seed}: {in_} of 60 handshakes among {forged} forged datagrams (30 %), median {median:.2f} s, "
            f"slowest {slowest:.2f} s; {living} of 20 connections alive after 10 s of 2 %, {answered} of {sent} pings "
            f"answered")
        clients.exits(0 if living == 20 else 1)
        equal(living, 20, f"connections alive after 10 s of 2 % forged, seed {seed}")
        server.stop()


# ---- peers that stop, do not read, or do not stop --------------------------------------------------------------------


@test(slow=True)
def peers_that_stop_in_each_state(t):
    """Small datagrams make many states: after how many of them one side falls silent. All at once: one deadline."""
    server = t.server("--mtu", "256", "--idle-timeout", "5")
    patience = CONNECT_S + 20 * connects_in(t, server)
    stopped = {}
    for side in (True, False):
        for passed in range(1, 12):
            relay = t.relay(server)
            relay.quota[side] = passed
            stopped[side, passed] = relay, t.client(relay, "--mtu", "256")
    for _ in range(3):
        seconds = connects_in(t, server)
        check(seconds < patience, f"a client took {seconds:.1f} s to get in beside them, more than {patience:.1f}")
    for (side, passed), (relay, client) in stopped.items():
        status = client.reap(DEADLINE_S + 20)
        client.expected = status
        check(status == 1 and re.search("timed out|failed|closed", client.err.text),
              f"a client, {'its' if side else 'the server'} datagrams lost after {passed}: status {status}")
    t.client(server, stdin=b"stats\n").exits(0).out.wait_line("users: 1")
    wait_until(lambda: logged(server, "(?:handshake failed|closed):") >= len(stopped) // 2, "the end of each in the log")
    failed = logged(server, "handshake failed: timed out after 30")
    say(f"peers that stop: {len(stopped)} in one state each, {failed} handshakes ended by the server's deadline")
    check(failed > 5, "the server's deadline was hardly needed: the test proves nothing")


@test(alone=True)
def broadcasts_to_peers_that_do_not_read(t):
    server = fast_server(t)
    sleepers = [t.client(server) for _ in range(10)]
    for client in sleepers:
        client.connected()
        client.send_signal(signal.SIGSTOP)
    reader, writer = t.client(server), t.client(server)
    for client in (reader, writer):
        client.ask("ping", "pong")
    before, slowest, patience = rss_kb(server), 0.0, ECHO_S + 20 * took(reader.ask, "echo quiet", "quiet")
    for n in range(40 if ALL else 15):
        text = f"{n} " + "x" * (MESSAGE_MAX - 10)
        writer.send(f"bc {text}")
        writer.out.wait_line(text)
        slowest = max(slowest, took(reader.ask, f"echo {n}", str(n)))
    growth = rss_kb(server) - before
    say(f"broadcasts of 16 KB beside 10 clients that do not read: server {growth:+} KB, an echo within {slowest:.2f} s")
    check(slowest < patience, f"an echo took {slowest:.1f} s, more than {patience:.1f}")
    check(growth < 1024 + GROWTH_KB, f"the server grew by {growth} KB")
    for client in sleepers:
        client.send_signal(signal.SIGCONT)
        client.ask("echo awake", "awake")


@test(alone=True)
def flood_of_valid_messages(t):
    """The kernel's socket buffer is everybody's: what does not fit is lost, whoever sent it. Nobody waits, though."""
    server = fast_server(t)
    quiet = crowd(t, server, 5, 3)
    _, answered_quiet, sent_quiet, median_quiet, slowest_quiet = alive(quiet, 20)
    flooder = crowd(t, server, 1, 8, "flood")
    connected(flooder)
    beside = crowd(t, server, 5, 3)
    living, answered, sent, median, slowest = alive(beside, 20)
    say(f"a client floods: beside it {answered} of {sent} pings answered, median {median:.2f} ms against "
        f"{median_quiet:.2f} ms in quiet ({answered_quiet} of {sent_quiet}), slowest {slowest:.0f} ms")
    check(sent > 0 and answered >= 0.3 * sent, f"{answered} of {sent} pings answered beside a flood")
    patience = 1000 * ECHO_S + 20 * slowest_quiet
    check(slowest < patience, f"an answer took {slowest:.0f} ms beside a flood, more than {patience:.0f}")
    equal(living, 5, "clients alive beside a flood")
    for one in (quiet, beside, flooder):
        one.exits(0)


# ---- loss ------------------------------------------------------------------------------------------------------------


def crowd_through(t, loss, seed):
    # A server that is through counts its client's repeated Finished as silence: it must last for several of those.
    server = fast_server(t, "--idle-timeout", "8")
    network = t.relay(server, seed=seed, loss=loss / 100, twice=0.1, straying=0.2, damage=0.02)
    clients = crowd(t, network, 60)
    in_, median, slowest = connected(clients)
    say(f"loss {loss} % each way, seed {seed}: {in_} of 60 handshakes, median {median:.2f} s, slowest {slowest:.2f} s")
    clients.exits(0 if in_ == 60 else 1)
    happened(network.did, ("lost", "doubled", "late", "damaged"))

    def left():
        return int(re.search(r"users: (\d+)", t.client(server, stdin=b"stats\n").exits(0).out.text)[1])

    wait_until(lambda: left() == 1, "end of the clients that are gone")
    server.stop()
    return in_, median


@test(alone=True)
def loss_of_10_percent(t):
    in_, _ = crowd_through(t, 10, 1)
    equal(in_, 60, "handshakes within 30 s")


@test(alone=True)
def loss_of_30_percent(t):
    for seed in SEEDS:
        quiet, patience = crowd(t, fast_server(t), 60), MEDIAN_S
        patience += 10 * connected(quiet)[1]
        quiet.exits(0)
        in_, median = crowd_through(t, 30, seed)
        equal(in_, 60, f"handshakes within 30 s, seed {seed}")
        check(median < patience, f"the median handshake took {median:.2f} s, more than {patience:.2f}, seed {seed}")


if __name__ == "__main__":
    sys.exit(main())
