#!/usr/bin/env python3
"""End-to-end tests: the real program, real sockets, real pseudo-terminals. harness.py tells how to run them."""

import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (Authority, BIN, CC, CERTS, COMMANDS, FORGED, FORGED_DONE, IP_UDP_BYTES, Identity,
                     MESSAGE_MAX, OPENSSL, PROMPT, Proc, ROOT, Server, Skip, WAIT, can_bind, certs_sh, check,
                     client_identity, equal, free_port, main, need_ipv6, need_second_loopback, openssl, server_identity,
                     split_addr, test, wait_until)  # noqa: E402
from screen import layout  # noqa: E402

# ---- tests: the command line -----------------------------------------------------------------------------------------


def says_one_line(run, status):
    """Ends with this status, one line on stderr that starts with our name, nothing on stdout; returns the line."""
    run.exits(status)
    what = " ".join(run.argv[1:])
    equal(run.out.text, "", f"stdout of {what}")
    lines = run.err.lines()
    check(len(lines) == 1 and lines[0].startswith("dtls: "), f"stderr of {what}: not one line `dtls: ...`: {lines}")
    return lines[0]


@test
def help_and_version(t):
    for option in ("--help", "--version"):
        run = t.dtls(option).exits(0)
        equal(run.err.text, "", f"stderr of {option}")
        check(run.out.lines(), f"{option} says nothing")
    wanted = ("server", "client", "--certs", "--cert", "--key", "--ca", "--name", "--mtu", "--idle-timeout",
              "--keepalive", "--max-clients", "-v", "-q", "--help", "--version")
    text = t.procs[0].out.text
    check(all(word in text for word in wanted), f"--help does not name {[word for word in wanted if word not in text]}")
    check(re.search(r"\d+\.\d+\.\d+", run.out.text), f"--version without a version: {run.out.text!r}")
    kqueue = sys.platform != "linux" or "-DDTLS_USE_KQUEUE" in CC
    check(run.out.text.endswith("kqueue\n" if kqueue else "epoll\n"), f"another backend: {run.out.text!r}")


@test
def usage_errors(t):
    here = "127.0.0.1:1234"
    wrong = [[], ["frobnicate"], ["frobnicate", here], ["server"], ["client"], ["client", here, here], ["--frobnicate"]]
    for mode in ("server", "client"):
        wrong += [[mode, addr] for addr in ("127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:70000",
                                            "127.0.0.1:12x", ":1234", "::1:1234", "[::1]", "[::1]:", "[::1]:0",
                                            "[::1:1234", "")]
        wrong += [[mode, "--frobnicate", here], [mode, "-x", here], [mode, "--certs"], [mode, here, "--mtu"]]
        wrong += [[mode, f"--mtu={value}", here] for value in ("", "x", "1500x", "-1", "0", "255", "65536", "1e9")]
    wrong += [["server", "--idle-timeout", value, here] for value in ("x", "-1", "nan", "5s", "")]
    wrong += [["server", "--max-clients", value, here] for value in ("x", "-1", "2.5", "")]
    wrong += [["client", "--keepalive", value, here] for value in ("x", "-1", "inf", "1,5", "")]
    for run in [t.dtls(*words) for words in wrong]:
        says_one_line(run, 2)


