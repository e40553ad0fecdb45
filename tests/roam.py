#!/usr/bin/env python3
"""Clients whose address changes, behind a NAT or by themselves, and thieves who would like to move them; real sockets.
harness.py tells how it runs, and its class Nat what a NAT and a thief can do.

The kinds of client differ in how the server finds their connection: by its connection ID, by what the nonces of AES-GCM
give away, or by trying keys. OpenSSL's and GnuTLS's own clients know nothing of all this.
"""

import collections
import re
import signal
import shutil
import sys
import time

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (BIN, CERTS, CONNECTED, Host, PROGRAM, PROMPT, Proc, Skip, WAIT, check, client_identity, equal,
                     main, need_ipv6, need_second_loopback, split_addr, test, wait_until)  # noqa: E402

KEY = "a:" + "5a" * 32
SECOND_HOST = "127.0.0.2"
LOSS = 0.2
LINES = 200  # in a network with loss, at most, until one is answered
BROADCASTS = 10
TIMES = 3  # as many bytes as came from there go to an address that has proved nothing

# The suite (or a part of its name), the server's options, how the client is started.
Kind = collections.namedtuple("Kind", "name cipher options start")


def ours(*options):
    return lambda t, where, *more: t.client(where, *options, *more)


def s_client(suite):
    return lambda t, where: t.s_client(where, "-cipher", suite, identity=client_identity())


def gnutls_cli(t, where):
    if not shutil.which("gnutls-cli"):
        raise Skip("no gnutls-cli")
    host, port = split_addr(where.addr)
    pem, key = client_identity()
    client = Proc(t, t.title("gnutls-cli"), ["gnutls-cli", "--udp", "--mtu", "17000", "--port", port, "--x509cafile",
                                            f"{CERTS}/ca.pem", "--x509certfile", pem, "--x509keyfile", key, host])
    client.ours = False
    return client


GCM, CHACHA = "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"
PSK_CHACHA = "ECDHE-PSK-CHACHA20-POLY1305"
CID = Kind("cid", "GCM", (), ours())
CID_BOTH_WAYS = Kind("cid both ways", "GCM", (), ours("--cid", "4"))
CID_CHACHA = Kind("cid and chacha", PSK_CHACHA, (), ours("--psk", KEY))
NEVER = Kind("gcm", "GCM", (), ours("--cid", "never"))
SERVER_NEVER = Kind("gcm, server without cid", "GCM", ("--cid", "never"), ours())
BLIND = Kind("chacha", PSK_CHACHA, (), ours("--cid", "never", "--psk", KEY))
S_CLIENT = Kind("s_client gcm", GCM, (), s_client(GCM))
S_CLIENT_BLIND = Kind("s_client chacha", CHACHA, (), s_client(CHACHA))
GNUTLS = Kind("gnutls", "", (), gnutls_cli)
EVERY = CID, CID_BOTH_WAYS, CID_CHACHA, NEVER, SERVER_NEVER, BLIND, S_CLIENT, S_CLIENT_BLIND, GNUTLS
OURS = CID, CID_BOTH_WAYS, CID_CHACHA, NEVER, SERVER_NEVER, BLIND


def say(text):
    print(f"# {PROGRAM}: {text}", flush=True)


def with_each(*kinds, **how):
    """One test for each of them."""
    def register(function):
        for kind in kinds:
            def one(t, kind=kind):
                function(t, kind)
            one.__name__ = f"{function.__name__}_{kind.name}"
            test(one, **how)
        return function
    return register


