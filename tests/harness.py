"""The frame of the tests that are written in Python: processes, pseudo-terminals, relays, certificates, and a Case that
owns them. A test program imports what it needs, registers tests with @test and ends with sys.exit(main()).

    python3 tests/PROGRAM.py [-l] [-t] [NAME-FILTER...]     -l: list the tests, -t: add each test's time to its line

Environment: DTLS_BIN, the program (default ./dtls); CERTS_DIR, a folder with ca.pem, ca.key, server.pem, server.key,
client.pem and client.key (default: a fresh one, made by certs/certs.sh); TEST_NAME, PROGRAM in the lines below; CC, the
compiler.

Prints one line for each test, `ok - PROGRAM NAME`, `not ok - PROGRAM NAME: REASON` or `skip - PROGRAM NAME: REASON`; below
a failed one, indented, what each process said last. The exit status is 1 if any failed.

Every test gets a Case. It makes the processes, relays and certificates, and at the end stops what still runs: every
process of ours must then have ended with the status that was expected, and no sanitizer may have spoken.
"""

import atexit
import collections
import fcntl
import heapq
import itertools
import json
import os
import pathlib
import pty
import random
import re
import selectors
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from screen import Screen  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = os.path.abspath(os.environ.get("DTLS_BIN") or ROOT / "dtls")
PROGRAM = os.environ.get("TEST_NAME") or pathlib.Path(sys.argv[0]).stem
CERTS = os.path.abspath(os.environ.get("CERTS_DIR") or tempfile.mkdtemp(prefix=f"dtls-{PROGRAM}-certs-"))
OPENSSL = shutil.which("openssl")
CC = shlex.split(os.environ.get("CC") or "cc")  # it may hold flags

JOBS = 4
WAIT = 15.0  # seconds that an event may take when nothing else is said; only a failing test ever waits that long
PROMPT = 3.0  # seconds for what the program promises "at once" or "within a second", with room for sanitizers and load
MESSAGE_MAX = 16384
COMMANDS = "commands: ping, echo TEXT, whoami, stats, bc TEXT"
CONNECTED = r"^(?P<addr>\S+) connected: (?P<name>.*), (?P<cipher>[A-Z0-9-]+), (?P<kind>full handshake|resumed session)$"
SANITIZER = re.compile(r"Sanitizer|runtime error:")


class Failure(Exception):
    """The program did not do what it should."""


class Skip(Exception):
    """This system cannot run the test."""


def check(condition, reason):
    if not condition:
        raise Failure(reason)


def equal(got, wanted, what):
    if got != wanted:
        raise Failure(f"{what}: got {shorten(got)}, wanted {shorten(wanted)}")


def shorten(value, limit=300):
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


# ---- processes -------------------------------------------------------------------------------------------------------


class Pump(threading.Thread):
    """One thread that reads the output of every process."""

    def __init__(self):
        super().__init__(daemon=True)
        self.selector = selectors.DefaultSelector()
        self.inbox = collections.deque()
        self.waker, self.wakee = socket.socketpair()
        self.selector.register(self.wakee, selectors.EVENT_READ)
        self.start()

    def add(self, fd, output):
        self.inbox.append((fd, output))
        self.waker.send(b".")

    def run(self):
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.wakee:
                    self.wakee.recv(4096)
                    while self.inbox:
                        fd, output = self.inbox.popleft()
                        self.selector.register(fd, selectors.EVENT_READ, output)
                    continue
                try:
                    data = os.read(key.fd, 65536)
                except OSError:  # a terminal whose other side is gone: EIO
                    data = b""
                if data:
                    key.data.feed(data)
                else:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)
                    key.data.close()