@test
def unreadable_keys_and_certificates(t):
    authority = t.authority()
    client, server = authority.issue("someone"), server_identity()
    garbage, encrypted, nowhere = t.path("garbage.pem"), t.path("encrypted.key"), t.path("nowhere.pem")
    pathlib.Path(garbage).write_text("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
    openssl("pkey", "-in", client.key, "-aes256", "-passout", "pass:secret", "-out", encrypted)
    cases = [
        (["--key", nowhere], r"nowhere\.pem"),
        (["--cert", nowhere], r"nowhere\.pem"),
        (["--ca", nowhere], r"nowhere\.pem"),
        (["--key", garbage], r"garbage\.pem"),
        (["--cert", garbage], r"garbage\.pem"),
        (["--ca", garbage], r"garbage\.pem"),
        (["--cert", client.pem, "--key", encrypted], "encrypted"),
        (["--cert", client.pem, "--key", server.key], "match|not the key"),
        (authority.expired("old").options, "expired"),
        (authority.issue("early", start="20400101000000Z", end="20410101000000Z").options, "not (yet )?valid"),
    ]
    runs = [(t.dtls(mode, "--certs", CERTS, *options, f"127.0.0.1:{free_port()}"), words)
            for mode in ("server", "client") for options, words in cases]
    for run, words in runs:
        line = says_one_line(run, 1)
        check(re.search(words, line), f"{' '.join(run.argv[1:])} says {line!r}, nothing about {words!r}")


@test
def missing_certificates_name_the_make_target(t):
    empty = t.path("empty")
    os.mkdir(empty)
    for mode in ("server", "client"):
        for options in (["--certs", empty], ["--certs", t.path("nowhere")], []):  # the last: no certs/ in this folder
            line = says_one_line(t.dtls(mode, *options, f"127.0.0.1:{free_port()}"), 1)
            check("make certs" in line, f"{mode} {options} does not say what to do: {line}")


@test
def address_in_use(t):
    server = t.server()
    line = says_one_line(t.dtls("server", "--certs", CERTS, server.addr), 1)
    check(server.addr in line and "in use" in line.lower(), f"says {line!r}")
    t.ping(server)


@test
def address_not_of_this_machine(t):
    line = says_one_line(t.dtls("server", "--certs", CERTS, "192.0.2.1:1234"), 1)
    check("192.0.2.1:1234" in line, f"says {line!r}")


def one_too_many(t, server):
    """A client that a full server turns away: it hears why, and the log of the server says it."""
    relay = t.relay(server)
    client = t.client(relay)
    server.err.wait("refused: max_conns .* is reached$")
    client.err.wait("handshake failed: refused by the peer: internal error$")
    largest = max(len(d.data) for d in list(relay.log) if not d.to_server)
    check(largest <= 44, f"largest answer of a full server, which must not be above a cookie's: {largest}")
    equal(client.err.count("connected:"), 0, "connections of a client too many")
    client.exits(1)


def found_idle(server, seconds, who=r"\S+"):
    """The server ended a silent peer, never too early; how late, a busy machine decides."""
    after = float(server.err.wait(rf"^{who} closed: idle for ([\d.]+) s$")[1])
    check(after >= seconds, f"a peer was ended after {after} s instead of {seconds}")


@test(slow=True)
def options_with_equals_sign(t):
    """Each value must be seen to take effect."""
    server = t.server("--idle-timeout=2.5", "--max-clients=1", "--mtu=600")
    relay = t.relay(server)
    silent = t.client(relay, "--keepalive=0", "--mtu=500", f"--ca={CERTS}/ca.pem", "--name=localhost")
    silent.connected()
    for to_server, mtu in ((True, 500), (False, 600)):
        largest = max(len(datagram.data) for datagram in relay.handshake(to_server))
        check(mtu - 200 < largest <= mtu - IP_UDP_BYTES, f"largest datagram of a handshake at MTU {mtu}: {largest}")
    found_idle(server, 2.5)
    silent.exits(1)  # it is told

    relay = t.relay(server)
    lively = t.client(relay, "--keepalive=0.3")
    lively.connected()
    wait_until(lambda: sum(d.to_server and d.data[:1] in b"\x17\x19" for d in list(relay.log)) > 10,
               "eleven pings of a client that is silent for 0.3 s each time")
    equal(server.err.count("closed: idle"), 1, "clients that the server found idle")
    one_too_many(t, server)
    lively.ends()

    server = t.server()
    for option, reason in ((f"--ca={t.other_authority().pem}", UNKNOWN_ISSUER),
                           ("--name=elsewhere.example", OTHER_NAME)):
        t.client(server, option, stdin=b"ping\n").exits(1).err.wait(f"handshake failed: {reason}")


@test
def quiet_and_verbose(t):
    port = free_port()
    quiet = Server(t, ["-q"], [f"127.0.0.1:{port}"], CERTS)
    wait_until(lambda: not can_bind("127.0.0.1", port), "quiet server on its port")
    client = t.ping(quiet, "-q")
    equal(client.err.text, "", "stderr of client -q")
    quiet.stop()
    equal(quiet.err.text, "", "stderr of server -q")
    loud = t.server("-v")
    t.ping(loud, "-v")
    loud.connected()


# ---- tests: commands and plain input ---------------------------------------------------------------------------------


def all_commands(t, host):
    server = t.server(at=[host])
    client = t.client(server)
    shown = client.connected()
    equal(shown["addr"], server.addr, "address in the client's log")
    check(re.match("ECDHE-.*(GCM|CHACHA20)", shown["cipher"]), f"cipher {shown['cipher']}")
    seen = server.connected()
    check(re.match(re.escape(host) + r":\d+$", seen["addr"]), f"address in the server's log: {seen['addr']}")
    equal(seen["name"], "client", "certificate name in the server's log")
    equal((seen["kind"], shown["kind"]), ("full handshake",) * 2, "kind of handshake")
    asked = [("ping", "pong"), ("echo hello there", "hello there"), ("echo  two  spaces ", " two  spaces "),
             ("echo Grüße, 漢字", "Grüße, 漢字"), ("whoami", seen["addr"]), ("bc to all of us", "to all of us"),
             ("nonsense", COMMANDS), ("echo", COMMANDS), ("bc", COMMANDS), ("pingpong", COMMANDS), ("PING", COMMANDS)]
    for line, answer in asked:
        client.ask(line, answer)
    client.send("stats")
    client.out.wait("^users: 1$")
    client.out.wait(f"^{re.escape(seen['addr'])}\\b.*\\bclient\\b")
    client.ends()
    server.err.wait_line(f"{seen['addr']} closed: closed by the peer")
    lines = client.out.lines()
    equal(lines[:len(asked) + 1], [answer for _, answer in asked] + ["users: 1"], "the client's stdout")
    equal(len(lines), len(asked) + 2, "lines on the client's stdout")
    equal(len(server.err.lines()), 3, "lines in the server's log (listening, connected, closed)")


@test
def commands_over_ipv4(t):
    all_commands(t, "127.0.0.1")


@test
def commands_over_ipv6(t):
    need_ipv6()
    all_commands(t, "[::1]")


@test
def input_from_a_pipe_and_from_files(t):
    server = t.server()
    script = t.path("script")
    pathlib.Path(script).write_text("ping\necho last line\n")
    for stdin, wanted in ((b"ping\n", "pong\n"), (b"ping", "pong\n"), (b"", ""), (subprocess.DEVNULL, ""),
                          (script, "pong\nlast line\n"), (b"ping\n\necho after an empty line\n",
                                                          "pong\nafter an empty line\n")):
        client = t.client(server, stdin=stdin).exits(0)
        equal(client.out.text, wanted, f"stdout of a client with stdin {stdin!r}")


@test
def what_others_broadcast_does_not_keep_a_pipe(t):
    server = t.server()
    noisy = t.client(server)
    piped = t.client(server, stdin=b"ping\n")
    piped.connected()
    began = time.monotonic()
    while piped.running():
        noisy.send("bc noise")
        check(time.monotonic() - began < WAIT, f"still there after {WAIT:g} s")
        time.sleep(0.05)
    piped.exits(0)
    check("pong" in piped.out.lines(), f"no pong in {piped.out.text!r}")
    noisy.kill()


@test
def what_others_broadcast_is_no_answer(t):
    """On a slow link: the answer takes longer than the linger after what came instead."""
    server = t.server()
    relay = t.relay(server)
    relay.delay = 0.3
    noisy = t.client(server)
    piped = t.client(relay, stdin=b"echo mine\n")
    server.connected(nth=2)
    while piped.running():
        noisy.send("bc noise")
        time.sleep(0.05)
    piped.exits(0)
    check("mine" in piped.out.lines(), f"no answer in {piped.out.text!r}")
    noisy.kill()


@test
def any_address_as_target(t):
    """0.0.0.0 as a target means this machine to the system; answers come from another address then."""
    server = t.server(at=["0.0.0.0"])
    t.ping(f"0.0.0.0:{split_addr(server.addr)[1]}", "--name", "localhost")


@test(alone=True)
def five_thousand_lines_from_a_file(t):
    server = t.server()
    script = t.path("script")
    pathlib.Path(script).write_text("".join(f"echo {n}\n" for n in range(2500)) + "ping\n" * 2500)
    client = t.client(server, stdin=script).exits(0, timeout=30)
    lines = client.out.lines()
    equal(len(lines), 5000, "answers")
    equal(lines, [str(n) for n in range(2500)] + ["pong"] * 2500, "answers")


@test
def message_of_16384_bytes(t):
    server = t.server()
    client = t.client(server)
    text = "".join(random.Random(16384).choices("abcdefghijklmnopqrstuvwxyz 0123456789", k=MESSAGE_MAX - 5))
    client.ask("echo " + text, text)
    text = text[:MESSAGE_MAX - 5 - 2]
    client.ask("bc ab" + text, "ab" + text)
    client.ends()


@test
def line_above_16384_bytes_is_refused(t):
    server = t.server()
    client = t.client(server, stdin=b"ping\n" + b"x" * (MESSAGE_MAX + 1) + b"\nping\n").exits(1)
    equal(client.out.text, "pong\npong\n", "stdout")
    client.err.wait_line("dtls: line 2 is 16385 bytes, more than 16384: not sent")
    client = t.client(server, stdin=b"y" * 300_000 + b"\nping\n").exits(1)
    equal(client.out.text, "pong\n", "stdout")
    client.err.wait_line("dtls: line 1 is 300000 bytes, more than 16384: not sent")


@test
def several_clients_and_bc(t):
    server = t.server()
    clients = [t.client(server) for _ in range(3)]
    for client in clients:
        client.connected()
    clients[1].send("bc to everybody")
    for client in clients:
        client.out.wait_line("to everybody")
        client.ask("ping", "pong")
        client.ends()
        equal(client.out.lines(), ["to everybody", "pong"], "stdout")


@test(alone=True)
def hundred_clients_at_once(t):
    server = t.server()
    clients = [t.client(server) for _ in range(100)]
    for client in clients:
        client.connected(timeout=40)
    server.connected(nth=100)
    clients[50].send("stats")
    clients[50].out.wait("^users: 100$")
    clients[50].out.wait(r"^127\.0\.0\.1:\d+\b.*$", nth=100)
    listed = clients[50].out.lines()[1:]
    equal(len(listed), 100, "clients in stats")
    seen = set(re.findall(r"^(\S+) connected", server.err.text, re.M))
    equal({line.split()[0].rstrip(",:") for line in listed}, seen, "addresses in stats")
    clients[0].send("bc hello everybody")
    for client in clients:
        client.out.wait_line("hello everybody")
    for client in clients:  # an answer to this comes behind any second copy
        client.send("ping")
    for client in clients:
        client.out.wait_line("pong")
        equal(client.out.lines()[-2:], ["hello everybody", "pong"], f"last lines of {client.title}")
        equal(client.out.count("^hello everybody$"), 1, f"copies at {client.title}")
    for client in clients:
        client.close_stdin()
    for client in clients:
        client.exits(0, timeout=30)
    server.err.wait("closed: closed by the peer$", nth=100)


@test
def stats_over_several_messages(t):
    server = t.server("--mtu", "256")
    for client in [t.client(server) for _ in range(8)]:
        client.connected()
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    before = len(relay.log)
    client.send("stats")
    client.out.wait("^users: 9$")
    client.out.wait(r"^127\.0\.0\.1:\d+\b", nth=9)
    equal(len(client.out.lines()), 10, "lines of stats")
    pages = [len(datagram.data) for datagram in relay.log[before:] if not datagram.to_server]
    check(len(pages) > 1, f"one page: {pages}")
    check(max(pages) <= 256 - IP_UDP_BYTES, f"pages larger than the MTU: {pages}")


# ---- tests: addresses ------------------------------------------------------------------------------------------------


def whoami(t, server, addr, *options):
    """Asks through addr and compares with what the server saw."""
    before = server.err.count("connected: ")
    client = t.client(addr, *options, stdin=b"whoami\n").exits(0)
    equal(client.out.lines(), [server.connected(nth=before + 1)["addr"]], f"whoami through {addr}")


@test
def wildcard_answers_from_the_address_asked(t):
    need_second_loopback()
    server = t.server(at=["0.0.0.0"])
    port = split_addr(server.addr)[1]
    for host in ("127.0.0.1", "127.0.0.2"):
        whoami(t, server, f"{host}:{port}", "--name", "localhost")
    named = t.authority().issue("second", usage="serverAuth", names="IP:127.0.0.2")
    server = t.server(*named.options, at=["0.0.0.0"])
    whoami(t, server, f"127.0.0.2:{split_addr(server.addr)[1]}")


@test
def ipv6_wildcard_serves_both_families(t):
    need_ipv6()
    server = t.server(at=["[::]"])
    port = split_addr(server.addr)[1]
    for host in ("127.0.0.1", "[::1]"):
        whoami(t, server, f"{host}:{port}")
    check(re.search(r"^127\.0\.0\.1:\d+ connected", server.err.text, re.M), "IPv4 client not logged as IPv4")


@test
def several_addresses(t):
    need_ipv6()
    ports = free_port(), free_port()
    server = Server(t, [], [f"127.0.0.1:{ports[0]}", f"[::1]:{ports[0]}", f"127.0.0.1:{ports[1]}"], CERTS)
    for addr in server.addrs:
        server.err.wait_line(f"listening on {addr}")
    for addr in server.addrs:
        whoami(t, server, addr)


@test
def covered_address_is_reported_and_skipped(t):
    for wildcard, covered in (("0.0.0.0", ["127.0.0.1"]), ("[::]", ["[::1]", "127.0.0.1", "0.0.0.0"])):
        if wildcard == "[::]":
            need_ipv6()
        server = t.server(at=[wildcard, *covered], listening=1)
        for host in covered:
            addr = f"{host}:{split_addr(server.addr)[1]}"
            server.err.wait(f"{re.escape(addr)}.*(cover|skip)")
        t.ping(f"127.0.0.1:{split_addr(server.addr)[1]}")


@test
def link_local_address_with_a_scope(t):
    """In a network namespace of its own, whose loopback interface gets the address."""
    script = """
        ip link set lo up && ip address add fe80::1/64 dev lo nodad || exit 9
        "$0" server --certs "$1" "[fe80::1%lo]:4444" & server=$!
        printf 'whoami\n' | "$0" client --certs "$1" --name localhost "[fe80::1%lo]:4444"; status=$?
        kill $server; wait $server && exit $status"""
    if not shutil.which("ip") or not shutil.which("unshare"):
        raise Skip("no ip or no unshare command")
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], stdin=subprocess.DEVNULL,
                      stderr=subprocess.DEVNULL).returncode != 0:
        raise Skip("no network namespaces here")
    run = Proc(t, "namespace", ["unshare", "-rn", "sh", "-c", script, BIN, CERTS], stdin=subprocess.DEVNULL).exits(0)
    check(re.fullmatch(r"\[fe80::1%lo\]:\d+\n", run.out.text), f"whoami answered {run.out.text!r}")


def localhost():
    """The addresses of that name; none where the system does not know it, as with no /etc/hosts."""
    try:
        return {entry[4][0] for entry in socket.getaddrinfo("localhost", 1, type=socket.SOCK_DGRAM)}
    except socket.gaierror:
        return set()


