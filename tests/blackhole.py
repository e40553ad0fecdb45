#!/usr/bin/env python3
"""A path on which large datagrams vanish in one direction, and nobody says so. harness.py says how it runs.

Client and server are in network namespaces of their own, which a pair of veth devices joins. One end has a smaller MTU, so
what arrives there and is larger is dropped without a word, while what it sends is cut to size. The time from the client's
start to its "connected:" is printed, and compared with that of the same path undisturbed. Both sides' timers race, so each
is tried several times and the slowest counts. Needs root and Linux's ip, unshare and nsenter. The namespaces are those of
two processes and end with them.
"""

import pathlib
import shutil
import sys
import time

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import Authority, BIN, CERTS, CONNECTED, Host, PROGRAM, Proc, check, main, test  # noqa: E402

ALL = "--all" in sys.argv
TRIES = 4 if ALL else 2
MTUS = (1000, 700, 600) if ALL else (600,)  # of the end where datagrams vanish
WHOLE = 1500  # of the other, and of both ends of the undisturbed path
SLOWER = 2.0  # seconds that a handshake may take longer than undisturbed
RESENDS = 16  # flights that both sides may send again in one handshake
HOSTS = {"client": "192.0.2.1", "server": "192.0.2.2"}
PORT = 4444
COUNTERS = r"^datagrams: .*flights sent again: (\d+);"


class Path:
    """Two hosts, and the MTU of each one's end; certs is a folder like CERTS."""

    def __init__(self, t, mtus, certs):
        self.certs = certs
        self.hosts = {name: Host(t, name) for name in HOSTS}
        self.hosts["client"].cable(self.hosts["server"])
        for name, host in self.hosts.items():
            host.up(HOSTS[name], mtus[name])

    def run(self, t, name, *argv):
        return Proc(t, t.title(name), self.hosts[name].inside(BIN, name, "--certs", self.certs, "-v", *argv))

    def vanished(self):
        return sum(host.vanished() for host in self.hosts.values())

    def close(self):
        for host in self.hosts.values():
            host.kill()


def connect(t, mtus, certs):
    """A handshake: the seconds it took, the flights that were sent again, the datagrams that vanished."""
    path = Path(t, mtus, certs)
    where = f"{HOSTS['server']}:{PORT}"
    server = path.run(t, "server", where)
    server.err.wait("^listening on ")
    before = path.vanished()
    began = time.monotonic()
    client = path.run(t, "client", "--name", "localhost", where)
    client.err.wait(CONNECTED, timeout=40)
    took = time.monotonic() - began
    client.send("ping")
    client.out.wait_line("pong")
    vanished = path.vanished() - before
    client.stop()
    server.stop()
    path.close()
    again = sum(int(side.err.wait(COUNTERS)[1]) for side in (client, server))
    return took, again, vanished


def tries(t, what, mtus, certs):
    """The slowest handshake, the most flights and the most datagrams of several."""
    times, again, vanished = zip(*(connect(t, mtus, certs) for _ in range(TRIES)))
    print(f"# {PROGRAM}: {what}: {', '.join(f'{took:.2f}' for took in times)} s; at most {max(again)} flights sent again, "
          f"{max(vanished)} datagrams vanished", flush=True)
    return max(times), max(again), max(vanished)


def large_datagrams_vanish(t, towards, certs=CERTS):
    kind = "" if certs == CERTS else "chains of two, "
    usual, _, vanished = tries(t, f"{kind}undisturbed", dict.fromkeys(HOSTS, WHOLE), certs)
    check(vanished == 0, f"{vanished} datagrams vanished on the undisturbed path")
    bad = []
    for mtu in MTUS:
        mtus = {**dict.fromkeys(HOSTS, WHOLE), towards: mtu}
        took, again, vanished = tries(t, f"{kind}more than {mtu} bytes vanish towards the {towards}", mtus, certs)
        check(vanished or mtu > min(MTUS), "nothing vanished: this system's veth devices let larger datagrams through")
        if took > usual + SLOWER or again > RESENDS:
            bad.append(f"{took:.2f} s and {again} flights sent again at {mtu}")
    check(not bad, f"{', '.join(bad)}; undisturbed {usual:.2f} s")


def with_an_intermediate(t):
    """A folder like CERTS, whose certificates fill more than one datagram."""
    folder = pathlib.Path(t.path("certs"))
    folder.mkdir()
    root = Authority(folder / "root")
    between = Authority(folder / "between", *root.issue("intermediate", ca=True))
    shutil.copy(root.pem, folder / "ca.pem")
    for who in HOSTS:
        leaf = between.issue(who, usage=f"{who}Auth")
        shutil.copy(leaf.key, folder / f"{who}.key")
        chain = pathlib.Path(leaf.pem).read_bytes() + pathlib.Path(between.pem).read_bytes()
        (folder / f"{who}.pem").write_bytes(chain)
    return str(folder)


@test(alone=True)
def large_datagrams_vanish_towards_the_server(t):
    large_datagrams_vanish(t, "server")


@test(alone=True)
def large_datagrams_vanish_towards_the_client(t):
    large_datagrams_vanish(t, "client")


@test(alone=True)
def chains_vanish_towards_the_server(t):
    large_datagrams_vanish(t, "server", with_an_intermediate(t))


@test(alone=True)
def chains_vanish_towards_the_client(t):
    large_datagrams_vanish(t, "client", with_an_intermediate(t))


if __name__ == "__main__":
    sys.exit(main())