class Output:
    """What a process wrote to one descriptor so far, for waiting on it."""

    def __init__(self, name):
        self.name = name
        self.data = bytearray()
        self.closed = False
        self.changed = threading.Condition()

    def feed(self, data):
        with self.changed:
            self.data += data
            self.changed.notify_all()

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    @property
    def text(self):
        return bytes(self.data).decode("utf-8", "backslashreplace")

    def lines(self):
        return self.text.splitlines()

    def until(self, look, what, timeout=WAIT):
        """Waits until look() gives something true and returns that."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                found = look()
                if found:
                    return found
                left = deadline - time.monotonic()
                if self.closed:
                    raise Failure(f"{self.name} ended without {what}")
                if left <= 0:
                    raise Failure(f"{self.name} had no {what} within {timeout:g} s")
                self.changed.wait(left)

    def wait(self, pattern, nth=1, timeout=WAIT, partial=False):
        """Waits for the nth match in whole lines (with partial: in everything) and returns it."""
        regex = re.compile(pattern, re.M)

        def look():
            text = self.text
            if not partial and not self.closed:
                text = text[:text.rfind("\n") + 1]
            found = list(regex.finditer(text))
            return found[nth - 1] if len(found) >= nth else None

        times = f" {nth} times" if nth > 1 else ""
        return self.until(look, f"{pattern!r}{times}", timeout)

    def wait_line(self, line, nth=1, timeout=WAIT):
        return self.wait(f"^{re.escape(line)}$", nth, timeout)

    def count(self, pattern):
        return len(re.findall(pattern, self.text, re.M))


PUMP = Pump()
LIVE = set()  # every process not yet reaped, and
FOLDERS = set()  # every temporary folder, for an interrupted run


def environment(case, **more):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "DTLS_", "OPENSSL_CONF"))}
    env.update(HOME=case.tmp, LANG="C.UTF-8", LC_ALL="C.UTF-8", UBSAN_OPTIONS="print_stacktrace=1")
    env.pop("TERM", None)
    env.update(more)
    return env


class Proc:
    """A running process: its output, its input, its end."""

    ours = True  # its exit status and its memory are our business

    def __init__(self, case, title, argv, stdin=subprocess.PIPE, env=None):
        self.case, self.title, self.argv = case, title, [str(word) for word in argv]
        self.expected = None  # the exit status that was waited for
        self.out, self.err = Output(f"{title}'s stdout"), Output(f"{title}'s stderr")
        feed = stdin if isinstance(stdin, bytes) else None
        handle = subprocess.PIPE if feed is not None else stdin
        if isinstance(stdin, (str, pathlib.Path)):
            handle = open(stdin, "rb")
        try:
            self.process = subprocess.Popen(
                self.argv, stdin=handle, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, cwd=case.tmp,
                env=env or environment(case), start_new_session=True)
        finally:
            if hasattr(handle, "close"):
                handle.close()
        LIVE.add(self.process)
        case.procs.append(self)
        for pipe, output in ((self.process.stdout, self.out), (self.process.stderr, self.err)):
            PUMP.add(os.dup(pipe.fileno()), output)
            pipe.close()
        if feed is not None:
            threading.Thread(target=self.feed, args=(feed,), daemon=True).start()

    def feed(self, data):
        try:
            self.write(data)
        except OSError:
            pass
        self.close_stdin()

    def write(self, data):
        view = memoryview(data)
        while view:
            view = view[self.process.stdin.write(view):]

    def send(self, line):
        self.write((line.encode() if isinstance(line, str) else line) + b"\n")

    def close_stdin(self):
        if self.process.stdin:
            try:
                self.process.stdin.close()
            except OSError:
                pass

    def send_signal(self, number):
        self.process.send_signal(number)

    def kill(self):
        """kill -9"""
        self.send_signal(signal.SIGKILL)
        self.exits(-signal.SIGKILL)

    def running(self):
        return self.process.poll() is None

    def reap(self, timeout):
        """Waits for the end and all output; returns the status."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.title} still runs after {timeout:g} s") from None
        LIVE.discard(self.process)
        self.ended()
        for output in (self.out, self.err):
            with output.changed:
                output.changed.wait_for(lambda: output.closed, 2)
        return status

    def ended(self):
        self.close_stdin()

    def exits(self, status, timeout=WAIT):
        got = self.reap(timeout)
        self.expected = got  # said below if it is wrong, not again at the end
        equal(got, status, f"exit status of {self.title}")
        return self

    def stop(self, number=signal.SIGTERM, timeout=PROMPT):
        self.send_signal(number)
        return self.exits(0, timeout)

    def finish(self):
        """At the end of a test: stops it, and looks at how it ended."""
        if self.running():
            self.send_signal(signal.SIGCONT)
            self.send_signal(signal.SIGTERM)
            status = self.reap(2 * PROMPT)
            wanted = 0
        else:
            status = self.reap(WAIT)
            wanted = self.expected if self.expected is not None else 0
        if self.ours:
            equal(status, wanted, f"exit status of {self.title}")
            said = SANITIZER.search(self.transcript())
            check(not said, f"a sanitizer spoke in {self.title}")

    def destroy(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        LIVE.discard(self.process)
        self.close_stdin()

    def transcript(self):
        return self.err.text + self.out.text

    def headline(self):
        status = self.process.poll()
        command = " ".join("..." if "\n" in word else word for word in self.argv)
        return f"{self.title}: {command} ({'running' if status is None else f'status {status}'})"

    def details(self):
        yield self.headline()
        for name, output, limit in (("err", self.err, 40 if SANITIZER.search(self.err.text) else 15),
                                    ("out", self.out, 8)):
            lines = output.lines()
            if len(lines) > limit:
                yield f"  {name}| ... {len(lines) - limit} lines before"
            for line in lines[-limit:]:
                yield f"  {name}| {shorten(line, 240) if len(line) > 240 else line}"


class Server(Proc):
    """The program as a server; self.addrs are its addresses, self.addr the first of them."""

    def __init__(self, case, options, addrs, certs, program=BIN, env=None):
        super().__init__(case, case.title("server"), [program, "server", "--certs", certs, *options, *addrs],
                         stdin=subprocess.DEVNULL, env=environment(case, **(env or {})))
        self.addrs, self.addr = addrs, addrs[0]

    def connected(self, nth=1, timeout=WAIT):
        return self.err.wait(CONNECTED, nth, timeout)


class Client(Proc):
    """The program as a client that is not on a terminal."""

    def __init__(self, case, addr, options, stdin, certs, env=None):
        super().__init__(case, case.title("client"), [BIN, "client", "--certs", certs, *options, addr], stdin=stdin,
                         env=environment(case, **(env or {})))

    def connected(self, nth=1, timeout=WAIT):
        return self.err.wait(CONNECTED, nth, timeout)

    def ask(self, line, answer, timeout=WAIT):
        """Sends a line and waits for one more line of exactly this answer."""
        before = self.out.lines().count(answer)
        self.send(line)
        self.out.wait_line(answer, before + 1, timeout)

    def ends(self):
        """End of input: the client must leave by itself, content."""
        self.close_stdin()
        return self.exits(0)


class Foreign(Proc):
    """OpenSSL's own command line tool."""

    ours = False

    def __init__(self, case, title, *argv, stdin=subprocess.PIPE):
        super().__init__(case, case.title(title), [OPENSSL, title, "-dtls1_2", *argv], stdin=stdin)


class Tool(Proc):
    """Any other program."""

    ours = False

    def __init__(self, case, *argv):
        super().__init__(case, case.title(os.path.basename(argv[0])), argv, stdin=subprocess.DEVNULL)


class Term(Proc):
    """A program on a pseudo-terminal of its own, with a screen that shows what a person would see."""

    # Makes the terminal the controlling one, so that ^C and a resized window become signals, then becomes the program.
    TAKE = ("import fcntl, os, sys, termios\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "os.execvp(sys.argv[1], sys.argv[1:])")

    def __init__(self, case, argv, cols=80, rows=24, term="xterm", title="terminal"):
        self.case, self.title, self.argv = case, case.title(title), [str(word) for word in argv]
        self.expected = None
        self.screen = Screen(cols, rows)
        self.out = self.err = Output(f"{self.title}'s screen")
        self.out.feed = self.feed_screen
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        self.modes = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.TAKE, *self.argv], stdin=self.slave, stdout=self.slave, stderr=self.slave,
            cwd=case.tmp, env=environment(case, TERM=term), start_new_session=True)
        LIVE.add(self.process)
        case.procs.append(self)
        PUMP.add(os.dup(self.master), self.out)

    def feed_screen(self, data):
        with self.out.changed:
            self.out.data += data
            self.screen.feed(data)
            self.out.changed.notify_all()

    def type(self, text):
        view = memoryview(text.encode() if isinstance(text, str) else text)
        while view:
            view = view[os.write(self.master, view):]

    def see(self, look, what, timeout=WAIT):
        return self.out.until(look, what, timeout)

    def shows(self, line, nth=1, timeout=WAIT):
        """Waits until the screen (or what scrolled off it) has this whole line."""
        times = f" {nth} times" if nth > 1 else ""
        self.see(lambda: self.screen.lines().count(line) >= nth, f"the line {line!r}{times}", timeout)

    def shows_like(self, pattern, nth=1, timeout=WAIT):
        def look():
            found = list(re.finditer(pattern, "\n".join(self.screen.lines()), re.M))
            return found[nth - 1] if len(found) >= nth else None

        return self.see(look, f"a line like {pattern!r}{f' {nth} times' if nth > 1 else ''}", timeout)

    def prompts(self, before="", behind="", timeout=WAIT):
        """Waits until the prompt is the last thing on the screen, with this text before and behind the cursor."""
        self.see(lambda: self.screen.has_at_cursor("> " + before, behind),
                 f"prompt with {before!r} before and {behind!r} behind the cursor", timeout)

    def ask(self, line, answer, nth=1):
        self.type(line + "\r")
        self.shows(answer, nth)

    def resize(self, cols, rows):
        with self.out.changed:
            self.screen.resize(cols, rows)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def restored(self):
        """After the end: the terminal is as it was before the program."""
        equal(self.modes_after[:4], self.modes[:4], "terminal modes afterwards")

    def ended(self):
        self.close_slave()

    def close_slave(self):
        """With the last slave side closed, the pump reads what is left and then sees the end."""
        if self.slave is not None:
            self.modes_after = termios.tcgetattr(self.slave)
            os.close(self.slave)
            self.slave = None

    def destroy(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        LIVE.discard(self.process)
        self.close_slave()
        os.close(self.master)

    def details(self):
        yield self.headline()
        with self.out.changed:
            rows = self.screen.history()
            cursor = f"column {self.screen.x} of row {len(self.screen.gone) + self.screen.y}"
        for n, row in list(enumerate(rows))[-60 if SANITIZER.search(self.out.text) else -24:]:
            yield f"  tty {n:3}| {row}"
        yield f"  cursor in {cursor}, both from 0, of {self.screen.cols} columns"
        yield f"  raw: {bytes(self.out.data[-200:])!r}"


# ---- the network -----------------------------------------------------------------------------------------------------


def can_bind(host, port=0):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((host, port))
        return True
    except OSError:
        return False


def need_ipv6():
    if not can_bind("::1"):
        raise Skip("no IPv6 here")


def need_second_loopback():
    if not can_bind("127.0.0.2"):
        raise Skip("127.0.0.2 is no address of this system")


USED_PORTS = set()


def free_port():
    """A UDP port that is free on every address, below the range that source ports usually come from."""
    while True:
        port = random.SystemRandom().randrange(10240, 32000)
        if port not in USED_PORTS and can_bind("0.0.0.0", port) and (not can_bind("::") or can_bind("::", port)):
            USED_PORTS.add(port)
            return port


def split_addr(addr):
    host, _, port = addr.rpartition(":")
    return host.strip("[]"), int(port)


Datagram = collections.namedtuple("Datagram", "to_server data when")

HANDSHAKE_TYPES = (20, 22)  # ChangeCipherSpec, handshake
PROTECTED = (b"\x15", b"\x17", b"\x19", b"\x1b")  # alert, application data, with a connection ID, path: in a connection
IP_UDP_BYTES = 28


class Relay(threading.Thread):
    """A UDP relay in front of a server on IPv4, that can lose, block, double, delay, damage, size up, record and forge,
    and repeats its chance from a seed. It adds about a millisecond to each round trip.

    Each client gets a socket of its own towards the server; with one_port all share one, as behind a NAT or as a
    client that comes back on its old port: answers go to whoever spoke last. Errors of the network (ICMP) end here.
    """

    def __init__(self, case, server, one_port=False, seed=1, **what):
        super().__init__(daemon=True)
        self.server = split_addr(server.addr if isinstance(server, Server) else server)
        self.one_port = one_port
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.front = self.make_socket()
        self.addr = "127.0.0.1:%d" % self.front.getsockname()[1]
        self.up = {}  # client's address: socket towards the server
        self.clients = {}  # socket towards the server: client's address
        self.number = itertools.count()
        self.log = []  # every Datagram that came, lost or not
        self.did = collections.Counter()  # what happened to how many
        self.late = []  # under way, a heap: (due, number, socket, data, to)
        self.selector = selectors.DefaultSelector()
        # What may be changed at any time:
        self.blocked = False
        self.loss = self.twice = self.straying = self.damage = 0.0  # shares; straying ones are late by so much:
        self.stray = (0.005, 0.08)
        self.delay = 0.0  # seconds each way, for all
        self.forging = 0.0  # share of the datagrams before which a forged one goes, made by
        self.forger = None  # this: (chance, the real one, counter of kinds) -> bytes
        self.forged = collections.Counter()
        self.limit = 65535  # payload bytes; larger datagrams vanish
        self.quota = {True: None, False: None}  # so many more datagrams pass to the server, and back; None: all
        self.to_server_first = []  # forged datagrams that go ahead of each real one
        self.to_client_first = []
        self.waker, self.wakee = socket.socketpair()
        vars(self).update(what)
        case.relays.append(self)
        self.start()

    @staticmethod
    def make_socket(host="127.0.0.1"):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        sock.bind((host, 0))
        sock.setblocking(False)
        return sock

    def run(self):
        with self.selector as selector:
            selector.register(self.front, selectors.EVENT_READ)
            selector.register(self.wakee, selectors.EVENT_READ)
            while True:
                self.deliver_late()
                for key, _ in selector.select(max(self.late[0][0] - time.monotonic(), 0) if self.late else None):
                    if key.fileobj is self.wakee:
                        return
                    try:
                        data, source = key.fileobj.recvfrom(65535)
                    except OSError:
                        continue
                    if key.fileobj is self.front:
                        up = self.upstream(source)
                        self.pass_on(Datagram(True, data, time.monotonic()), up, self.server, self.to_server_first)
                    elif source == self.server:
                        self.from_server(key.fileobj, data)

    def from_server(self, up, data):
        self.pass_on(Datagram(False, data, time.monotonic()), self.front, self.clients[up], self.to_client_first)

    def upstream(self, client):
        with self.lock:
            up = self.up.get("all" if self.one_port else client)
            if up is None:
                up = self.up["all" if self.one_port else client] = self.open_upstream()
            self.clients[up] = client
            return up

    def open_upstream(self, host="127.0.0.1"):
        up = self.make_socket(host)
        self.selector.register(up, selectors.EVENT_READ)
        return up

    def happens(self, share, what=None):
        """By chance, which is only asked where it matters."""
        happens = share > 0 and self.random.random() < share
        if happens and what:
            self.did[what] += 1
        return happens

    def damaged(self, data):
        """One in four is cut short, in the others a bit flips."""
        place = self.random.randrange(len(data))
        if self.random.random() < 0.25:
            return data[:place]
        return data[:place] + bytes([data[place] ^ 1 << self.random.randrange(8)]) + data[place + 1:]

    def pass_on(self, datagram, sock, to, forged):
        with self.lock:
            self.log.append(datagram)
            if self.happens(self.forging):
                self.send(sock, self.forger(self.random, datagram.data, self.forged), to)
            if (self.blocked or len(datagram.data) > self.limit or self.quota[datagram.to_server] == 0 or
                    self.happens(self.loss)):
                self.did["lost"] += 1
                return
            if self.quota[datagram.to_server]:
                self.quota[datagram.to_server] -= 1
            data = datagram.data
            if data and self.happens(self.damage, "damaged"):
                data = self.damaged(data)
            for one in [*forged, data, *([data] if self.happens(self.twice, "doubled") else [])]:
                delay = self.delay + (self.random.uniform(*self.stray) if self.happens(self.straying, "late") else 0)
                if delay:
                    heapq.heappush(self.late, (datagram.when + delay, next(self.number), sock, one, to))
                else:
                    self.send(sock, one, to)

    def deliver_late(self):
        while self.late and self.late[0][0] <= time.monotonic():
            self.send(*heapq.heappop(self.late)[2:])

    @staticmethod
    def send(sock, data, to):
        try:
            sock.sendto(data, to)
        except OSError:
            pass

    def forge(self, to_server, data):
        """Sends a datagram as if the other side had; there must be one client."""
        with self.lock:
            (up, client), = self.clients.items()
            if to_server:
                self.send(up, data, self.server)
            else:
                self.send(self.front, data, client)

    def own_addr(self):
        """The address by which the server knows the client; there must be one."""
        with self.lock:
            (up,) = self.clients
            return "127.0.0.1:%d" % up.getsockname()[1]

    def handshake(self, to_server=None):
        with self.lock:
            return [datagram for datagram in self.log if datagram.data[:1] and datagram.data[0] in HANDSHAKE_TYPES
                    and to_server in (None, datagram.to_server)]

    def close(self):
        self.waker.send(b".")
        self.join()
        for sock in (self.front, self.waker, self.wakee, *self.clients):
            sock.close()

    def details(self):
        there = sum(datagram.to_server for datagram in self.log)
        yield f"relay {self.addr}: {there} datagrams there, {len(self.log) - there} back, {dict(self.did)}"
        for datagram in self.log[-12:]:
            way = "->" if datagram.to_server else "<-"
            when = datagram.when - self.log[0].when
            yield f"  {when:8.3f} s {way} {len(datagram.data):5} bytes {datagram.data[:28].hex()}"


class Nat(Relay):
    """A NAT in front of a server on IPv4: a Relay that gives its clients other upstream addresses while they talk. And an
    attacker on the path, the thief, who has an address of his own.

    Clients have numbers, in the order in which their first datagrams came. Addresses are texts as in the server's log.
    """

    def __init__(self, case, server, **what):
        self.before = collections.defaultdict(list)  # client's address: the upstream sockets that it had before
        self.dead = set()  # upstream sockets through which nothing passes any more, either way
        self.sent, self.received = collections.Counter(), collections.Counter()  # bytes, by upstream address
        self.came = 0  # datagrams from clients, and
        self.plan = {}  # what is called when so many have come, before the last of them goes on
        self.thief = self.make_socket()
        self.theft = None  # what he does with clients' datagrams, see steal()
        self.thefts = 0  # with so many of the next ones
        self.held = []  # clients' datagrams that he has kept
        self.loot = []  # what the server sent him
        super().__init__(case, server, **what)
        self.selector.register(self.thief, selectors.EVENT_READ)

    @staticmethod
    def text(sock):
        return "%s:%d" % sock.getsockname()

    def own_addr(self, client=0):
        with self.lock:
            return self.text(list(self.up.values())[client])

    @property
    def thief_addr(self):
        return self.text(self.thief)

    def change(self, client, up, old="dropped"):
        """With the lock: this client (an address) goes through that socket from now on. What comes to the old one is
        dropped, or passes ("kept"); or the old one is closed, and the server's host tells it by ICMP ("closed")."""
        former, self.up[client], self.clients[up] = self.up[client], up, client
        self.dead.discard(up)
        self.before[client].append(former)
        if old == "dropped":
            self.dead.add(former)
        elif old == "closed":
            self.selector.unregister(former)
            former.close()
        return self.text(up)

    def rebind(self, client=None, host="127.0.0.1", old="dropped"):
        """One client, or all of them, get new upstream ports, on that host. Returns the new address, or a list."""
        with self.lock:
            made = [self.change(address, self.open_upstream(host), old)
                    for address in (list(self.up) if client is None else [list(self.up)[client]])]
            return made if client is None else made[0]

    def restart(self):
        return self.rebind()

    def go_back(self, client=0):
        """To the upstream address that it had before."""
        with self.lock:
            address = list(self.up)[client]
            return self.change(address, self.before[address].pop())

    def swap(self, a, b):
        """Two clients get each other's upstream address."""
        with self.lock:
            a, b = (list(self.up)[client] for client in (a, b))
            self.up[a], self.up[b] = self.up[b], self.up[a]
            self.clients[self.up[a]], self.clients[self.up[b]] = a, b

    def cut(self, client=0):
        """Nothing of this client passes any more, until it comes from another port of its own or is given one."""
        with self.lock:
            self.dead.add(list(self.up.values())[client])

    def steal(self, how, count=1):
        """What the thief does with so many of the clients' next datagrams: he sends a copy to the server, "before" or
        "after" the real one or "instead" of it; or keeps it in self.held, and the real one does not arrive ("hold")."""
        with self.lock:
            self.theft, self.thefts = how, count

    def replay(self, datagrams):
        """From the thief's address."""
        with self.lock:
            for data in datagrams:
                self.transmit(self.thief, data)

    def recorded(self):
        """The protected datagrams that came from clients."""
        with self.lock:
            return [datagram.data for datagram in self.log if datagram.to_server and datagram.data[:1] in PROTECTED]

    def transmit(self, up, data):
        self.sent[self.text(up)] += len(data)
        super().send(up, data, self.server)

    def send(self, sock, data, to):
        if to != self.server:
            super().send(sock, data, to)
            return
        if sock in self.dead:
            return
        theft = self.theft if self.thefts > 0 else None
        self.thefts -= theft is not None
        if theft == "hold":
            self.held.append(data)
        if theft in ("before", "instead"):
            self.transmit(self.thief, data)
        if theft not in ("hold", "instead"):
            self.transmit(sock, data)
        if theft == "after":
            self.transmit(self.thief, data)

    def upstream(self, client):
        self.came += 1
        self.plan.pop(self.came, lambda: None)()
        return super().upstream(client)

    def from_server(self, up, data):
        self.received[self.text(up)] += len(data)
        if up is self.thief:
            self.loot.append(data)
        elif up not in self.dead:
            super().from_server(up, data)

    def close(self):
        super().close()
        self.thief.close()

    def details(self):
        yield from super().details()
        for address in sorted({*self.sent, *self.received}):
            whose = " (the thief's)" if address == self.thief_addr else ""
            yield f"  {address}{whose}: {self.sent[address]} bytes to the server, {self.received[address]} from it"


def record(kind, epoch, sequence, payload, version=0xFEFD):
    sequence, length = sequence.to_bytes(6, "big"), struct.pack("!H", len(payload))
    return struct.pack("!BHH", kind, version, epoch) + sequence + length + payload


ALERT, HANDSHAKE, DATA = 21, 22, 23

FORGED_DONE = record(HANDSHAKE, 0, 5, b"\x0e" + bytes(11))  # a ServerHelloDone

# What anybody can send from a forged address, without knowing any key.
FORGED = [
    b"",
    b"\x16",
    b"GET / HTTP/1.0\r\n\r\n",
    record(ALERT, 0, 5, b"\x02\x28"),  # fatal, handshake_failure
    record(ALERT, 0, 6, b"\x01\x00"),  # close_notify
    *[record(ALERT, 0, 7 + n, b"\x01\x5a") for n in range(6)],  # more warnings than libssl takes
    record(DATA, 0, 20, b"ping"),
    record(DATA, 1, 0xFFFF, b"short"),  # no room for nonce and tag
    record(ALERT, 1, 0xFFFFF, b"\x02\x28"),
    record(DATA, 1, 0xFFFFFF, bytes(40)),
    record(DATA, 2, 1, bytes(40)),
    record(DATA, 1, 9, bytes(40))[:-5],  # cut short
    FORGED_DONE,
    record(HANDSHAKE, 0, 1 << 40, bytes(12)),  # far ahead in sequence: a HelloRequest
    record(HANDSHAKE, 0, 21, b"\x0b\xff\xff\xff\x00\x02\x00\x00\x00\xff\xff\xff"),  # longer than its record
    record(20, 0, 8, b"\x01"),
    record(20, 0, 1 << 40, b"\x01"),
    record(99, 1, 10, bytes(40)),
    record(DATA, 1, 11, bytes(40), version=0x0303),
]


# ---- network namespaces ----------------------------------------------------------------------------------------------


def command(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    if done.returncode:
        raise OSError(done.stderr.decode(errors="replace").strip() or f"{argv[0]}: status {done.returncode}")
    return done.stdout.decode()


class Host(Proc):
    """A process in a network namespace of its own, which ends with it. It ends when its input does, so also when we are
    killed. Needs root and Linux's ip, unshare and nsenter."""

    ours = False

    def __init__(self, case, name):
        for tool in ("ip", "unshare", "nsenter"):
            if not shutil.which(tool):
                raise Skip(f"no {tool} command")
        super().__init__(case, case.title(f"{name}'s host"), ["unshare", "-n", "sh", "-c", "echo ready; read line"])
        self.name = name
        try:
            self.out.wait_line("ready")
        except Failure:
            raise Skip(f"no network namespaces here: {self.err.text.strip()}") from None

    def inside(self, *argv):
        return ["nsenter", "-t", str(self.process.pid), "-n", *argv]

    def ip(self, *argv):
        return command(*self.inside("ip", *argv))

    def up(self, addr, mtu=1500):
        """Its end of the cable."""
        self.ip("address", "add", f"{addr}/24", "dev", self.name)
        self.ip("link", "set", self.name, "mtu", str(mtu), "up")

    def vanished(self):
        """Datagrams that were too large for its end."""
        (link,) = json.loads(self.ip("-s", "-json", "link", "show", self.name))
        return link["stats64"]["rx"]["dropped"]

    def cable(self, other):
        """A pair of veth devices to another host; each end has the name of its host."""
        try:
            command("ip", "link", "add", self.name, "netns", str(self.process.pid), "type", "veth",
                    "peer", "name", other.name, "netns", str(other.process.pid))
        except OSError as error:
            raise Skip(f"no veth devices here: {error}") from None


# ---- certificates ----------------------------------------------------------------------------------------------------


def openssl(*argv, **options):
    done = subprocess.run([OPENSSL, *map(str, argv)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=30, **options)
    if done.returncode:
        raise Failure(f"openssl {argv[0]}: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout.decode(errors="replace")


class Identity(collections.namedtuple("Identity", "pem key")):
    @property
    def options(self):
        return ["--cert", self.pem, "--key", self.key]

    @property
    def openssl_options(self):
        return ["-cert", self.pem, "-key", self.key]


class Authority:
    """A CA for the odd certificates: expired ones, other names, other keys, other CAs."""

    EVERYWHERE = "DNS:localhost,IP:127.0.0.1,IP:::1"
    EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]

    def __init__(self, folder, pem=None, key=None, cn="another CA", newkey=None):
        os.mkdir(folder)
        self.folder, self.newkey = pathlib.Path(folder), newkey or self.EC
        (self.folder / "index.txt").touch()
        (self.folder / "req.cnf").write_text(
            "[req]\ndistinguished_name=dn\n[dn]\n[ca]\nbasicConstraints=critical,CA:TRUE\n"
            "keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n")
        if pem is None:
            pem, key = self.folder / "ca.pem", self.folder / "ca.key"
            openssl("req", "-x509", *self.newkey, "-nodes", "-keyout", key, "-out", pem, "-days", "9",
                    "-subj", f"/CN={cn}", "-config", self.folder / "req.cnf", "-extensions", "ca")
        self.pem, self.key = pem, key

    def issue(self, name, cn=None, usage="clientAuth", names=EVERYWHERE, start=None, end=None, key=None, ca=False):
        """A certificate and its key; start and end as YYYYMMDDHHMMSSZ; key: take that instead of making a new one."""
        base = self.folder / name
        extensions = ("basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n" if ca else
                      f"basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
                      f"extendedKeyUsage={usage}\nsubjectAltName={names}\n")
        base.with_suffix(".cnf").write_text(
            f"[ca]\ndefault_ca=a\n[a]\ndatabase={self.folder}/index.txt\nnew_certs_dir={self.folder}\n"
            f"serial={base}.serial\ndefault_md=sha256\ndefault_days=9\npolicy=p\nunique_subject=no\nx509_extensions=e\n"
            f"[p]\ncommonName=supplied\n[e]\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n{extensions}")
        base.with_suffix(".serial").write_text("%032x\n" % (random.getrandbits(120) | 1 << 120))
        made = base.with_suffix(".key")
        keys = ["-key", key] if key else [*self.newkey, "-nodes", "-keyout", made]
        openssl("req", "-new", *keys, "-utf8", "-out", f"{base}.csr", "-subj", f"/CN={cn or name}",
                "-config", self.folder / "req.cnf")
        dates = (["-startdate", start] if start else []) + (["-enddate", end] if end else [])
        openssl("ca", "-batch", "-notext", "-utf8", "-config", base.with_suffix(".cnf"), "-cert", self.pem,
                "-keyfile", self.key, "-in", f"{base}.csr", "-out", base.with_suffix(".pem"), *dates)
        return Identity(str(base.with_suffix(".pem")), str(key or made))

    def revoke(self, *identities, seconds=9 * 86400, name="crl.pem"):
        """Its revocation list, anew: with these identities and those of before, and good for so long."""
        config, ca, out = self.folder / "crl.cnf", ["-cert", self.pem, "-keyfile", self.key], self.folder / name
        config.write_text(f"[ca]\ndefault_ca=a\n[a]\ndatabase={self.folder}/index.txt\ndefault_md=sha256\n")
        for identity in identities:
            openssl("ca", "-config", config, *ca, "-revoke", identity.pem)
        openssl("ca", "-config", config, *ca, "-gencrl", "-crlsec", seconds, "-out", out)
        return str(out)

    def expired(self, name, **more):
        return self.issue(name, start="20200101000000Z", end="20210101000000Z", **more)


def certs_sh(folder, *words, wanted=0):
    """certs/certs.sh, as the Makefile calls it."""
    done = subprocess.run(["sh", "certs/certs.sh", *words], cwd=ROOT, env={**os.environ, "CERTS_DIR": str(folder)},
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    if wanted is not None and done.returncode != wanted:
        raise Failure(f"certs.sh {' '.join(words)}: status {done.returncode}: {done.stdout.decode()[-300:]}")
    return done.returncode


# ---- the frame of a test ---------------------------------------------------------------------------------------------


class Case:
    """What one test owns. Everything made here is stopped, checked and removed when it ends."""

    def __init__(self, name):
        self.name = name
        self.tmp = tempfile.mkdtemp(prefix=f"dtls-{PROGRAM}-")
        FOLDERS.add(self.tmp)
        self.procs, self.relays, self.titles = [], [], collections.Counter()

    def title(self, base):
        self.titles[base] += 1
        return base if self.titles[base] == 1 else f"{base} {self.titles[base]}"

    def path(self, name):
        return os.path.join(self.tmp, name)

    def dtls(self, *argv, stdin=subprocess.DEVNULL):
        return Proc(self, self.title("dtls"), [BIN, *argv], stdin=stdin)

    def server(self, *options, at=("127.0.0.1",), port=None, listening=None, certs=None, program=BIN, env=None):
        """Listens on each host in `at`, all with one port, and is ready on return. env: more in its environment; never
        in ours, which the servers of other tests would get, too."""
        for attempt in range(5):
            addrs = [f"{host}:{port or free_port()}" for host in at[:1]]
            addrs += [f"{host}:{split_addr(addrs[0])[1]}" for host in at[1:]]
            server = Server(self, options, addrs, certs or CERTS, program, env)
            try:
                server.err.wait("^listening on ", listening or len(at))
                return server
            except Failure:
                if port or attempt == 4 or "in use" not in server.err.text.lower():
                    raise
                self.procs.remove(server)
                server.destroy()

    def client(self, where, *options, stdin=subprocess.PIPE, certs=None, env=None):
        return Client(self, getattr(where, "addr", where), options, stdin, certs or CERTS, env)

    def ping(self, where, *options, certs=None, env=None):
        """A whole client: connects, asks, gets its answer, ends."""
        client = self.client(where, *options, stdin=b"ping\n", certs=certs, env=env).exits(0)
        equal(client.out.text, "pong\n", "stdout of a client that sent ping")
        return client

    def term(self, where, *options, under=(), **more):
        """The client on a terminal, connected and with its prompt; under: a command that runs it."""
        term = Term(self, [*under, BIN, "client", "--certs", CERTS, *options, getattr(where, "addr", where)], **more)
        term.shows_like(r"connected: ")
        if more.get("term") != "dumb":
            term.shows_like(r"^hello, ")
            term.prompts()
        return term

    def relay(self, server, **more):
        return Relay(self, server, **more)

    def nat(self, server, **more):
        return Nat(self, server, **more)

    def authority(self):
        """The CA that everybody here trusts, for one more certificate."""
        return Authority(self.path("authority"), os.path.join(CERTS, "ca.pem"), os.path.join(CERTS, "ca.key"))

    def other_authority(self, **more):
        return Authority(self.path("other"), **more)

    def s_client(self, server, *options, identity=None, stdin=subprocess.PIPE):
        return Foreign(self, "s_client", "-connect", getattr(server, "addr", server), "-CAfile", f"{CERTS}/ca.pem",
                       *(identity.openssl_options if identity else ()), *options, stdin=stdin)

    def s_server(self, *options, identity):
        """Waits for one client after the other."""
        port = free_port()
        server = Foreign(self, "s_server", "-listen", "-accept", f"127.0.0.1:{port}", "-CAfile", f"{CERTS}/ca.pem",
                         "-Verify", "1", "-verify_return_error", *identity.openssl_options, *options)
        server.addr = f"127.0.0.1:{port}"
        server.out.wait("^ACCEPT$")
        return server

    def finish(self):
        for proc in reversed(self.procs):
            proc.finish()

    def destroy(self):
        for proc in self.procs:
            proc.destroy()
        for relay in self.relays:
            relay.close()
        shutil.rmtree(self.tmp, ignore_errors=True)
        FOLDERS.discard(self.tmp)

    def details(self):
        for part in [*self.procs[-8:], *self.relays]:
            yield from part.details()


def wait_until(look, what, timeout=WAIT):
    """For what sends no event."""
    deadline = time.monotonic() + timeout
    while not look():
        if time.monotonic() > deadline:
            raise Failure(f"no {what} within {timeout:g} s")
        time.sleep(0.02)


def client_identity():
    return Identity(f"{CERTS}/client.pem", f"{CERTS}/client.key")


def server_identity():
    return Identity(f"{CERTS}/server.pem", f"{CERTS}/server.key")


Test = collections.namedtuple("Test", "name function alone slow")
TESTS = []


def test(function=None, *, alone=False, slow=False):
    """Registers a test. alone: nothing else runs meanwhile; slow: mostly waits, so it starts early."""
    if function is None:
        return lambda function: test(function, alone=alone, slow=slow)
    TESTS.append(Test(function.__name__.replace("_", " "), function, alone, slow))
    return function


def run_test(one):
    """Returns the lines to print and whether it failed."""
    began = time.monotonic()
    case = Case(one.name)
    details = []
    try:
        one.function(case)
        case.finish()
        verdict, failed = f"ok - {PROGRAM} {one.name}", False
    except Skip as reason:
        verdict, failed = f"skip - {PROGRAM} {one.name}: {reason}", False
    except Exception as error:  # whatever it was, the other tests go on
        verdict, failed = f"not ok - {PROGRAM} {one.name}: {(str(error) or repr(error)).splitlines()[0]}", True
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        details.append("at " + ", ".join(f"{frame.name}:{frame.lineno}" for frame in where[1:]))
        if not isinstance(error, Failure):
            details += traceback.format_exc().splitlines()
        details += case.details()
    finally:
        case.destroy()
    if "-t" in sys.argv:
        verdict += f" # {time.monotonic() - began:.1f} s"
    return [verdict, *("    " + line for line in details)], failed


def clean_up():
    for process in list(LIVE):
        try:
            process.kill()
        except OSError:
            pass
    for folder in list(FOLDERS):
        shutil.rmtree(folder, ignore_errors=True)


def interrupted(number, frame):
    clean_up()
    os._exit(128 + number)


def main():
    filters = [word for word in sys.argv[1:] if not word.startswith("-")]
    chosen = [one for one in TESTS if not filters or any(word in one.name for word in filters)]
    atexit.register(clean_up)
    if not os.environ.get("CERTS_DIR"):
        FOLDERS.add(CERTS)
    if not chosen:
        sys.exit(f"{PROGRAM}: no test has such a name; -l lists them")
    if "-l" in sys.argv:
        print("\n".join(one.name for one in chosen))
        return 0
    if not os.access(BIN, os.X_OK):
        sys.exit(f"{PROGRAM}: no program at {BIN}: build it, or set DTLS_BIN")
    if not OPENSSL:
        sys.exit(f"{PROGRAM}: no openssl command found")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    if CERTS in FOLDERS:
        certs_sh(CERTS, "all")
    failures = 0
    together = sorted((one for one in chosen if not one.alone), key=lambda one: not one.slow)
    with ThreadPoolExecutor(JOBS) as pool:
        for future in as_completed([pool.submit(run_test, one) for one in together]):
            failures += report(*future.result())
    for one in chosen:
        if one.alone:
            failures += report(*run_test(one))
    return 1 if failures else 0


def report(lines, failed):
    print("\n".join(lines), flush=True)
    return failed