class Scene:
    """A server, a NAT in front of it with clients of these kinds, and one client beside it that looks at "stats"."""

    def __init__(self, t, *kinds, silent=False):
        self.t, self.kinds = t, kinds
        self.server = t.server("--psk", KEY, *(word for kind in kinds[:1] for word in kind.options))
        self.nat = t.nat(self.server)
        self.clients = []
        for kind in kinds:
            client = kind.start(t, self.nat)
            self.clients.append(client)
            seen = self.server.connected(nth=len(self.clients))
            check(kind.cipher in seen["cipher"], f"cipher {seen['cipher']}")
            equal(seen["addr"], self.nat.own_addr(len(self.clients) - 1), "address in the server's log")
            if not silent:
                ask(client, f"echo first {kind.name}", f"first {kind.name}")
        self.watcher = t.client(self.server)
        self.watcher_addr = self.server.connected(nth=len(self.clients) + 1)["addr"]
        self.client = self.clients[0] if self.clients else None

    def moved(self, new, old, nth=1):
        self.server.err.wait_line(f"{new} moved from {old}", nth)

    def moves(self):
        return self.server.err.count(" moved from ")

    def stats(self):
        """The clients' lines by their addresses. An answer of its own behind it shows that all have come."""
        before = len(self.watcher.out.text)
        self.watcher.send("stats")
        self.watcher.send(f"echo end of {before}")
        self.watcher.out.wait_line(f"end of {before}")
        self.watcher.out.wait(r"^users: \d+$")
        lines = self.watcher.out.text[before:].splitlines()
        return {line.split()[0]: line for line in lines if re.match(r"\S+:\d+ ", line)}

    def in_stats(self, addr, pattern):
        """Waits for that client's line to match; a walk through all clients takes a turn more than an echo."""
        wait_until(lambda: re.search(pattern, self.stats().get(addr, "")), f"{pattern!r} in stats of {addr}")

    def of_client(self):
        """Its line in stats, wherever it is now; there must be one client."""
        def look():
            return [line for addr, line in self.stats().items() if addr != self.watcher_addr]
        wait_until(lambda: len(look()) == 1, "line of one client in stats")
        return look()[0]

    def messages_in(self):
        return int(re.search(r" in (\d+) messages ", self.of_client())[1])

    def times_moved(self):
        found = re.search(", moved (once|\\d+ times)$", self.of_client())
        return 0 if not found else 1 if found[1] == "once" else int(found[1].split()[0])

    def same_connections(self):
        """Nobody was lost, and nobody needed another handshake."""
        equal(self.server.err.count("connected:"), len(self.clients) + 1, "connections that were ever made")
        equal(self.server.err.count("closed:"), 0, "connections closed")


def ask(client, line, answer):
    """Sends a line and waits for one more of this answer, which may stand among what a foreign program says."""
    before = client.out.text.count(answer)
    client.send(line)
    client.out.until(lambda: client.out.text.count(answer) > before, f"answer {answer!r}")


def times(n):
    return "moved once" if n == 1 else f"moved {n} times"


# ---- other addresses -------------------------------------------------------------------------------------------------


@with_each(*EVERY)
def other_port(t, kind):
    s = Scene(t, kind)
    old = s.nat.own_addr()
    for n in (1, 2, 3):
        new = s.nat.rebind(0)
        ask(s.client, f"echo after move {n}", f"after move {n}")
        s.moved(new, old)
        ask(s.client, "whoami", new)
        s.in_stats(new, rf", {times(n)}$")
        old = new
    check(all("moved" not in line for addr, line in s.stats().items() if addr != new), "somebody else has moved, too")
    equal(s.moves(), 3, "moves in the log")
    s.same_connections()


@with_each(CID, NEVER, BLIND, S_CLIENT)
def other_port_while_the_old_one_is_closed(t, kind):
    """Then the server's host hears from the old port by ICMP that nobody is there."""
    s = Scene(t, kind)
    for n in range(3):
        old = s.nat.own_addr()
        new = s.nat.rebind(0, old="closed")
        s.watcher.send("bc to the old port")
        ask(s.client, f"echo {n}", str(n))
        s.moved(new, old)
    ask(s.client, "echo still here", "still here")
    ask(s.watcher, "bc to the new one", "to the new one")
    s.client.out.wait("to the new one", partial=True)
    s.same_connections()


@with_each(CID, CID_CHACHA, NEVER, S_CLIENT)
def other_ip(t, kind):
    need_second_loopback()
    s = Scene(t, kind)
    for n, host in enumerate((SECOND_HOST, "127.0.0.1", SECOND_HOST), 1):
        old = s.nat.own_addr()
        new = s.nat.rebind(0, host=host)
        equal(split_addr(new)[0], host, "host of the new address")
        ask(s.client, f"echo from {host}", f"from {host}")
        s.moved(new, old)
        ask(s.client, "whoami", new)
        s.in_stats(new, rf", {times(n)}$")
    s.same_connections()


@with_each(CID, NEVER, S_CLIENT)
def other_ip_before_the_first_line(t, kind):
    need_second_loopback()
    s = Scene(t, kind, silent=True)
    old, new = s.nat.own_addr(), s.nat.rebind(0, host=SECOND_HOST)
    ask(s.client, "echo my first words", "my first words")
    s.moved(new, old)
    s.same_connections()