def host_name(t, host):
    if host.strip("[]") not in localhost():
        raise Skip(f"localhost has no address {host} here")
    server = t.server(at=[host])
    t.ping(f"localhost:{split_addr(server.addr)[1]}")


@test
def host_name_with_an_ipv4_address(t):
    host_name(t, "127.0.0.1")


@test
def host_name_with_an_ipv6_address(t):
    need_ipv6()
    host_name(t, "[::1]")


@test
def unknown_host_name(t):
    line = says_one_line(t.dtls("client", "-q", "--certs", CERTS, "no-such-host.invalid:1234"), 1)
    check("could not connect: no-such-host.invalid: " in line, f"says {line!r}")


@test
def nobody_there(t):
    for host in ("127.0.0.1", "localhost") if localhost() else ("127.0.0.1",):
        addr = f"{host}:{free_port()}"
        client = t.client(addr, stdin=b"ping\n").exits(1, timeout=3 + PROMPT)
        equal(client.out.text, "", "stdout of a client that found nobody")
        client.err.wait("handshake failed: .*refused")


# ---- tests: ends -----------------------------------------------------------------------------------------------------


def server_stops(t, number):
    server = t.server()
    clients = [t.client(server) for _ in range(3)]
    for client in clients:
        client.connected()
    server.stop(number)
    for client in clients:
        client.err.wait_line(f"{server.addr} closed: closed by the peer", timeout=PROMPT)
        client.exits(1, timeout=PROMPT)
        equal(client.out.text, "", "stdout")
    equal(server.err.count("closed: closed here$"), 3, "clients logged as closed here")


@test(alone=True)
def server_stops_on_sigterm(t):
    server_stops(t, signal.SIGTERM)


@test(alone=True)
def server_stops_on_sigint(t):
    server_stops(t, signal.SIGINT)


@test(alone=True)
def client_stops_on_signals(t):
    server = t.server()
    for nth, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), 1):
        client = t.client(server)
        client.connected()
        client.stop(number)
        server.err.wait("closed: closed by the peer$", nth, timeout=PROMPT)
    relay = t.relay(server)
    relay.blocked = True
    client = t.client(relay)
    wait_until(lambda: relay.log, "ClientHello")
    client.stop()
    server.stop()


@test
def killed_client_leaves_stats(t):
    server = t.server("--idle-timeout", "2")
    watcher = t.client(server)
    watcher.connected()
    victim = t.client(server)
    victim.connected()
    addr = server.connected(nth=2)["addr"]
    watcher.ask("stats", "users: 2")
    victim.kill()
    killed = time.monotonic()
    while server.err.count("closed: ") == 0 and time.monotonic() < killed + WAIT:  # its asking keeps the watcher alive
        watcher.ask("ping", "pong")
        time.sleep(0.1)
    found_idle(server, 2, re.escape(addr))
    watcher.ask("stats", "users: 1")


@test
def idle_timeout_and_keepalive_off(t):
    server = t.server("--idle-timeout", "1")
    client = t.client(server, "--keepalive", "0")
    client.connected()
    endless = t.server("--idle-timeout", "0")
    idler = t.client(endless, "--keepalive", "0")
    idler.connected()
    found_idle(server, 1)
    client.exits(1, timeout=PROMPT)
    idler.ask("ping", "pong")


@test(slow=True)
def keepalive_keeps_alive_and_shows_nothing(t):
    server = t.server("--idle-timeout", "2.5")  # a busy machine holds up a ping for a second
    client = t.client(server, "--keepalive", "0.3")
    addr = server.connected()["addr"]
    time.sleep(6)  # nothing may happen meanwhile
    check(client.running(), "the client left")
    equal(client.out.text, "", "stdout of a client that only kept alive")
    other = t.client(server, stdin=b"stats\n").exits(0)
    check(re.search(f"^{re.escape(addr)}\\b", other.out.text, re.M), f"{addr} is not in stats")
    client.ask("ping", "pong")  # an answer that was asked for is shown
    client.ends()
    equal(client.out.text, "pong\n", "stdout")


@test
def vanished_server_is_noticed(t):
    def frozen(server):
        server.send_signal(signal.SIGSTOP)

    def killed(server):
        server.kill()

    for vanish in (frozen, killed):
        server = t.server()
        relay = t.relay(server)  # so that no ICMP tells
        client = t.client(relay, "--keepalive", "0.4")
        client.connected()
        vanish(server)
        began = time.monotonic()
        client.exits(1, timeout=4 * 0.4 + PROMPT)
        check(time.monotonic() - began > 4 * 0.4 - 0.5, f"gave up after {time.monotonic() - began:.1f} s already")
        client.err.wait(f"^{re.escape(relay.addr)} closed: ")


@test
def max_clients(t):
    server = t.server("--max-clients", "2")
    first, second = t.client(server), t.client(server)
    for client in (first, second):
        client.connected()
    one_too_many(t, server)
    for client in (first, second):
        client.ask("ping", "pong")
    first.ask("stats", "users: 2")
    second.ends()
    server.err.wait("closed: closed by the peer$")
    t.ping(server)
    first.ask("ping", "pong")


# ---- tests: a network that loses, cuts and forges --------------------------------------------------------------------


@test
def cut_connection_comes_back_by_resumption(t):
    server = t.server()
    relay = t.relay(server)
    term = t.term(relay, "--keepalive", "0.5")
    term.ask("ping", "pong")
    term.type("echo half a ")
    term.prompts("echo half a ")
    relay.blocked = True
    term.shows_like(r"closed: ")
    term.shows_like(r"reconnecting in 0\.5 s")
    relay.blocked = False
    equal(server.connected(nth=2)["kind"], "resumed session", "second handshake in the server's log")
    term.shows_like(r"connected: .*resumed session")
    term.prompts("echo half a ")
    term.type("line\r")
    term.shows("half a line")


@test
def restarted_client_on_its_old_port(t):
    server = t.server()
    relay = t.relay(server, one_port=True)
    t.client(relay).connected()
    addr = server.connected()["addr"]
    t.procs[-1].kill()
    began = time.monotonic()
    again = t.client(relay)
    again.connected()
    check(time.monotonic() - began < PROMPT, f"got in after {time.monotonic() - began:.1f} s only")
    server.err.wait_line(f"{addr} closed: replaced by a new association from the same address")
    equal(server.connected(nth=2)["addr"], addr, "address of the second association")
    again.ask("stats", "users: 1")
    again.ask("ping", "pong")


