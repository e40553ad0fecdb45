#!/usr/bin/env python3
"""Handshakes with foreign servers through networks that lose datagrams: our client, and beside it a patient one, which
does what libssl does by itself (tests/peers/patient.c). Ours may not fare worse. harness.py says how it runs; with
--all at length.

Each handshake has a relay of its own, and a server of its own where that serves one client at a time. Both clients take
turns, with the same seeds. A handshake's time is that from its first datagram to the line "connected": what a program
under sanitizers takes to start is no matter of the network. At the end a table, for the README.
"""

import collections
import contextlib
import math
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (CERTS, CONNECTED, Case, Failure, Relay, SANITIZER, TESTS, WAIT, can_bind, check, free_port, main,
                     test, wait_until)  # noqa: E402
import harness  # noqa: E402
import peers  # noqa: E402

TESTS.clear()  # those of peers.py

ALL = "--all" in sys.argv
LOSSES = (0, 10, 20, 30) if ALL else (0, 30)  # percent, each way
HANDSHAKES = 64 if ALL else 6  # of each client, with each server and loss
TOGETHER = 16  # in one test
STARTS = threading.BoundedSemaphore(2)  # programs that start at a time, in all tests
DEADLINE_S = 30.0
NOISE_S = 0.3  # by which ours may take longer
HEAVY_LOSS = 20  # percent; from here on the slowest tenth counts too
SPARE = 0 if ALL else 2  # handshakes that ours may lose besides: six of each say little

OURS, PATIENT = "ours", "patient"


# ---- servers ---------------------------------------------------------------------------------------------------------


class Patient(peers.Compiled):
    name = "patient"
    header = "openssl/ssl.h"
    libraries = "-lssl", "-lcrypto"
    connected = "^connected: server, "


class Slow(Patient):
    """Keeps what it has for an address, and ignores who begins anew there. tests/peers/slow.c"""

    name = "slow"
    many = True


class Listening(peers.OpenSSL):
    """s_server -listen: once it has a client that returned its cookie, its socket is connected to that."""

    name = "s_server -listen"


class OpenSSL(peers.OpenSSL):
    """Without -listen its socket answers whoever spoke last."""

    name = "s_server"

    def server_argv(self, port, certs):
        return [word for word in super().server_argv(port, certs) if word != "-listen"]


class GnuTLS(peers.GnuTLS):
    large = ()  # the MTU that it has by itself


class LibCoAP(peers.Installed):
    """Serves many clients by their addresses, and ignores who begins anew there. It says nothing when it is ready. Its
    DTLS port is the one behind that of -p."""

    many = True

    def __init__(self, library):
        self.name = f"libcoap {library}"
        self.commands = f"coap-server-{library}",

    def server_argv(self, port, certs):
        return [*self.commands, "-A", "127.0.0.1", "-p", str(port - 1), "-c", f"{certs}/server.pem",
                "-j", f"{certs}/server.key", "-C", f"{certs}/ca.pem"]

    def server(self, t, *more, certs=CERTS):
        port = free_port()
        while not can_bind("127.0.0.1", port - 1):
            port = free_port()
        server = peers.Foreign(t, f"{self.name} server", [*self.server_argv(port, certs), *more])
        server.addr = f"127.0.0.1:{port}"
        wait_until(lambda: not server.running() or not can_bind("127.0.0.1", port), f"{self.name} server")
        check(server.running(), f"{self.name} server does not run")
        return server


PATIENT_PEER = Patient()
SERVERS = (LibCoAP("openssl"), LibCoAP("gnutls"), Slow(), OpenSSL(), Listening(), GnuTLS(), peers.WolfSSL(),
           peers.MbedTLS())


def serve(case, peer):
    """A server; another program may have been faster to take its port."""
    for attempt in range(5):
        try:
            return peer.server(case)
        except Failure:
            if attempt == 4 or not case.procs or "in use" not in case.procs[-1].transcript().lower():
                raise


# ---- one handshake ---------------------------------------------------------------------------------------------------


class Network(Relay):
    """Says when the first datagram came. Takes no port twice: some servers ignore who begins anew at an address."""

    ports = set()

    def __init__(self, *arguments, **more):
        self.began = threading.Event()
        super().__init__(*arguments, **more)

    @classmethod
    def make_socket(cls, host="127.0.0.1"):
        while True:
            sock = Relay.make_socket(host)
            port = sock.getsockname()[1]
            if port not in cls.ports:
                cls.ports.add(port)
                return sock
            sock.close()

    def pass_on(self, datagram, *more):
        super().pass_on(datagram, *more)
        self.began.set()


@contextlib.contextmanager
def sub_case(t):
    """What one handshake owns: it is gone when that is over."""
    case = Case(t.name)
    try:
        yield case
    except Failure as failure:
        raise Failure("; ".join([str(failure), *case.details()])) from None
    finally:
        case.destroy()