@with_each(BLIND, S_CLIENT_BLIND, GNUTLS)
def other_ip_without_anything_to_know_it_by(t, kind):
    """Keys are tried only of connections from the same IP. Nothing is lost by it: back there, it goes on."""
    need_second_loopback()
    s = Scene(t, kind)
    other = s.nat.rebind(0, host=SECOND_HOST)
    s.client.send("echo from nowhere")
    wait_until(lambda: s.nat.sent[other] > 0, "datagram from the other IP")
    ask(s.watcher, "echo fence", "fence")
    equal(s.moves(), 0, "moves to another IP")
    equal(s.nat.received[other], 0, "bytes sent to the other IP")
    s.nat.go_back()
    ask(s.client, "echo at home", "at home")
    s.nat.rebind(0)
    ask(s.client, "echo next door", "next door")
    equal(s.moves(), 1, "moves")
    equal(s.client.out.text.count("from nowhere"), 0, "answers to the line from the other IP")
    s.same_connections()


@with_each(CID, NEVER, BLIND, GNUTLS)
def back_to_the_old_port(t, kind):
    """A NAT that knew better after all."""
    s = Scene(t, kind)
    first = s.nat.own_addr()
    second = s.nat.rebind(0)
    ask(s.client, "echo there", "there")
    s.moved(second, first)
    equal(s.nat.go_back(), first, "address after going back")
    ask(s.client, "echo back", "back")
    s.moved(first, second)
    ask(s.client, "whoami", first)
    ask(s.client, "echo still there", "still there")
    s.in_stats(first, rf", {times(2)}$")
    s.same_connections()


@with_each(*EVERY)
def close_from_the_new_port(t, kind):
    """The first record from there is its close_notify."""
    s = Scene(t, kind)
    new = s.nat.rebind(0)
    if kind in (S_CLIENT, S_CLIENT_BLIND):
        s.client.send("Q")
    else:
        s.client.close_stdin()
    s.server.err.wait(rf"^{re.escape(new)} closed: closed by the peer$")
    s.client.reap(WAIT)
    check(list(s.stats()) == [s.server.connected(nth=2)["addr"]], f"still in stats: {list(s.stats())}")


SWAPS = ((CID, CID), (NEVER, NEVER), (BLIND, BLIND), (S_CLIENT, S_CLIENT), (GNUTLS, GNUTLS), (CID, NEVER), (CID, BLIND),
         (NEVER, BLIND), (S_CLIENT, GNUTLS))


def swapped(t, one, other):
    s = Scene(t, one, other)
    for n in range(1, 4):
        addrs = [s.nat.own_addr(i) for i in (0, 1)]
        s.nat.swap(0, 1)
        for i, client in enumerate(s.clients):
            ask(client, f"echo {i} after swap {n}", f"{i} after swap {n}")
        for i, client in enumerate(s.clients):
            ask(client, "whoami", addrs[1 - i])
    for i, client in enumerate(s.clients):
        for n in range(1, 4):
            equal(client.out.text.count(f"{1 - i} after swap {n}"), 0, "answers to another's line")
    s.same_connections()


for pair in SWAPS:
    def two_clients_swap_ports(t, pair=pair):
        swapped(t, *pair)
    two_clients_swap_ports.__name__ += f"_{pair[0].name} and {pair[1].name}"
    test(two_clients_swap_ports)


def all_ask(s, what):
    """All at once, so that each finds the addresses of the others as they were before."""
    for i, client in enumerate(s.clients):
        client.send(f"echo {what} {i}.")
    for i, client in enumerate(s.clients):
        client.out.wait(re.escape(f"{what} {i}."), partial=True)


@test(alone=True)
def restarts_of_a_nat_with_many_clients(t):
    """It gives all of them new ports, and then each that of another."""
    kinds = [kind for kind in EVERY if not kind.options and (kind is not GNUTLS or shutil.which("gnutls-cli"))]
    s = Scene(t, *kinds, *kinds)
    for n in range(3):
        s.nat.restart()
        all_ask(s, f"restart {n}")
        for i in range(len(s.clients) - 1):
            s.nat.swap(i, i + 1)
        all_ask(s, f"rotation {n}")
    for i, client in enumerate(s.clients):
        ask(client, "whoami", s.nat.own_addr(i))
    s.same_connections()