def restart_under_lines(t, through_relay, *options, silence=0.0):
    """Lines are sent all along, while the server is killed and, a second later, started again."""
    server = t.server()
    port = split_addr(server.addr)[1]
    client = t.client(t.relay(server) if through_relay else server, *options)
    client.connected()
    number = itertools.count()
    started = []

    def some(seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            client.send(f"echo {next(number)}")
            time.sleep(0.05)

    some(0.5)
    server.kill()
    some(1.0)
    t.server(port=port).err.wait("listening on ")
    began = time.monotonic()
    client.send(f"echo {next(number)}")
    client.err.wait(r" renewed: server, .*, full handshake$", timeout=silence + 2 + WAIT)
    took = time.monotonic() - began
    some(0.5)
    client.ends()
    equal([line for line in client.out.lines() if line], [str(n) for n in range(next(number))],
          "every line was answered, once, in order")
    print(f"# e2e: through_relay {through_relay}: renewed {took:.2f} s after the server was back (goal: within {silence + 1 if silence else 2:g} s)")
    check(took < silence + 2 + PROMPT, f"renewed after {took:.1f} s only")


@test
def restarted_server_gets_every_line(t):
    restart_under_lines(t, False, "--keepalive", "0")  # ICMP tells


@test
def restarted_server_without_icmp(t):
    restart_under_lines(t, True, "--keepalive", "1", silence=1.0)


@test
def restarted_server_without_icmp_and_keepalive(t):
    restart_under_lines(t, True, "--keepalive", "0", "--unanswered", "1", silence=1.0)


@test
def lines_that_may_be_lost_are_named(t):
    server = t.server()
    client = t.client(server, "--keepalive", "0")
    client.connected()
    client.ask("ping", "pong")
    server.kill()
    for line in ("echo two", "bc three", "ping", "bc five"):
        client.send(line)
    time.sleep(0.2)
    t.server(port=split_addr(server.addr)[1])
    client.err.wait(" renewed: ")
    client.err.wait_line("dtls: 2 of 5 lines had no answer: 3, 5")  # others would see them twice
    client.out.wait_line("two")
    client.out.wait_line("pong", 2)
    client.close_stdin()
    client.exits(1)


@test
def lines_of_a_lost_connection_are_named(t):
    server = t.server()
    client = t.client(t.relay(server), "--keepalive", "0.4")
    client.connected()
    client.ask("ping", "pong")
    server.kill()
    for line in ("echo two", "echo three"):
        client.send(line)
    client.exits(1, timeout=4 * 0.4 + PROMPT)
    client.err.wait_line("dtls: 2 of 3 lines had no answer: 2 to 3")


@test
def forged_client_hello_changes_nothing(t):
    server = t.server("-v")
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    client.ask("ping", "pong")
    first, second = [datagram.data for datagram in relay.handshake(to_server=True)][:2]
    check(len(second) > len(first), "no cookie in the second ClientHello")
    stranger = first[:27] + bytes(random.Random(2).choices(range(256), k=28)) + first[55:]  # another client's random
    for _ in range(20):
        for hello in (stranger, first, second):
            relay.forge(True, hello)
        client.ask("ping", "pong")
    client.ask("stats", "users: 1")
    equal(server.err.count("connected:"), 1, "connections in the server's log")
    equal(server.err.count("closed:"), 0, "connections closed in the server's log")


@test
def forged_datagrams_change_nothing(t):
    server = t.server()
    relay = t.relay(server)
    client = t.client(relay)
    client.connected()
    for data in FORGED:
        for to_server in (True, False):
            relay.forge(to_server, data)
        client.ask("ping", "pong", timeout=5)
    equal(server.err.count("closed:") + client.err.count("closed:"), 0, "connections closed")
    client.ends()


@test(slow=True)
def forged_datagrams_during_handshakes(t):
    """But no whole plaintext handshake message: DTLS 1.2 cannot tell a forged one from the peer's."""
    server = t.server()
    relay = t.relay(server)
    relay.to_server_first = relay.to_client_first = [data for data in FORGED if data != FORGED_DONE]
    for client in [t.client(relay) for _ in range(4)]:
        client.connected()
        client.ask("ping", "pong")
        client.ends()


@test(slow=True)
def twenty_handshakes_through_20_percent_loss(t):
    server = t.server()
    relay = t.relay(server)
    relay.loss = 0.2
    clients = [t.client(relay) for _ in range(20)]
    for client in clients:
        client.connected(timeout=35)


def check_sizes(relay, mtu):
    sizes = [len(datagram.data) for datagram in relay.handshake()]
    check(max(sizes) <= mtu - IP_UDP_BYTES, f"handshake datagrams at MTU {mtu}: {sizes}")


@test
def smallest_mtu(t):
    server = t.server("--mtu", "256")
    relay = t.relay(server)
    client = t.client(relay, "--mtu", "256")
    client.connected()
    check_sizes(relay, 256)
    client.ask("ping", "pong")
    client.ask("echo " + "x" * 1000, "x" * 1000)  # longer than the MTU: the IP layer's business


@test
def long_rsa_chain_at_several_mtus(t):
    authority = t.other_authority(newkey=["-newkey", "rsa:4096"], cn="RSA root")
    middle = authority.issue("middle", key=authority.key, ca=True)
    below = Authority(t.path("below"), middle.pem, middle.key)
    options = ["--ca", authority.pem]
    identities = {}
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        leaf = below.issue(name, usage=usage, key=authority.key)
        chain = t.path(f"{name}-chain.pem")
        pathlib.Path(chain).write_text(pathlib.Path(leaf.pem).read_text() + pathlib.Path(middle.pem).read_text())
        identities[name] = [*options, "--cert", chain, "--key", leaf.key]
    for mtu in (576, 1280, 1500):
        server = t.server("--mtu", mtu, *identities["server"])
        relay = t.relay(server)
        client = t.client(relay, "--mtu", mtu, *identities["client"])
        client.connected()
        client.ask("ping", "pong")
        check_sizes(relay, mtu)
        for to_server in (True, False):
            largest = max(len(datagram.data) for datagram in relay.handshake(to_server))
            check(largest > 0.9 * (mtu - IP_UDP_BYTES), f"datagrams at MTU {mtu} are small: {largest} at most")


@test(slow=True)
def mtu_black_hole(t):
    names = Authority.EVERYWHERE + "".join(f",DNS:host-number-{n}.example" for n in range(60))
    server = t.server(*t.authority().issue("server", usage="serverAuth", names=names).options)
    relay = t.relay(server)
    relay.limit = 600
    client = t.client(relay)
    client.connected(timeout=30)
    check(relay.did["lost"] > 0, "nothing was too large, the test proves nothing")
    client.ask("ping", "pong")


# ---- tests: the terminal ---------------------------------------------------------------------------------------------


def in_order(term, *wanted):
    """These whole lines are on the screen once each and in this order."""
    lines = term.screen.lines()
    for line in wanted:
        equal(lines.count(line), 1, f"times {line!r} on the screen")
    places = [lines.index(line) for line in wanted]
    equal(places, sorted(places), f"order of {wanted} on the screen")


@test
def terminal_message_while_typing(t):
    server = t.server()
    other = t.client(server)
    for kind in ("xterm", "vt100"):
        term = t.term(server, term=kind)
        term.type("echo unfini")
        term.prompts("echo unfini")
        other.send(f"bc news for {kind}")
        term.shows(f"news for {kind}")
        term.prompts("echo unfini")
        term.type("shed\r")
        term.shows("unfinished")
        term.prompts()
        in_order(term, f"news for {kind}", "> echo unfinished", "unfinished")
        equal(term.screen.lines().count("> echo unfini"), 0, "leftovers of the unfinished line")
        term.type("echo abcdef\x1b[D\x1b[D\x1b[D")  # the cursor between c and d
        term.prompts("echo abc", "def")
        other.send("bc more news")
        term.shows("more news")
        term.prompts("echo abc", "def")
        term.type("-X-\r")
        term.shows("abc-X-def")


@test
def terminal_messages_over_a_wrapped_line(t):
    server = t.server()
    other = t.client(server)
    term = t.term(server, cols=30, rows=12)
    text = "a long line with Grüße and 漢字 that needs more than two rows of this narrow terminal"
    shown = [line for line in term.screen.lines() if not line.startswith(">")]
    typed = "echo "
    term.type(typed)
    for n, word in enumerate(text.split(" ")):
        term.type(word + " ")
        typed += word + " "
        term.prompts(typed)
        if n % 3 == 0:
            shown.append(f"message {n} and a message that is itself longer than a row")
            other.send("bc " + shown[-1])
            term.shows(shown[-1])
            term.prompts(typed)
    term.type("\r")
    term.shows(text)
    term.prompts()
    rows = [row for line in [*shown, "> " + typed, text, ">"] for row in layout(line, 30)[0]]
    equal(term.screen.history(), rows, "the screen from the start")


@test
def terminal_edits_a_wrapped_line(t):
    server = t.server()
    term = t.term(server, cols=30)
    text = "some words that need more than one row, and then even a third one"
    term.type(text)
    term.prompts(text)
    term.type("\x01")
    before = ""
    for char in "echo really ":
        term.type(char)
        before += char
        term.prompts(before, text)
    for _ in range(7):
        term.type("\x7f")
        before = before[:-1]
        term.prompts(before, text)
    term.type("\r")
    term.shows(text)
    term.prompts()


@test
def terminal_resize(t):
    server = t.server()
    term = t.term(server)
    text = "a text that needs two rows when the window is narrow"
    term.type("echo " + text)
    term.prompts("echo " + text)
    for cols, rows in ((40, 24), (100, 30), (33, 10), (80, 24)):
        term.resize(cols, rows)
        term.prompts("echo " + text)
        term.type("\x01")  # ^A, ^E: to the start and back over every row, which needs to know their width
        term.prompts("", "echo " + text)
        term.type("\x05!")
        text += "!"
        term.prompts("echo " + text)
    term.type("\r")
    term.shows(text)
    term.prompts()


@test
def terminal_editing_and_history(t):
    server = t.server()
    term = t.term(server)
    term.ask("ping", "pong")
    term.ask("echo two", "two")
    term.type("\x1b[A\x1b[A")
    term.prompts("ping")
    term.type("\x1b[B")
    term.prompts("echo two")
    term.type("\x1b[A\r")
    term.shows("pong", 2)
    term.prompts()
    term.type("\x1bOA")  # the arrow key in application mode
    term.prompts("ping")
    term.type("\x15echo abc\x01")  # ^U empties, ^A goes to the start
    term.prompts("", "echo abc")
    term.type("\x05d\x7f\x7fX\r")  # ^E to the end; two characters rubbed out
    term.shows("abX")
    term.type("\r\recho behind empty lines\r")
    term.shows("behind empty lines")


@test
def terminal_paste(t):
    server = t.server()
    term = t.term(server)
    term.type("".join(f"echo pasted {n}\r" for n in range(200)))
    term.shows("pasted 199")
    term.see(lambda: sum(line.startswith("pasted ") for line in term.screen.lines()) >= 200, "200 answers")
    equal([line for line in term.screen.lines() if line.startswith("pasted ")], [f"pasted {n}" for n in range(200)],
          "answers to the pasted lines")
    term.prompts()
    term.type("\x1b[200~echo in brackets\x1b[201~\r")
    term.shows("in brackets")


@test
def terminal_input_in_pieces(t):
    server = t.server()
    term = t.term(server)
    term.ask("ping", "pong")
    for byte in "echo é漢\x1b[D!\r".encode():  # half characters and half keys arrive by themselves
        term.type(bytes([byte]))
        time.sleep(0.01)
    term.shows("é!漢")


# A shell with job control, in so far as that matters here: when the program stops, it says what the terminal is like,
# and any line brings the program to the foreground again.
JOBS_SHELL = """
import os, signal, sys, termios
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.execvp(sys.argv[1], sys.argv[1:])
while True:
    status = os.waitpid(job, os.WUNTRACED)[1]
    if not os.WIFSTOPPED(status):
        sys.exit(os.waitstatus_to_exitcode(status))
    os.tcsetpgrp(0, os.getpgrp())
    flags = termios.tcgetattr(0)[3]
    print("stopped,", "cooked" if flags & termios.ICANON and flags & termios.ECHO else "raw", end="\\n$ ", flush=True)
    sys.stdin.readline()
    os.tcsetpgrp(0, job)
    os.kill(job, signal.SIGCONT)
"""


@test
def terminal_stops_on_ctrl_z_and_comes_back(t):
    server = t.server()
    other = t.client(server)
    term = t.term(server, under=[sys.executable, "-c", JOBS_SHELL])
    for nth in (1, 2):
        term.type("echo half")
        term.prompts("echo half")
        term.type("\x1a")
        term.shows("stopped, cooked", nth)
        term.shows("$")
        other.send(f"bc while it is stopped {nth}")
        term.type("fg\r")
        term.shows(f"while it is stopped {nth}")
        term.prompts("echo half")
        term.type(f" and half {nth}\r")
        term.shows(f"half and half {nth}")
        term.prompts()
    term.type("\x04")
    term.exits(0)
    term.restored()


@test
def terminal_shows_control_characters_escaped(t):
    server = t.server()
    term = t.term(server)
    other = t.client(server)
    other.send(b"bc red \x1b[31m bell \x07 delete \x7f back \r end")
    line = term.shows_like("^red .* end$").group()
    check(line.startswith(r"red \x1b[31m bell \x07 delete \x7f back \x0d end")
          or line.startswith(r"red \x1b[31m bell \x07 delete \x7f back \r end"), f"shown as {line!r}")
    check(b"\x1b[31m" not in term.out.data and b"\x07" not in term.out.data, "a control character went to the terminal")


@test
def terminal_ends_on_ctrl_d_and_ctrl_c(t):
    server = t.server()
    for nth, key in enumerate("\x04\x03", 1):
        term = t.term(server)
        if key == "\x04":
            term.type("x\x04")  # not an empty line: not the end
            term.prompts("x")
            term.type("\x7f")
        else:
            term.type("echo never sent")
            term.prompts("echo never sent")
        term.type(key)
        term.exits(0, timeout=PROMPT)
        term.restored()
        server.err.wait("closed: closed by the peer$", nth, timeout=PROMPT)
    term = t.term(server)
    term.stop()
    term.restored()
    server.err.wait("closed: closed by the peer$", 3, timeout=PROMPT)


@test
def terminal_finds_a_restarted_server(t):
    server = t.server()
    term = t.term(server, "--keepalive", "0.5")
    term.type("echo survi")
    term.prompts("echo survi")
    server.stop()
    term.shows_like("closed: closed by the peer$", timeout=PROMPT)
    term.shows_like(r"reconnecting in 0\.5 s")
    port = split_addr(server.addr)[1]
    server = t.server(port=port)
    term.shows_like("connected: ", 2)
    term.prompts("echo survi")
    term.type("ved\r")
    term.shows("survived")
    server.kill()  # this one says no goodbye
    server = t.server(port=port)
    term.shows_like("renewed: ")
    term.ask("ping", "pong")
    server.stop()
    term.shows_like(r"reconnecting in ", 2)
    term.type("\x04")
    term.exits(0, timeout=PROMPT)
    term.restored()


@test(slow=True)
def terminal_backs_off(t):
    server = t.server()
    term = t.term(server)
    server.stop()
    waits = [float(term.shows_like(r"reconnecting in ([0-9.]+) s", nth).group(1)) for nth in (1, 2, 3)]
    check(waits[0] == 0.5 and waits == sorted(waits) and waits[2] > waits[0], f"waits of {waits} s")
    term.type("\x03")
    term.exits(0, timeout=PROMPT)


def dumb(t, **more):
    server = t.server()
    term = t.term(server, term="dumb", **more)
    term.ask("ping", "pong")
    other = t.client(server)
    other.send("bc to the dumb")
    term.shows("to the dumb")
    term.type("\x04")
    term.exits(0, timeout=PROMPT)
    term.restored()
    check(b"\x1b" not in term.out.data, "escape sequences on a dumb terminal")


@test
def dumb_terminal(t):
    dumb(t)


# macOS cannot watch it, whatever terminal it stands for.
FROM_DEV_TTY = ["sh", "-c", 'exec "$@" </dev/tty', "sh"]


@test
def dev_tty_as_input(t):
    server = t.server()
    term = t.term(server, under=FROM_DEV_TTY)
    term.ask("ping", "pong")
    term.prompts()
    term.type("\x04")
    term.exits(0, timeout=PROMPT)
    term.restored()


@test
def dev_tty_as_input_of_a_dumb_terminal(t):
    dumb(t, under=FROM_DEV_TTY)


# ---- tests: who is let in --------------------------------------------------------------------------------------------

OTHER_NAME = "certificate refused: [Hh]ostname mismatch: \\S+ was wanted, the certificate has DNS:.*$"
UNKNOWN_ISSUER = (r"certificate refused: (self.signed certificate( in certificate chain)?|"
                  r"unable to get local issuer certificate|unable to verify the first certificate)$")


def refused(t, refusing, reason, other, alert):
    """One side says why it refused the certificate, the other that it was refused."""
    refusing.err.wait(f"handshake failed: {reason}")
    other.err.wait(f"handshake failed: refused by the peer: {alert}")
    for side in (refusing, other):
        equal(side.err.count("connected:"), 0, f"connections of {side.title}")


@test
def client_from_another_ca_is_refused(t):
    server = t.server()
    stranger = t.other_authority().issue("stranger")
    client = t.client(server, *stranger.options, stdin=b"ping\n")
    refused(t, server, UNKNOWN_ISSUER, client, "unknown CA")
    client.exits(1, timeout=4 + PROMPT)
    equal(client.out.text, "", "stdout")
    t.ping(server)


@test
def server_from_another_ca_is_refused(t):
    other = t.other_authority()
    server = t.server(*other.issue("impostor", usage="serverAuth").options)
    client = t.client(server, stdin=b"ping\n")
    refused(t, client, UNKNOWN_ISSUER, server, "unknown CA")
    client.exits(1, timeout=PROMPT)
    equal(client.out.text, "", "stdout")


@test
def server_with_another_name_is_refused(t):
    need_second_loopback()
    server = t.server(at=["127.0.0.2"])
    client = t.client(server, stdin=b"ping\n")
    refused(t, client, "certificate refused: IP address mismatch: 127.0.0.2 was wanted, the certificate has DNS:.*$", server,
            ".+")
    client.exits(1, timeout=PROMPT)
    client = t.client(server, "--name", "other.example", stdin=b"ping\n")
    refused(t, client, OTHER_NAME, server, ".+")
    client.exits(1, timeout=PROMPT)
    t.ping(server, "--name", "localhost")
    t.ping(server, "--name", "127.0.0.1")


@test
def foreign_client_with_a_bad_certificate_is_refused(t):
    authority = t.authority()
    server = t.server()
    for identity, reason in ((None, "certificate refused: peer sent no certificate$"),
                             (authority.expired("old"), "certificate refused: certificate has expired$"),
                             (server_identity(), "certificate refused: uns(upport|uit)(ed|able) certificate purpose$"),
                             (Authority(t.path("third")).issue("stranger"), UNKNOWN_ISSUER)):
        client = t.s_client(server, identity=identity)
        server.err.wait(f"handshake failed: {reason}")
        client.reap(WAIT)
    equal(server.err.count("connected:"), 0, "connections")
    t.ping(server)


@test
def foreign_server_with_a_bad_certificate_is_refused(t):
    authority = t.authority()
    for identity, reason in ((authority.expired("old", usage="serverAuth"), "certificate has expired$"),
                             (client_identity(), "uns(upport|uit)(ed|able) certificate purpose$"),
                             (authority.issue("elsewhere", usage="serverAuth", names="IP:192.0.2.1"),
                              "IP address mismatch: 127.0.0.1 was wanted, the certificate has IP:192.0.2.1$")):
        server = t.s_server(identity=identity)
        client = t.client(server, stdin=b"ping\n").exits(1, timeout=PROMPT + 1)
        client.err.wait(f"handshake failed: certificate refused: {reason}")
        equal(client.out.text, "", "stdout")


@test
def common_name_cannot_forge_the_log(t):
    server = t.server()
    evil = t.authority().issue("evil", cn="evil\x1b[31m")
    client = t.client(server, *evil.options)
    client.connected()
    name = server.connected()["name"]
    check(name.startswith("evil") and "\x1b" not in name, f"logged as {name!r}")
    client.send("stats")
    client.out.wait(r"^127.*evil")
    check("\x1b" not in client.out.text, "escape character in stats")


# ---- tests: foreign implementations ----------------------------------------------------------------------------------


@test
def s_client_as_foreign_client(t):
    server = t.server()
    client = t.s_client(server, "-verify_return_error", "-verify_ip", "127.0.0.1", identity=client_identity())
    addr = server.connected()["addr"]
    equal(server.connected()["name"], "client", "certificate name")
    client.out.wait(f"hello, {re.escape(addr)}", partial=True)
    for line, answer in (("ping", "pong"), ("echo foreign words", "foreign words"), ("whoami", re.escape(addr)),
                         ("bc to all", "to all"), ("what", re.escape(COMMANDS))):
        before = client.out.count(answer)
        client.send(line)
        client.out.wait(answer, nth=before + 1, partial=True)
    client.send("Q")
    server.err.wait_line(f"{addr} closed: closed by the peer")


@test
def s_client_with_crlf_and_resumption(t):
    server = t.server()
    session = t.path("session")
    client = t.s_client(server, "-crlf", "-sess_out", session, identity=client_identity())
    server.connected()
    client.send("ping")
    client.out.wait("pong", partial=True)
    client.send("Q")
    client.reap(WAIT)
    client = t.s_client(server, "-sess_in", session, identity=client_identity())
    again = server.connected(nth=2)
    equal(again["kind"], "resumed session", "second handshake")
    equal(again["name"], "client", "certificate name of a resumed session")
    client.send("ping")
    client.out.wait("pong", partial=True)


@test
def s_client_with_other_ciphers(t):
    server = t.server()
    for cipher, works in (("ECDHE-ECDSA-AES128-GCM-SHA256", True), ("ECDHE-ECDSA-CHACHA20-POLY1305", True),
                          ("ECDHE-ECDSA-AES256-SHA384", False), ("ECDHE-ECDSA-AES128-SHA", False)):
        client = t.s_client(server, "-cipher", cipher, identity=client_identity())
        if works:
            server.err.wait(f"connected: client, {cipher}, full handshake$")
        else:
            client.reap(WAIT)  # refused
    equal(server.err.count("connected:"), 2, "connections")


@test
def s_client_cannot_renegotiate(t):
    server = t.server()
    client = t.s_client(server, identity=client_identity())
    server.connected()
    other = t.client(server)
    other.connected()
    client.send("R")
    client.err.wait("RENEGOTIATING")
    client.reap(WAIT)  # that tool gives up when it is told no
    other.ask("ping", "pong")
    equal(server.err.count("connected:"), 2, "connections")


@test
def s_server_as_foreign_server(t):
    server = t.s_server(identity=server_identity())
    client = t.client(server)
    client.connected()
    client.send("a line for the foreign server")
    server.out.wait("a line for the foreign server", partial=True)
    server.send("the foreign answer")
    client.out.wait_line("the foreign answer")
    client.ends()
    check(set(client.out.lines()) <= {"the foreign answer", ""}, f"stdout: {client.out.lines()}")


# ---- tests: certificates ---------------------------------------------------------------------------------------------


def described(pem):
    return openssl("x509", "-in", pem, "-noout", "-text")


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@test
def certificates_are_made_properly(t):
    folder = pathlib.Path(t.path("certs"))
    certs_sh(folder, "all")
    serials = set()
    for name, parts in (
            ("ca", ["CA:TRUE", "Certificate Sign", "X509v3 Subject Key Identifier"]),
            ("server", ["CA:FALSE", "Digital Signature", "TLS Web Server Authentication", "DNS:localhost",
                        "IP Address:127.0.0.1", "IP Address:0:0:0:0:0:0:0:1", "X509v3 Subject Key Identifier",
                        "X509v3 Authority Key Identifier"]),
            ("client", ["CA:FALSE", "Digital Signature", "TLS Web Client Authentication",
                        "X509v3 Subject Key Identifier", "X509v3 Authority Key Identifier"])):
        text = described(folder / f"{name}.pem")
        missing = [part for part in ["Version: 3", "prime256v1", "X509v3 Basic Constraints: critical",
                                     "X509v3 Key Usage: critical", *parts] if part not in text]
        check(not missing, f"{name}.pem has no {missing}")
        equal(oct(mode_of(folder / f"{name}.key")), "0o600", f"mode of {name}.key")
        serials.add(int(openssl("x509", "-in", folder / f"{name}.pem", "-noout", "-serial").strip().split("=")[1], 16))
    check("Client Auth" not in described(folder / "server.pem"), "server.pem is good for clients too")
    check("Server Auth" not in described(folder / "client.pem"), "client.pem is good for servers too")
    check(len(serials) == 3 and min(serials) > 1 << 56, f"serials are not random: {serials}")
    for name, purpose in (("server", "sslserver"), ("client", "sslclient")):
        openssl("verify", "-CAfile", folder / "ca.pem", "-purpose", purpose, folder / f"{name}.pem")
    server = t.server(certs=folder)
    t.ping(server, certs=folder)


@test
def certificates_one_more_client(t):
    folder = pathlib.Path(t.path("certs"))
    certs_sh(folder, "all")
    ca = (folder / "ca.pem").read_bytes()
    certs_sh(folder, "client", "alice")
    certs_sh(folder, "all")  # again: what is there stays
    equal((folder / "ca.pem").read_bytes() == ca, True, "the CA is the same afterwards")
    equal(oct(mode_of(folder / "alice.key")), "0o600", "mode of alice.key")
    openssl("verify", "-CAfile", folder / "ca.pem", "-purpose", "sslclient", folder / "alice.pem")
    server = t.server(certs=folder)
    t.ping(server, *Identity(str(folder / "alice.pem"), str(folder / "alice.key")).options, certs=folder)
    equal(server.connected()["name"], "alice", "certificate name in the server's log")
    for name in ("../outside", "", "a/b", "-x"):
        check(certs_sh(folder, "client", name, wanted=None) != 0, f"client {name!r} was accepted")
    check(not os.path.exists(t.path("outside.pem")), "wrote outside its folder")


@test
def certificates_deleted_and_nothing_else(t):
    folder = pathlib.Path(t.path("certs"))
    certs_sh(folder, "all")
    certs_sh(folder, "client", "alice")
    foreign = {"notes.txt": "mine", "mine.pem": "my certificate", "mine.key": "my key"}
    for name, text in foreign.items():
        (folder / name).write_text(text)
    certs_sh(folder, "delete")
    left = {path.name: path.read_text() for path in folder.iterdir()}
    equal(left, foreign, "files left after delete")
    certs_sh(folder, "delete")  # nothing to do is fine
    certs_sh(folder, "all")


def certs_says(folder, *words, status=0, command=("sh", "certs/certs.sh"), **env):
    """What certs.sh, or make instead, writes to stdout and stderr; status None: any but 0."""
    done = subprocess.run([*command, *words], cwd=ROOT, env={**os.environ, "CERTS_DIR": str(folder), **env},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
    said = done.stdout.decode() + done.stderr.decode()
    check(done.returncode == status if status is not None else done.returncode,
          f"status {done.returncode} of {' '.join([*command, *words])}, which says {said[-300:]!r}")
    return done.stdout.decode(), done.stderr.decode()


def certs_refuses(folder, *words, status, says):
    """One line that has all these texts, and a folder that is the same afterwards."""
    before = contents(folder)
    out, err = certs_says(folder, *words, status=status)
    what = f"certs.sh {' '.join(words)}"
    equal(out, "", f"stdout of {what}")
    check(err.startswith("certs.sh: ") and err.count("\n") == 1, f"stderr of {what}: not one line: {err!r}")
    missing = [text for text in says if text not in err]
    check(not missing, f"stderr of {what} has no {missing}: {err!r}")
    check(contents(folder) == before, f"{what} changed the folder")


def contents(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


def alt_names(pem):
    return re.search(r"X509v3 Subject Alternative Name:[^\n]*\n *([^\n]*)", described(pem))[1].split(", ")


class List:
    """What a crl.pem says."""

    def __init__(self, pem):
        text = openssl("crl", "-in", pem, "-noout", "-text")
        self.number = int(re.search(r"X509v3 CRL Number:\s+(\w+)", text)[1], 0)
        self.serials = re.findall(r"Serial Number: (\w+)", text)
        self.reasons = re.findall(r"X509v3 CRL Reason Code:\s+(\w+)", text)
        self.begin, self.end = (ssl.cert_time_to_seconds(re.search(f"{what} Update: (.*)", text)[1].strip())
                                for what in ("Last", "Next"))


def serial_of(pem):
    return openssl("x509", "-in", pem, "-noout", "-serial").strip().split("=")[1]


def revoked(folder, *names):
    """Those of these that openssl takes for revoked; it must take the others for good."""
    found = []
    for name in names:
        done = subprocess.run([OPENSSL, "verify", "-crl_check", "-CAfile", folder / "ca.pem",
                               "-CRLfile", folder / "crl.pem", folder / f"{name}.pem"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30)
        if b"certificate revoked" in done.stdout:
            found.append(name)
        else:
            equal(done.returncode, 0, f"status of verifying {name}.pem, which says {done.stdout!r}")
    return found


@test
def certificates_one_more_server(t):
    folder = pathlib.Path(t.path("certs"))
    certs_says(folder, "server", "gateway", "DNS:gw.example.org,IP:192.0.2.7,IP:2001:db8::7,DNS:*.gw.example.org")
    certs_sh(folder, "all")  # there is a CA already
    made = contents(folder)
    pem = folder / "gateway.pem"
    equal(alt_names(pem), ["DNS:gw.example.org", "IP Address:192.0.2.7", "IP Address:2001:DB8:0:0:0:0:0:7",
                           "DNS:*.gw.example.org"], "names in gateway.pem")
    check("CA:FALSE" in described(pem) and "Client Auth" not in described(pem), "gateway.pem is good for too much")
    openssl("verify", "-CAfile", folder / "ca.pem", "-purpose", "sslserver", pem)
    equal(oct(mode_of(folder / "gateway.key")), "0o600", "mode of gateway.key")
    server = t.server("--cert", pem, "--key", folder / "gateway.key", certs=folder)
    for name in ("gw.example.org", "192.0.2.7", "a.gw.example.org"):
        t.ping(server, "--name", name, certs=folder)
    t.client(server, "--name", "localhost", certs=folder, stdin=subprocess.DEVNULL).exits(1)
    certs_refuses(folder, "server", "gateway", "DNS:other.example.org", status=1, says=["gateway.key exists"])

    for name in ("gw2", "gw3.example.org"):
        certs_sh(folder, "server", name)
        equal(alt_names(folder / f"{name}.pem"), [f"DNS:{name}"], f"names in {name}.pem")
    for address, wanted in (("::", "0:0:0:0:0:0:0:0"), ("1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8"),
                            ("1:2:3:4:5:6:7::", "1:2:3:4:5:6:7:0"), ("::ffff:192.0.2.7", "0:0:0:0:0:FFFF:C000:207"),
                            ("1:2:3:4:5:6:192.0.2.7", "1:2:3:4:5:6:C000:207"), ("fe80::1", "FE80:0:0:0:0:0:0:1")):
        certs_sh(folder, "server", "v6", f"IP:{address}")
        equal(alt_names(folder / "v6.pem"), [f"IP Address:{wanted}"], f"names for {address}")
        (folder / "v6.pem").unlink()
        (folder / "v6.key").unlink()
    check(all(contents(folder)[name] == text for name, text in made.items() if name != ".built"), "a certificate changed")


@test
def certificates_servers_refused(t):
    folder = pathlib.Path(t.path("certs"))
    long = ".".join(["a" * 63] * 4)
    for name in ("", "../outside", "a/b", "-x", ".x", "a b", "ca", "crl", "server", "client", "n" * 65):
        certs_refuses(folder, "server", name, "DNS:a.example.org", status=2, says=["NAME "])
    for name in ("a_b", "7", "a-", "a..b", "192.0.2.7", "a" * 64):
        certs_refuses(folder, "server", name, status=2, says=[name, "SAN=DNS:"])
    for entry in ("DNS:", "DNS:a_b", "DNS:a..b", "DNS:-a", "DNS:a-.b", "DNS:a.", "DNS:192.0.2.7", "DNS:*", "DNS:*.org",
                  "DNS:a.*.org", "DNS:" + "a" * 64, f"DNS:{long}", "dns:a", "a.example.org", "email:a@example.org",
                  "otherName:1.2.3", "IP:", "IP:192.0.2", "IP:192.0.2.256", "IP:192.0.2.07", "IP:192.0.2.7/24",
                  "IP:192.0.2.7.1", "IP::1", "IP:1::2::3", "IP::::", "IP:12345::", "IP:1:2:3:4:5:6:7",
                  "IP:1:2:3:4:5:6:7:8:9", "IP:1::2:3:4:5:6:7:8", "IP:fe80::1%eth0", "IP:g::", "IP:::192.0.2",
                  "IP:a.example.org", " DNS:a"):
        for names in (entry, f"DNS:a.example.org,{entry}"):
            certs_refuses(folder, "server", "gateway", names, status=2, says=[f"'{entry}'", "SAN=DNS:"])
    for names in (",", "DNS:a,", ",DNS:a", "DNS:a,,DNS:b", "DNS:a\nDNS:b", "DNS:a\n", "DNS:a\\nb", "DNS:\u00fc",
                  "DNS:$HOME"):
        certs_refuses(folder, "server", "gateway", names, status=2, says=["SAN=DNS:"])
    check(not folder.exists(), "a refused certificate has left a folder")
    check("usage:" in certs_says(folder, "server", status=2)[1], "server without a name: no usage")


@test
def certificates_revoked(t):
    folder = pathlib.Path(t.path("certs"))
    certs_sh(folder, "all")
    for name in ("alice", "bob"):
        certs_sh(folder, "client", name)
    made = contents(folder)
    names = ("alice", "bob", "client", "server")

    out, _ = certs_says(folder, "revoke", "alice")
    check("revoked" in out and "alice.pem" in out and "crl.pem" in out, f"revoke says {out!r}")
    equal(revoked(folder, *names), ["alice"], "revoked")
    first = List(folder / "crl.pem")
    equal((first.serials, first.reasons), ([serial_of(folder / "alice.pem")], ["Superseded"]), "entries of crl.pem")
    equal((first.end - first.begin) / 86400, 825, "days until the next update")
    check(abs(first.begin - time.time()) < 600, "the last update is not now")

    before = contents(folder)
    out, _ = certs_says(folder, "revoke", "alice")
    check("revoked already" in out, f"revoking twice says {out!r}")
    check(contents(folder) == before, "revoking twice changed something")

    certs_says(folder, "revoke", "bob", CERTS_DAYS="30")
    equal(revoked(folder, *names), ["alice", "bob"], "revoked")
    second = List(folder / "crl.pem")
    check(second.number > first.number, f"CRL numbers: {first.number}, then {second.number}")
    equal((second.end - second.begin) / 86400, 30, "days until the next update")
    certs_sh(folder, "all")
    certs_sh(folder, "crl")
    third = List(folder / "crl.pem")
    check(third.number > second.number, f"CRL numbers: {second.number}, then {third.number}")
    equal(third.serials, second.serials, "revoked after writing crl.pem anew")
    check(all(contents(folder)[name] == text for name, text in made.items() if name != ".built"), "a certificate changed")
    equal({oct(mode_of(folder / name)) for name in (".revoked", ".built", "alice.key")}, {"0o600"}, "modes")
    equal(oct(mode_of(folder / "crl.pem")), "0o644", "mode of crl.pem")

    # A new certificate for the same name is good, and can be revoked as well.
    for part in ("pem", "key"):
        (folder / f"alice.{part}").unlink()
    certs_sh(folder, "client", "alice")
    equal(revoked(folder, *names), ["bob"], "revoked")
    server = t.server("--crl", folder / "crl.pem", certs=folder)
    t.ping(server, *Identity(str(folder / "alice.pem"), str(folder / "alice.key")).options, certs=folder)
    bob = t.client(server, *Identity(str(folder / "bob.pem"), str(folder / "bob.key")).options, certs=folder,
                   stdin=subprocess.DEVNULL)
    bob.exits(1)
    certs_sh(folder, "revoke", "alice")
    equal(revoked(folder, *names), ["alice", "bob"], "revoked")
    equal(len(List(folder / "crl.pem").serials), 3, "revoked in all")

    # One that has expired, one that was put there by hand, and a server.
    authority = Authority(t.path("authority"), folder / "ca.pem", folder / "ca.key")
    shutil.copy(authority.expired("old").pem, folder / "old.pem")
    certs_sh(folder, "revoke", "old")
    certs_sh(folder, "revoke", "server")
    late = {serial_of(folder / f"{name}.pem") for name in ("old", "server")}
    check(late < set(List(folder / "crl.pem").serials), "an expired certificate or a server's is not in crl.pem")

    (folder / "old.pem").unlink()
    certs_sh(folder, "delete")
    equal(contents(folder), {}, "files left after delete")


@test
def certificates_revocation_list_alone(t):
    folder = pathlib.Path(t.path("certs"))
    for words in (("crl",), ("revoke", "alice"), ("show",)):
        certs_refuses(folder, *words, status=1, says=[str(folder), "make certs"])
    check(not folder.exists(), "a refused command has left a folder")
    certs_sh(folder, "all")
    certs_sh(folder, "crl")
    equal(revoked(folder, "client", "server"), [], "revoked")
    equal(List(folder / "crl.pem").serials, [], "entries of crl.pem")
    t.ping(t.server("--crl", folder / "crl.pem", certs=folder), "--crl", folder / "crl.pem", certs=folder)
    (folder / "crl.pem").unlink()
    certs_sh(folder, "crl")
    equal(List(folder / "crl.pem").number, 2, "CRL number of the second list")
    certs_sh(folder, "delete")
    equal(contents(folder), {}, "files left after delete")


@test
def certificates_not_revoked(t):
    folder = pathlib.Path(t.path("certs"))
    certs_sh(folder, "all")
    certs_sh(folder, "client", "alice")
    shutil.copy(t.other_authority().issue("foreign").pem, folder / "foreign.pem")
    (folder / "text.pem").write_text("no certificate")
    for name in ("", "../outside", "a/b", "-x", "ca", "crl"):
        certs_refuses(folder, "revoke", name, status=2, says=["NAME "])
    for name, says in (("nobody", ["nobody.pem is missing", "make show-certs"]),
                       ("foreign", ["foreign.pem is not signed by", "ca.pem"]), ("text", ["text.pem is no certificate"])):
        certs_refuses(folder, "revoke", name, status=1, says=says)
    # Not even when the system trusts its CA.
    trusted = pathlib.Path(t.path("trusted"))
    trusted.mkdir()
    ca = t.path("other") + "/ca.pem"
    shutil.copy(ca, trusted / (openssl("x509", "-in", ca, "-noout", "-subject_hash").strip() + ".0"))
    certs_says(folder, "revoke", "foreign", status=1, SSL_CERT_DIR=str(trusted), SSL_CERT_FILE=ca)
    for days in ("0", "x", "-1"):
        certs_says(folder, "crl", status=2, CERTS_DAYS=days)
    os.mkdir(folder / ".building")
    certs_refuses(folder, "revoke", "alice", status=1, says=["another run is at work", f"rm -r {folder}/.building"])
    os.rmdir(folder / ".building")

    # A list that was put there by hand is not overwritten, and one that was changed has become such a list.
    certs_sh(folder, "crl")
    with open(folder / "crl.pem", "a") as file:
        file.write("changed\n")
    for words in (("revoke", "alice"), ("crl",)):
        certs_refuses(folder, *words, status=1, says=["crl.pem is not the one that was built", "move it away"])
    check("kept" in certs_says(folder, "delete")[0], "delete does not say what it kept")
    equal(sorted(contents(folder)), ["crl.pem", "foreign.pem", "text.pem"], "files left after delete")

    (folder / "crl.pem").unlink()
    certs_sh(folder, "all")
    key = (folder / "ca.key").read_bytes()
    (folder / "ca.key").write_bytes((folder / "client.key").read_bytes())
    certs_refuses(folder, "revoke", "client", status=1, says=["ca.key is not the key of", "put the right one back"])
    (folder / "ca.key").unlink()
    certs_refuses(folder, "revoke", "client", status=1, says=["ca.key is missing"])
    (folder / "ca.key").write_bytes(key)
    certs_sh(folder, "revoke", "client")


@test
def certificates_shown(t):
    folder = pathlib.Path(t.path("certs"))
    folder.mkdir()
    check("make certs" in certs_says(folder, "show")[0], "an empty folder: not what to do")
    certs_sh(folder, "all")
    certs_sh(folder, "server", "gateway", "DNS:gw.example.org,IP:192.0.2.7")
    certs_says(folder, "client", "alice", CERTS_DAYS="10")
    certs_sh(folder, "psk", "sensor-1")
    authority = Authority(t.path("authority"), folder / "ca.pem", folder / "ca.key")
    shutil.copy(authority.expired("old", cn="J\u00f6rg = an old one").pem, folder / "old.crt")
    (folder / "notes.txt").write_text("no certificate")
    (folder / "bytes.bin").write_bytes(bytes(range(256)))
    os.mkdir(folder / "folder.pem")
    before = contents(folder)
    out, err = certs_says(folder, "show")
    check(contents(folder) == before, "show changed the folder")
    equal(err, "", "stderr of show")
    lines = out.splitlines()
    serials = {path.name: serial_of(path) for path in folder.iterdir()
               if path.is_file() and path.suffix in (".pem", ".crt")}
    equal([line.split()[0] for line in lines], ["file", *sorted(serials)], "first column")
    table = {line.split()[0]: re.split(" {2,}", line.strip()) for line in lines[1:]}
    for name, row in table.items():
        equal(row[3], serials[name], f"serial of {name}")
        end = ssl.cert_time_to_seconds(openssl("x509", "-in", folder / name, "-noout", "-enddate").strip().split("=")[1])
        equal(row[4], time.strftime("%Y-%m-%d", time.gmtime(end)), f"end of {name}")
        left = end - time.time()
        check(left // 86400 <= int(row[5]) <= (left + 60) // 86400, f"days left of {name}: {row[5]}")
        equal(row[6:], [], f"marks of {name}")
    equal(table["gateway.pem"][1:3], ["gateway", "DNS:gw.example.org,IP:192.0.2.7"], "names of gateway.pem")
    equal(table["server.pem"][2], "DNS:localhost,IP:127.0.0.1,IP:0:0:0:0:0:0:0:1", "names of server.pem")
    check(table["ca.pem"][1].startswith("dtls.c test CA ") and table["ca.pem"][2] == "-", f"ca.pem: {table['ca.pem']}")
    check(table["alice.pem"][5] in ("10", "9"), f"days left of a certificate for 10 days: {table['alice.pem'][5]}")
    equal(table["old.crt"][1], "J\\C3\\B6rg = an old one", "name in old.crt")
    check(int(table["old.crt"][5]) < -365, f"days left of an expired certificate: {table['old.crt'][5]}")
    check(len({line.find(table[line.split()[0]][3]) for line in lines[1:]}) == 1, "columns that are not aligned")

    certs_sh(folder, "revoke", "alice")
    certs_sh(folder, "revoke", "client")
    out, _ = certs_says(folder, "show")
    marked = [line.split()[0] for line in out.splitlines() if line.endswith("  revoked")]
    equal(marked, ["alice.pem", "client.pem"], "marked as revoked")
    made = List(folder / "crl.pem")
    dates = [time.strftime("%Y-%m-%d", time.gmtime(when)) for when in (made.begin, made.end)]
    line = next(line for line in out.splitlines() if line.startswith("crl.pem: "))
    check(all(word in line for word in ("2 revoked", *dates)), f"of crl.pem: {line}")
    check(line.split()[-1] in ("824", "825"), f"days left of crl.pem: {line}")
    check("not of ca.pem" not in line, f"of crl.pem: {line}")

    # What cannot be read is told, and the rest is shown all the same.
    (folder / "damaged.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (folder / "dangling.pem").symlink_to("nowhere")
    again, err = certs_says(folder, "show", status=1)
    equal(again.splitlines()[0], out.splitlines()[0], "the table beside files that cannot be read")
    check(all(text in err for text in ("damaged.pem is damaged", "dangling.pem cannot be read")), f"told: {err!r}")
    equal(err.count("\n"), 2, "lines on stderr")
    (folder / "ca.pem").unlink()
    (folder / "ca.key").unlink()
    certs_sh(folder, "all")
    out, _ = certs_says(folder, "show", status=1)
    line = next(line for line in out.splitlines() if line.startswith("crl.pem: "))
    check("not of ca.pem" in line, f"of the crl.pem of another CA: {line}")


def keys_in(folder):
    return (folder / "psk.txt").read_text().splitlines()


@test
def certificates_tool_makes_pre_shared_keys(t):
    folder = pathlib.Path(t.path("certs"))
    out, _ = certs_says(folder, "psk", "sensor-1")
    key = keys_in(folder)[0]
    check(re.fullmatch("sensor-1:[0-9a-f]{64}", key), f"psk.txt: {key!r}")
    equal(oct(mode_of(folder / "psk.txt")), "0o600", "mode of psk.txt")
    equal(out.splitlines()[1:], [f"./dtls server --psk-file {folder}/psk.txt ADDR", f"./dtls client --psk {key} ADDR"],
          "how to use it")
    longest = "n" * 127
    for name in ("a.b_C@d", "Sensor-1", "ensor-1", "1e3", "1000", longest):
        certs_sh(folder, "psk", name)
    keys = keys_in(folder)
    equal([line.split(":")[0] for line in keys], ["sensor-1", "a.b_C@d", "Sensor-1", "ensor-1", "1e3", "1000", longest],
          "identities")
    equal(len({line.split(":")[1] for line in keys}), 7, "different keys")
    server = t.server("--psk-file", folder / "psk.txt")
    for line in (keys[0], keys[-1]):
        t.ping(server, "--psk", line, certs=folder)

    certs_refuses(folder, "psk", "sensor-1", status=1, says=["psk.txt has a key for sensor-1 already", "delete its line"])
    for name in ("", "a b", "a:b", "a/b", "#a", "a\n", "a\nb", "\u00fc", "*", "n" * 128):
        certs_refuses(folder, "psk", name, status=2, says=["NAME "])
    check("usage:" in certs_says(folder, "psk", status=2)[1], "psk without a name: no usage")

    # What was added by hand stays, and a last line without its end is not glued to the next one.
    with open(folder / "psk.txt", "a") as file:
        file.write("# by hand\n\nhand:00ff\n#commented:00\ncolon:ed:00")
    os.chmod(folder / "psk.txt", 0o644)
    certs_refuses(folder, "psk", "hand", status=1, says=["delete its line"])
    certs_sh(folder, "psk", "ed")
    certs_sh(folder, "psk", "commented")
    equal(keys_in(folder)[:-2], [*keys, "# by hand", "", "hand:00ff", "#commented:00", "colon:ed:00"], "psk.txt")
    equal(oct(mode_of(folder / "psk.txt")), "0o600", "mode of psk.txt")
    before = contents(folder)["psk.txt"]
    check("kept" in certs_says(folder, "delete")[0], "delete does not say what it kept")
    equal(contents(folder), {"psk.txt": before}, "files left after delete")
    certs_sh(folder, "delete")
    equal(contents(folder), {"psk.txt": before}, "files left after another delete")
    certs_sh(folder, "psk", "late")
    certs_sh(folder, "delete")
    check(contents(folder)["psk.txt"].startswith(before), "delete took keys that were there before")

    # Without a line of somebody else's it goes, also when one of its own was deleted.
    (folder / "psk.txt").unlink()
    for name in ("one", "two", "three"):
        certs_sh(folder, "psk", name)
    (folder / "psk.txt").write_text("".join(f"{line}\n" for line in keys_in(folder) if not line.startswith("two:")))
    certs_sh(folder, "psk", "two")
    certs_sh(folder, "delete")
    equal(contents(folder), {}, "files left after delete")
    (folder / "psk.txt").symlink_to("elsewhere")
    certs_refuses(folder, "psk", "one", status=1, says=["psk.txt is no file that can be read", "move it away"])


@test
def certificates_through_make(t):
    makes = [make for make in ("make", "gmake", "bmake") if shutil.which(make)]
    if not makes:
        raise Skip("no make here")
    for make in makes:
        folder = pathlib.Path(t.path(f"of {make}"))

        def run(target, *words, status=0):
            return certs_says(folder, target, *words, status=status, command=(make, "-s"))

        for target in ("client-cert", "server-cert", "revoke", "psk"):
            check(f"usage: make {target} NAME=" in run(target, "NAME=", status=None)[1],
                  f"{make} {target} without NAME: no usage")
        check(not folder.exists(), "a usage error has left a folder")
        run("certs")
        run("client-cert", "NAME=alice")
        run("server-cert", "NAME=gateway", "SAN=DNS:gw.example.org,IP:192.0.2.7")
        run("server-cert", "NAME=gw2")
        equal(alt_names(folder / "gateway.pem"), ["DNS:gw.example.org", "IP Address:192.0.2.7"], "names in gateway.pem")
        equal(alt_names(folder / "gw2.pem"), ["DNS:gw2"], "names in gw2.pem")
        run("crl")
        equal(revoked(folder, "alice", "client"), [], f"revoked by {make} crl")
        run("revoke", "NAME=alice")
        equal(revoked(folder, "alice", "client"), ["alice"], f"revoked by {make} revoke")
        check(re.search("^alice.pem .* revoked$", run("show-certs")[0], re.M), f"{make} show-certs does not mark alice.pem")
        run("psk", "NAME=sensor-1")
        equal(len(keys_in(folder)), 1, f"keys after {make} psk")
        run("delete-certs")
        equal(contents(folder), {}, f"files left after {make} delete-certs")


@test
def certificates_stay_out_of_git(t):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        raise Skip("no git repository here")
    for name in ("ca.pem", "ca.key", "gateway.key", "crl.pem", "psk.txt", ".built", ".revoked", ".crlnumber",
                 ".building/key"):
        done = subprocess.run(["git", "check-ignore", "-q", f"certs/{name}"], cwd=ROOT)
        equal(done.returncode, 0, f"status of git check-ignore certs/{name}")


@test
def no_private_key_in_git(t):
    if not shutil.which("git") or not (ROOT / ".git").exists():
        raise Skip("no git repository here")
    found = subprocess.run(["git", "grep", "-lE", "-e", "-----BEGIN [A-Z ]*PRIVATE KEY-----"], cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    equal(found, "", "tracked files with a private key")


if __name__ == "__main__":
    sys.exit(main())