def start(case, who, network):
    """The client, and what it says when it is connected, and where."""
    if who == OURS:
        client = peers.our_client(case, network)
        return client, client.err, CONNECTED
    client = PATIENT_PEER.client(case, network)
    return client, client.out, PATIENT_PEER.connected


def handshake(t, peer, who, shared, loss, seed):
    """Seconds, or None where it failed; and how many datagrams were lost."""
    with sub_case(t) as case:
        with STARTS:
            server = shared or serve(case, peer)
            network = Network(case, server.addr, seed=seed, loss=loss / 100)
            client, output, connected = start(case, who, network)
            check(network.began.wait(WAIT), f"{who}: no datagram of it came")
        try:
            began = network.log[0].when
            output.wait(connected, timeout=began + DEADLINE_S - time.monotonic())
            seconds = time.monotonic() - began
        except Failure:
            seconds = None
        network.loss = 0
        if who == OURS and seconds is not None:
            client.ends()
        check(who != OURS or not SANITIZER.search(client.transcript()), "a sanitizer spoke")
        return seconds, network.did["lost"]


# ---- one cell of the table -------------------------------------------------------------------------------------------


class Cell(collections.namedtuple("Cell", "failed median tenth slowest")):
    """A failed handshake counts as one that took all the time there was."""

    @classmethod
    def of(cls, results):
        times = sorted(DEADLINE_S if seconds is None else seconds for seconds in results)
        return cls(results.count(None), statistics.median(times), times[-(-len(times) * 9 // 10) - 1], times[-1])


Row = collections.namedtuple("Row", "peer loss ours patient")
ROWS = []


def text_of(seconds):
    return f"{seconds:.2f}" if seconds < DEADLINE_S else f"{DEADLINE_S:g}+"


def measure(t, peer, loss):
    shared = serve(t, peer) if getattr(peer, "many", False) else None
    turns = [(who, loss * 1000 + number) for number in range(HANDSHAKES) for who in (OURS, PATIENT)]
    results, lost = {OURS: [], PATIENT: []}, 0
    with ThreadPoolExecutor(TOGETHER) as pool:
        done = [(who, pool.submit(handshake, t, peer, who, shared, loss, seed)) for who, seed in turns]
    for who, future in done:
        seconds, gone = future.result()
        results[who].append(seconds)
        lost += gone
    check(bool(lost) == bool(loss), f"{lost} datagrams were lost where {loss} % should be")
    if shared:
        check(shared.running(), f"{shared.title} ended")
    row = Row(peer, loss, Cell.of(results[OURS]), Cell.of(results[PATIENT]))
    ROWS.append(row)
    return row


def chance(failed):
    """By how much two equal clients differ, of which one failed so often: a standard deviation. None is none."""
    return math.isqrt(2 * failed * (HANDSHAKES - failed) // HANDSHAKES)


def worse(row):
    """In what our client is worse. What few handshakes take through loss is chance."""
    ours, patient = row.ours, row.patient
    if ours.failed > patient.failed + chance(patient.failed) + SPARE:
        yield f"loss {row.loss} %: {ours.failed} failed, of the patient client {patient.failed}"
    compared = []
    if ALL or not row.loss:
        compared.append(("median", ours.median, patient.median))
    if ALL and row.loss >= HEAVY_LOSS:
        compared.append(("slowest tenth", ours.tenth, patient.tenth))
    for what, mine, other in compared:
        if mine > other + NOISE_S:
            yield f"loss {row.loss} %: {what} {text_of(mine)} s, of the patient client {text_of(other)} s"


def through_loss(t, peer):
    PATIENT_PEER.need()
    peer.need()
    found = [text for loss in LOSSES for text in worse(measure(t, peer, loss))]
    check(not found, "; ".join(found))


def register():
    for peer in SERVERS:
        def one(t, peer=peer):
            through_loss(t, peer)
        one.__name__ = peer.name
        test(one)


def print_table():
    """Each figure: ours / the patient client's."""
    print(f"\n{HANDSHAKES} handshakes of each client; ours / the patient client's\n")
    print("| server | loss each way | failed | median, s | slowest tenth, s | slowest, s |")
    print("|---|---|---|---|---|---|")
    for row in sorted(ROWS, key=lambda row: (SERVERS.index(row.peer), row.loss)):
        figures = [f"{row.ours.failed} / {row.patient.failed}",
                   *(f"{text_of(mine)} / {text_of(other)}" for mine, other in zip(row.ours[1:], row.patient[1:]))]
        print(f"| {row.peer.name} | {row.loss} % | {' | '.join(figures)} |")
    print(flush=True)


if __name__ == "__main__":
    register()
    harness.JOBS = len(SERVERS)  # they wait, most of the time
    status = main()
    if ROWS:
        print_table()
    sys.exit(status)