@with_each(CID, NEVER, BLIND, S_CLIENT, GNUTLS, slow=True)
def moves_through_loss(t, kind):
    s = Scene(t, kind)
    s.nat.loss = LOSS
    said = 0
    for n in range(10):
        s.nat.rebind(0)
        for m in range(LINES):
            s.client.send(f"echo move {n} line {m}.")
            said += 1
            time.sleep(0.05)
            if f"move {n} line " in s.client.out.text:
                break
        s.client.out.wait(f"move {n} line ", partial=True)
    check(s.nat.did["lost"] > 0, "nothing was lost")
    s.nat.loss = 0
    ask(s.client, "echo after all", "after all")
    ask(s.client, "whoami", s.nat.own_addr())
    say(f"{kind.name}: {said} lines for 10 moves through {LOSS:.0%} loss each way")
    s.same_connections()


@with_each(*EVERY)
def large_messages_follow_a_client_that_moved(t, kind):
    """From its second record on, or once it has answered from there (RFC 9853); and as an answer to its first line."""
    s = Scene(t, kind)
    size = 4000 if kind is GNUTLS else 8000 if kind in (S_CLIENT, S_CLIENT_BLIND) else 16000
    for n in range(3):
        s.nat.rebind(0)
        text = f"{n}" + "b" * size
        if n == 0:
            ask(s.client, "echo e" + text, "e" + text)  # as much came from there
        ask(s.client, f"echo first {n}", f"first {n}")
        ask(s.client, f"echo second {n}", f"second {n}")
        began, sent = time.monotonic(), 0
        while text not in s.client.out.text.replace("e" + text, ""):
            check(time.monotonic() - began < WAIT, f"no broadcast came within {WAIT:g} s")
            s.watcher.send("bc " + text)
            sent += 1
            time.sleep(0.05)
        if sent > 1:
            say(f"{kind.name}: {sent} broadcasts until one came, {time.monotonic() - began:.2f} s after its "
                  f"second line")
    s.same_connections()


# ---- by themselves ---------------------------------------------------------------------------------------------------


def goes_on(client, nth=1):
    return client.err.wait(r"^\S+ goes on from (\S+)$", nth)[1]


def rebinds_on_a_signal(t, kind, host):
    server = t.server("--psk", KEY, *kind.options, at=[host])
    client = kind.start(t, server)
    old = server.connected()["addr"]
    ask(client, "whoami", old)
    for n in (1, 2, 3):
        client.send_signal(signal.SIGUSR1)
        new = goes_on(client, n)
        check(new != old, f"went on from where it was, {new}")
        ask(client, "whoami", new)
        server.err.wait_line(f"{new} moved from {old}")
        old = new
    client.send("stats")
    client.out.wait(rf"^{re.escape(new)} .*, {times(3)}$")
    equal(server.err.count("connected:"), 1, "connections")
    equal(client.err.count("connected:|renewed:"), 1, "handshakes of the client")
    client.ends()
    server.err.wait_line(f"{new} closed: closed by the peer")


@with_each(*OURS)
def rebind_on_a_signal(t, kind):
    rebinds_on_a_signal(t, kind, "127.0.0.1")


@with_each(CID, NEVER, BLIND)
def rebind_on_a_signal_over_ipv6(t, kind):
    need_ipv6()
    rebinds_on_a_signal(t, kind, "[::1]")


@test
def rebind_on_a_terminal(t):
    server = t.server()
    term = t.term(server)
    term.ask("ping", "pong")
    term.type("echo half a ")
    term.prompts("echo half a ")
    term.send_signal(signal.SIGUSR1)
    new = term.shows_like(r"goes on from (\S+)$")[1]
    term.prompts("echo half a ")
    term.type("line\r")
    term.shows("half a line")
    term.ask("whoami", new)


@test
def signals_before_it_is_connected(t):
    relay = t.relay(t.server())
    relay.blocked = True
    client = t.client(relay)
    wait_until(lambda: relay.log, "ClientHello")
    client.send_signal(signal.SIGUSR1)
    relay.blocked = False
    client.connected()
    ask(client, "ping", "pong")


@test
def many_rebinds_in_a_row(t):
    """Also without anything said between two of them."""
    s = Scene(t)
    client = t.client(s.server)
    seen = {s.server.connected(nth=2)["addr"]}
    for n in range(40):
        client.send_signal(signal.SIGUSR1)
        if n % 4 == 0:
            ask(client, f"echo {n}.", f"{n}.")
        if n % 4 == 1:
            before = len(client.out.lines())
            client.send("whoami")
            client.out.wait(r"^127\.0\.0\.1:\d+$", nth=len(seen))
            seen.add(client.out.lines()[before])
    check(len(seen) == 11, f"only {len(seen)} addresses in 10 answers, and the first one")
    equal(s.server.err.count("connected:"), 2, "connections")
    client.ends()


@with_each(CID, CID_BOTH_WAYS, CID_CHACHA, slow=True)
def own_port_that_a_nat_has_forgotten(t, kind):
    """Whatever it sends from there vanishes. By itself it goes on from another, without another handshake."""
    s = Scene(t)
    nat = t.nat(s.server)
    client = kind.start(t, nat)
    client.connected()
    ask(client, "ping", "pong")
    old = nat.own_addr()
    nat.cut()
    client.send("echo into the void")
    began = time.monotonic()
    goes_on(client)
    took = time.monotonic() - began
    ask(client, "echo further on", "further on")
    say(f"{kind.name}: went on after {took:.2f} s without an answer; the line that was lost was "
          f"{'answered' if 'into the void' in client.out.text else 'not sent again'}")
    s.moved(nat.own_addr(1), old)
    equal(s.server.err.count("connected:"), 2, "connections that were ever made")
    equal(client.err.count("connected:|renewed:"), 1, "handshakes of the client")


@with_each(CID, NEVER, BLIND, slow=True)
def own_port_that_a_nat_has_forgotten_and_less_patience(t, kind):
    """One way or the other it comes back, and the line is answered."""
    s = Scene(t)
    nat = t.nat(s.server)
    client = kind.start(t, nat, "--unanswered", "2")
    client.connected()
    ask(client, "ping", "pong")
    nat.cut()
    client.send("echo into the void")
    client.err.wait(" goes on from | renewed: ")
    client.out.wait_line("into the void")
    client.ends()


@test
def own_address_that_is_gone(t):
    for kind, options in ((CID, ()), (NEVER, ("--cid", "never"))):
        hosts = {name: Host(t, name) for name in ("client", "server")}
        hosts["client"].cable(hosts["server"])
        hosts["client"].up("192.0.2.1")
        hosts["server"].up("192.0.2.9")
        where = "192.0.2.9:4444"
        server = Proc(t, t.title("server"), hosts["server"].inside(BIN, "server", "--certs", CERTS, where))
        server.err.wait("^listening on ")
        words = [BIN, "client", "--certs", CERTS, "--name", "localhost", *options, where]
        client = Proc(t, t.title("client"), hosts["client"].inside(*words))
        old = server.err.wait(CONNECTED)["addr"]
        equal(split_addr(old)[0], "192.0.2.1", "address in the server's log")
        ask(client, "echo here", "here")
        hosts["client"].ip("address", "del", "192.0.2.1/24", "dev", "client")
        hosts["client"].ip("address", "add", "192.0.2.3/24", "dev", "client")
        began = time.monotonic()
        client.send("echo there")
        new = goes_on(client)
        took = time.monotonic() - began
        equal(split_addr(new)[0], "192.0.2.3", "address that the client goes on from")
        ask(client, "echo further on", "further on")
        say(f"{kind.name}: went on {took:.3f} s after its address was gone; the line that it could not send "
              f"was {'answered' if 'there' in client.out.lines() else 'not sent again'}")
        ask(client, "whoami", new)
        server.err.wait_line(f"{new} moved from {old}")
        equal(server.err.count("connected:"), 1, "connections")
        client.stop()
        server.stop()
        for host in hosts.values():
            host.kill()


# ---- thieves ---------------------------------------------------------------------------------------------------------


def within_the_limit(s, what):
    sent, received = s.nat.sent[s.nat.thief_addr], s.nat.received[s.nat.thief_addr]
    check(received <= TIMES * sent, f"{what}: {received} bytes went to an address that had sent {sent}")
    return sent, received


@with_each(*EVERY)
def copies_that_come_first(t, kind):
    """The thief wins the race with a copy, so the server goes there. What comes from the old address is as new, and it
    comes back. The message counts once."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    before = s.messages_in()

    def talk(n):
        """Twice: what the client answered to the server, that it is still there, has gone before the second line."""
        ask(s.client, f"echo next {n}.", f"next {n}.")
        ask(s.client, f"echo fence {n}.", f"fence {n}.")

    for n in (1, 2):  # the log has a few lines of each kind, and sums up the others
        s.nat.steal("before")
        s.client.send(f"echo race {n}.")
        s.moved(s.nat.thief_addr, home, n)
        s.moved(home, s.nat.thief_addr, n)
        talk(n)
    for n in range(3, 8):
        s.nat.steal("before")
        s.client.send(f"echo race {n}.")
        wait_until(lambda: s.nat.thefts == 0, "datagram to copy")
        talk(n)
    ask(s.client, "whoami", home)
    equal(s.messages_in(), before + 22, "messages that the server took")
    equal(s.times_moved(), 14, "moves, there and back")
    within_the_limit(s, "copies")
    s.same_connections()


@with_each(CID, NEVER, BLIND, S_CLIENT)
def copies_of_everything_come_first(t, kind):
    """As long as he goes on, answers may go to him; afterwards the client has its connection. And what the two ends say
    to each other of its address must not go on for ever."""
    lines = 50
    s = Scene(t, kind)
    home = s.nat.own_addr()
    before, came = s.messages_in(), s.nat.came
    s.nat.steal("before", 1 << 30)
    for n in range(lines):
        so_far = s.nat.came
        s.client.send(f"echo race {n}.")
        wait_until(lambda so_far=so_far: s.nat.came > so_far, "datagram")  # or s_client makes one message of two lines
    wait_until(lambda: s.messages_in() == before + lines, f"{lines} messages")
    came = s.nat.came - came
    s.nat.steal("before", 0)
    ask(s.client, "echo alone again", "alone again")
    ask(s.client, "whoami", home)
    equal(s.messages_in(), before + lines + 2, "messages that the server took")
    answered = len(set(re.findall(r"race \d+\.", s.client.out.text)))
    _, received = within_the_limit(s, "copies")
    say(f"{kind.name}: of {lines} lines that raced, {answered} answers came to the client, and {received} "
          f"bytes to the thief; {s.times_moved()} moves, {came} datagrams of the client")
    check(came <= 4 * lines, f"{lines} lines made {came} datagrams")
    s.same_connections()


@with_each(*EVERY)
def copies_that_come_late(t, kind):
    s = Scene(t, kind)
    home = s.nat.own_addr()
    before = s.messages_in()
    s.nat.steal("after", 1 << 30)
    for n in range(20):
        ask(s.client, f"echo line {n}.", f"line {n}.")
    equal(s.moves(), 0, "moves")
    equal(s.nat.received[s.nat.thief_addr], 0, "bytes that went to the thief")
    equal(s.messages_in(), before + 20, "messages that the server took")
    s.same_connections()


@with_each(*EVERY)
def replays_from_another_port(t, kind):
    s = Scene(t, kind)
    home = s.nat.own_addr()
    for n in range(20):
        ask(s.client, f"echo line {n}.", f"line {n}.")
    before = s.messages_in()
    recorded = s.nat.recorded()
    check(len(recorded) > 20, f"only {len(recorded)} datagrams to replay")
    for _ in range(3):
        s.nat.replay(recorded)
        ask(s.client, "echo among replays", "among replays")
    equal(s.moves(), 0, "moves")
    equal(s.nat.received[s.nat.thief_addr], 0, "bytes that went to the thief")
    equal(s.messages_in(), before + 3, "messages that the server took")
    s.same_connections()


@with_each(*EVERY)
def held_back_records_move_nothing(t, kind):
    """They are authentic and were never seen, but newer ones came."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    s.nat.steal("hold")
    s.client.send("echo held")
    wait_until(lambda: s.nat.held, "datagram to hold back")
    ask(s.client, "echo newer", "newer")
    s.nat.replay(s.nat.held)
    ask(s.client, "echo newest", "newest")
    equal(s.moves(), 0, "moves")
    equal(s.nat.received[s.nat.thief_addr], 0, "bytes that went to the thief")
    ask(s.client, "whoami", home)
    s.same_connections()


@with_each(*EVERY)
def what_goes_to_an_address_that_proved_nothing(t, kind):
    """One datagram came from there, and large messages are for that client."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    s.nat.steal("instead")
    s.client.send("echo stolen")
    s.moved(s.nat.thief_addr, home)
    for n in range(BROADCASTS):
        text = f"{n} " + "b" * 16000
        ask(s.watcher, "bc " + text, text)
    for n in range(BROADCASTS * 2):
        ask(s.watcher, f"bc small {n}", f"small {n}")
    sent, received = within_the_limit(s, "broadcasts")
    check(sent > 0, "nothing was stolen")
    ask(s.client, "echo mine again", "mine again")
    s.moved(home, s.nat.thief_addr)
    ask(s.client, "echo and still", "and still")
    ask(s.watcher, "bc to all", "to all")
    s.client.out.wait("to all", partial=True)
    within_the_limit(s, "broadcasts, after the client was back")
    say(f"{kind.name}: {received} bytes to an address that sent {sent}")
    s.same_connections()


@with_each(*EVERY)
def records_that_came_only_from_the_thief(t, kind):
    """He takes several, so that the server believes him. The client's next lines take the connection back."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    before = s.messages_in()
    lines = 0
    for n in (1, 2, 5):
        s.nat.steal("instead", n)
        for m in range(n):
            s.client.send(f"echo stolen {n} {m}.")
            wait_until(lambda: s.nat.thefts < n - m, "a datagram that is stolen")
        s.nat.steal("instead", 0)
        ask(s.client, f"echo mine {n}.", f"mine {n}.")
        ask(s.client, f"echo and still {n}.", f"and still {n}.")
        lines += n + 2
    ask(s.client, "whoami", home)
    equal(s.messages_in(), before + lines + 1, "messages that the server took")
    s.same_connections()


@with_each(CID, NEVER, BLIND, S_CLIENT)
def late_copies_of_a_thief_who_was_believed(t, kind):
    """Once he took two records, so the server knows his address as one where this client was. That must not let him win
    with copies that come after the real ones."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    s.nat.steal("instead", 2)
    for n in range(2):
        s.client.send(f"echo stolen {n}")
        wait_until(lambda: s.nat.thefts < 2 - n, "a datagram that is stolen")
    ask(s.client, "echo mine again", "mine again")
    before, received = s.times_moved(), s.nat.received[s.nat.thief_addr]
    s.nat.steal("after", 1 << 30)
    for n in range(20):
        ask(s.client, f"echo line {n}.", f"line {n}.")
        ask(s.watcher, f"bc all {n}.", f"all {n}.")
        s.client.out.wait(re.escape(f"all {n}."), partial=True, timeout=PROMPT)
    equal(s.times_moved(), before, "moves")
    equal(s.nat.received[s.nat.thief_addr], received, "bytes that went to the thief")
    ask(s.client, "whoami", home)
    s.same_connections()


@with_each(CID, CID_BOTH_WAYS, CID_CHACHA)
def client_that_can_be_asked_comes_home_by_itself(t, kind):
    """The server asks at the old address (RFC 9853), and the client answers from there."""
    s = Scene(t, kind)
    home = s.nat.own_addr()
    s.nat.steal("instead")
    s.client.send("echo stolen")
    s.moved(s.nat.thief_addr, home)
    s.moved(home, s.nat.thief_addr)
    ask(s.watcher, "bc to all", "to all")
    s.client.out.wait("to all", partial=True)
    equal(s.times_moved(), 2, "moves, there and back")
    within_the_limit(s, "the server")
    s.same_connections()


# ---- handshakes ------------------------------------------------------------------------------------------------------


@with_each(CID, NEVER, slow=True)
def handshakes_are_not_moved(t, kind):
    """A NAT that restarts in the middle of one: the client begins anew, and gets in."""
    server = t.server("-v")
    tried = []
    for nth in (2, 3, 4):  # of the datagrams that the client sends; it comes from a new port
        nat = t.nat(server)
        nat.plan[nth] = lambda nat=nat: nat.rebind(0)
        tried.append((nat, kind.start(t, nat, "--mtu", "512"), time.monotonic()))
    took = []
    for nat, client, began in tried:
        client.connected(timeout=45)
        took.append(time.monotonic() - began)
        check(not nat.plan, "a NAT did not restart in the handshake")
        before = client.out.count(r"^127\.0\.0\.1:\d+$")
        client.send("whoami")
        addr = client.out.wait(r"^127\.0\.0\.1:\d+$", nth=before + 1)[0]
        server.err.wait(rf"^{re.escape(addr)} connected: ")
        client.ends()
    equal(server.err.count(" moved from "), 0, "moves")
    say(f"{kind.name}: connected through a NAT that restarted after {', '.join(f'{s:.2f}' for s in took)} s")


if __name__ == "__main__":
    sys.exit(main())
