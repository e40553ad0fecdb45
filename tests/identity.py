#!/usr/bin/env python3
"""Who is whom, through the program: pre-shared keys, who may come in, certificates that are optional, revoked, several or
renewed, keys from elsewhere, what testers look at. harness.py says how it runs."""

import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

sys.dont_write_bytecode = True  # no __pycache__ in the tree

from harness import (CERTS, OPENSSL, PROMPT, Skip, check, equal, main, openssl, split_addr, test,
                     wait_until)  # noqa: E402

KEY = "00112233445566778899aabbccddeeff"
OTHER = "ff" * 32
DENIED = "handshake failed: refused by the peer: access denied$"
REFUSAL_WAIT = 20.0  # believed after some seconds of silence, and tried again


def one_line(run, status, *words):
    """One line that starts with our name and has these words."""
    run.exits(status)
    lines = [line for line in run.err.lines() if line]
    check(len(lines) == 1 and lines[0].startswith("dtls: "), f"not one line: {lines}")
    for word in words:
        check(word in lines[0], f"{word!r} is not in {lines[0]!r}")


def is_refused(t, server, *options, why=DENIED, **more):
    client = t.client(server, *options, stdin=b"ping\n", **more)
    client.exits(1, timeout=REFUSAL_WAIT)
    client.err.wait(why)
    return client


def psk_file(t, *lines, mode=0o600, name="psk.txt"):
    path = pathlib.Path(t.path(name))
    path.write_text("".join(line + "\n" for line in lines))
    path.chmod(mode)
    return str(path)


def folder_without_client(t):
    """A folder like CERTS with nothing but the CA's certificate."""
    folder = pathlib.Path(t.path("only-ca"))
    folder.mkdir()
    shutil.copy(f"{CERTS}/ca.pem", folder)
    return str(folder)


# ---- pre-shared keys -------------------------------------------------------------------------------------------------


@test
def keys_from_the_command_line_and_a_file(t):
    file = psk_file(t, "# a comment", "", f"sensor:1:{KEY}", f"other:{OTHER}")
    server = t.server("--psk", f"first:{KEY.upper()}", "--psk-file", file)
    for identity, key in (("first", KEY), ("sensor:1", KEY), ("other", OTHER)):
        t.ping(server, "--psk", f"{identity}:{key}")
        server.err.wait(f" connected: {identity}, ECDHE-PSK-CHACHA20-POLY1305, full handshake$")
    t.ping(server)  # certificates beside them
    server.err.wait(r" connected: client, ECDHE-ECDSA")
    client = t.client(server, "--psk", f"first:{KEY}")
    client.send("stats")
    client.out.wait(r"^127\.0\.0\.1:\d+ first, ")
    client.ends()


@test
def keys_without_any_certificate(t):
    os.mkdir(t.path("empty"))
    server = t.server("--psk", f"a:{KEY}", certs=t.path("empty"))
    t.ping(server, "--psk", f"a:{KEY}", certs=t.path("empty"))
    is_refused(t, server, why="refused by the peer: handshake failure")  # certificates only


def wrong_key(t, key, said):
    server = t.server("--psk", f"a:{KEY}")
    client = t.client(server, "--psk", key, "-v", stdin=b"ping\n")
    client.exits(1, timeout=45)
    client.err.wait(r"timed out after 30\.\d s")
    server.err.wait(said)


@test(slow=True)
def wrong_key_is_met_by_silence(t):
    wrong_key(t, f"a:{OTHER}", "the pre-shared key may be wrong, for identity a$")


@test(slow=True)
def unknown_identity_is_met_by_silence(t):
    wrong_key(t, f"b:{OTHER}", "no pre-shared key is known, for identity b$")


@test
def bad_keys(t):
    for text in ("", "a", "a:", f":{KEY}", "a:0", "a:xy", "a:" + "00" * 65, "x" * 128 + ":00"):
        run = t.dtls("client", f"--psk={text}", "127.0.0.1:1")
        one_line(run, 1 if text else 2, "--psk", "" if not text else "IDENTITY:HEX")
        check(KEY not in run.err.text, "a key is shown")
    for lines, mode, said in (([f"a:{KEY}"], 0o640, "chmod 600"), ([f"a:{KEY}", "b"], 0o600, "line 2: not IDENTITY:HEX"),
                              ([f"a:{KEY}", f"a:{KEY}"], 0o600, "line 2: this identity has a key already"),
                              (["a:" + "0" * 500], 0o600, "line 1: too long")):
        file = psk_file(t, *lines, mode=mode)
        run = t.dtls("server", "--psk-file", file, "--certs", CERTS, "127.0.0.1:1")
        one_line(run, 1, "psk.txt", said)
        check(KEY not in run.err.text, "a key is shown")
    one_line(t.dtls("server", "--psk-file", t.path("none"), "127.0.0.1:1"), 1, "none", "No such file")


# ---- who may come in -------------------------------------------------------------------------------------------------


@test
def allow_and_deny(t):
    ours = t.authority()
    alice = ours.issue("alice", names="DNS:alice.example,URI:urn:dev:alice")
    bob = ours.issue("bob", names="DNS:bob.example")
    for options, good, bad in ((("--allow", "alice"), alice, bob), (("--allow", "alice.example"), alice, bob),
                               (("--allow", "URI:urn:dev:alice", "--allow", "x"), alice, bob), (("--deny", "bob"), alice, bob),
                               (("--deny", "DNS:bob.example"), alice, bob)):
        server = t.server(*options)
        t.ping(server, *good.options)
        is_refused(t, server, *bad.options)
        server.err.wait(r'handshake failed: refused: "bob" is (denied \(--deny\)|not allowed \(--allow\))$')
    server = t.server("--psk", f"a:{KEY}", "--psk", f"b:{KEY}", "--deny", "b")
    t.ping(server, "--psk", f"a:{KEY}")
    is_refused(t, server, "--psk", f"b:{KEY}")


@test
def a_client_chooses_its_server(t):
    server = t.server()
    t.ping(server, "--allow", "server")
    client = is_refused(t, server, "--deny", "server", why=r'refused: "server" is denied')
    equal(client.out.text, "", "what a refused server says")


@test
def refused_also_with_a_session(t):
    session = t.path("session")
    server = t.server()
    port = split_addr(server.addr)[1]
    t.ping(server, "--session", session)
    again = t.ping(server, "--session", session)
    again.err.wait("resumed session$")
    equal(stat.S_IMODE(os.stat(session).st_mode), 0o600, "mode of the session's file")
    server.stop()
    server = t.server("--deny", "client", port=port)
    is_refused(t, server, "--session", session)


# ---- certificates ----------------------------------------------------------------------------------------------------


@test
def optional_and_absent_certificates(t):
    folder = folder_without_client(t)
    stranger = t.other_authority().issue("stranger")
    optional, unasked, strict = t.server("--optional-cert"), t.server("--no-client-cert"), t.server()
    for server in (optional, unasked):
        t.ping(server, "--no-cert", certs=folder)
        server.err.wait(r" connected: , ECDHE")
        t.ping(server)
    optional.err.wait(r" connected: client, ")
    is_refused(t, optional, *stranger.options, why="refused by the peer: unknown CA")
    t.ping(unasked, *stranger.options)  # it is not asked for it
    is_refused(t, strict, "--no-cert", certs=folder, why="refused by the peer: handshake failure")


@test
def insecure_tells_what_is_wrong(t):
    stranger = t.other_authority().issue("server", usage="serverAuth")
    server = t.server(*stranger.options, "--no-client-cert")
    is_refused(t, server, why="certificate refused: ")
    client = t.ping(server, "--insecure")
    client.err.wait("not verified: .*(issuer|first certificate)")
    os.mkdir(t.path("empty"))
    t.ping(server, "--insecure", certs=t.path("empty"))


@test
def system_authorities(t):
    server = t.server("--no-client-cert")
    os.environ["SSL_CERT_FILE"] = f"{CERTS}/ca.pem"
    try:
        t.ping(server, "--ca", "system", "--no-cert")
    finally:
        del os.environ["SSL_CERT_FILE"]
    is_refused(t, server, "--ca", "system", "--no-cert", why="certificate refused: ")


def revocation_list(authority, *revoked, days="9", name="crl.pem"):
    """What the CA revokes; authority.issue() wrote the configuration and the database."""
    config = next(path for path in authority.folder.glob("*.cnf") if "default_ca" in path.read_text())
    for identity in revoked:
        openssl("ca", "-config", config, "-cert", authority.pem, "-keyfile", authority.key, "-revoke", identity.pem)
    out = authority.folder / name
    openssl("ca", "-config", config, "-cert", authority.pem, "-keyfile", authority.key, "-gencrl", *days.split(), "-out", out)
    return str(out)


@test
def revoked_certificates(t):
    ours = t.authority()
    alice, bob = ours.issue("alice"), ours.issue("bob")
    crl = revocation_list(ours, bob, days="-crldays 9")
    server = t.server("--crl", crl)
    t.ping(server, *alice.options)
    is_refused(t, server, *bob.options, why="refused by the peer: certificate revoked")
    server.err.wait("certificate refused: certificate revoked")
    theirs = t.other_authority()
    theirs.issue("anybody")
    server = t.server("--crl", revocation_list(theirs, days="-crldays 9"))
    is_refused(t, server, *alice.options, why="refused by the peer: ")
    server.err.wait("certificate refused: unable to get certificate CRL")
    one_line(t.dtls("server", "--certs", CERTS, "--crl", t.path("none"), "127.0.0.1:1"), 1, "none: No such file")
    one_line(t.dtls("server", "--certs", CERTS, "--crl", alice.pem, "127.0.0.1:1"), 1, "no revocation list in PEM form")


@test
def reload_without_a_gap(t):
    ours = t.authority()
    first, second = (ours.issue(name, usage="serverAuth", cn=name) for name in ("first", "second"))
    pem, key = t.path("now.pem"), t.path("now.key")
    shutil.copy(first.pem, pem)
    shutil.copy(first.key, key)
    keys = psk_file(t, f"a:{KEY}")
    server = t.server("--cert", pem, "--key", key, "--psk-file", keys)
    session = t.path("session")
    before = t.client(server)
    before.err.wait(" connected: first, ")
    t.ping(server, "--session", session)

    shutil.copy(second.pem, pem)  # with the first one's key
    server.send_signal(signal.SIGHUP)
    server.err.wait(r"^not reloaded: .*now\.key: the key does not match .*now\.pem$")
    t.ping(server).err.wait(" connected: first, ")

    shutil.copy(second.key, key)
    psk_file(t, f"b:{OTHER}")
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    before.ask("ping", "pong")
    t.ping(server).err.wait(" connected: second, ")
    t.ping(server, "--session", session).err.wait(" connected: second, .*, full handshake$")
    t.ping(server, "--psk", f"b:{OTHER}")

    os.chmod(keys, 0o644)
    server.send_signal(signal.SIGHUP)
    server.err.wait("^not reloaded: .*psk.txt: .*chmod 600")
    t.ping(server, "--psk", f"b:{OTHER}")
    before.ends()


@test
def recheck_closes_the_revoked(t):
    ours = t.authority()
    alice, bob = ours.issue("alice"), ours.issue("bob")
    crl = revocation_list(ours, days="-crldays 9")
    server = t.server("--crl", crl, "--recheck")
    clients = [t.client(server, *who.options) for who in (alice, bob)]
    for client in clients:
        client.connected()
    revocation_list(ours, bob, days="-crldays 9")
    server.send_signal(signal.SIGHUP)
    server.err.wait("closed: no longer trusted: certificate revoked$")
    clients[1].exits(1)
    clients[0].ask("ping", "pong")


@test
def several_names(t):
    ours = t.authority()
    one, two = (ours.issue(name, usage="serverAuth", names=f"DNS:{name}.example") for name in ("one", "two"))
    for strict in ((), ("--strict-names",)):
        server = t.server("--also", f"{one.pem},{one.key}", "--also", f"{two.pem},{two.key}", *strict)
        session = t.path("session" + str(len(strict)))
        t.ping(server, "--name", "one.example").err.wait(" connected: one, ")
        t.ping(server, "--name", "two.example", "--session", session).err.wait(" connected: two, ")
        t.ping(server, "--name", "two.example", "--session", session).err.wait("resumed session$")
        t.ping(server, "--name", "localhost").err.wait(" connected: server, ")
        t.ping(server).err.wait(" connected: server, ")  # by its address: no name is asked for
        is_refused(t, server, "--name", "none.example",
                   why="refused by the peer: unrecognized name" if strict else "hostname mismatch: none.example was wanted")
    one_line(t.dtls("server", "--certs", CERTS, "--also", one.pem, "127.0.0.1:1"), 1, "--also", "not CERT,KEY")
    one_line(t.dtls("server", "--certs", CERTS, "--also", f"{one.pem},{two.key}", "127.0.0.1:1"), 1, "does not match")


@test
def application_protocols(t):
    server = t.server("--alpn", "coap,echo")
    t.ping(server, "--alpn", "echo")
    t.ping(server)
    is_refused(t, server, "--alpn", "mqtt", why="refused by the peer: no application protocol")


# ---- keys from elsewhere ---------------------------------------------------------------------------------------------


@test
def keys_with_a_password(t):
    key, word = t.path("locked.key"), pathlib.Path(t.path("word"))
    openssl("pkcs8", "-topk8", "-in", f"{CERTS}/server.key", "-out", key, "-passout", "pass:open sesame")
    word.write_text("open sesame\n")
    t.ping(t.server("--cert", f"{CERTS}/server.pem", "--key", key, "--key-password", str(word)))
    word.write_text("wrong\n")
    for options, said in ((["--key-password", str(word)], "another password"), ([], "'openssl pkey' removes it"),
                          (["--key-password", t.path("none")], "another password")):
        run = t.dtls("server", "--certs", CERTS, "--cert", f"{CERTS}/server.pem", "--key", key, *options, "127.0.0.1:1")
        one_line(run, 1, "locked.key", said)


@test
def keys_from_a_store(t):
    version = subprocess.run([OPENSSL, "version"], stdout=subprocess.PIPE, check=True).stdout.decode()
    if version.startswith("OpenSSL 1"):
        raise Skip("OpenSSL 1.1.1 has no store that reads keys")
    t.ping(t.server("--cert", f"{CERTS}/server.pem", "--key", f"file:{os.path.abspath(CERTS)}/server.key"))
    for uri in ("pkcs11:object=none", f"file:{os.path.abspath(CERTS)}/none.key"):
        run = t.dtls("server", "--certs", CERTS, "--cert", f"{CERTS}/server.pem", "--key", uri, "127.0.0.1:1")
        one_line(run, 1, uri[:20], "openssl storeutl")


# ---- for testers -----------------------------------------------------------------------------------------------------


@test
def certificates_are_shown(t):
    server = t.server()
    client = t.ping(server, "--show-cert")
    for line in ("certificate 0", "  subject    CN=server", "  name       DNS:localhost", "  name       IP:127.0.0.1",
                 "  key        EC, 256 bits", "  signature  ecdsa-with-SHA256", "good"):
        client.err.wait_line(line)
    stranger = t.other_authority().issue("stranger", usage="serverAuth")
    server = t.server(*stranger.options)
    client = is_refused(t, server, "--show-cert", why="certificate refused: ")
    client.err.wait("^refused: .*, certificate 0$")


@test
def secrets_are_logged(t):
    log = pathlib.Path(t.path("keys"))
    server = t.server()
    t.ping(server, "--keylog", str(log))
    check(re.fullmatch(r"CLIENT_RANDOM [0-9a-f]{64} [0-9a-f]{96}\n", log.read_text()), f"logged {log.read_text()!r}")
    one_line(t.dtls("client", "--certs", CERTS, "--keylog", t.path("none/keys"), "127.0.0.1:1"), 1, "none/keys: No such file")


@test
def wireshark_decrypts(t):
    if not shutil.which("tshark") or os.geteuid() != 0:
        raise Skip("no tshark, or not root")
    log, capture = t.path("keys"), t.path("capture.pcap")
    server = t.server()
    port = split_addr(server.addr)[1]
    sniffer = subprocess.Popen(["tshark", "-q", "-i", "lo", "-f", f"udp port {port}", "-w", capture, "-F", "pcap"],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: b"Capturing on" in sniffer.stderr.readline(), "tshark captures")
        time.sleep(0.5)  # it says so a little early
        client = t.client(server, "--keylog", log)
        client.ask("echo a secret in the capture", "a secret in the capture")
        client.ends()
        time.sleep(0.5)
    finally:
        sniffer.send_signal(signal.SIGINT)
        sniffer.wait(20)
    shown = subprocess.run(["tshark", "-r", capture, "-o", f"tls.keylog_file:{log}", "-d", f"udp.port=={port},dtls",
                            "-x"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60).stdout.decode()
    check("Decrypted DTLS" in shown, "tshark decrypts nothing")


@test
def certificates_that_expire(t):
    end = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 3.5 * 86400))
    soon = t.authority().issue("soon", usage="serverAuth", end=end)
    server = t.server(*soon.options)
    server.err.wait(r"soon\.pem: a certificate in it expires in 3 days$")
    check("expires" not in t.server().err.text, "one that lasts is told of")


@test
def what_systemd_hears(t):
    path = t.path("notify")
    hears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    hears.bind(path)
    hears.settimeout(PROMPT)
    os.environ["NOTIFY_SOCKET"] = path
    try:
        server = t.server()
    finally:
        del os.environ["NOTIFY_SOCKET"]
    equal(hears.recv(200), b"READY=1", "what it says first")
    server.send_signal(signal.SIGHUP)
    check(re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", hears.recv(200)), "no RELOADING=1")
    equal(hears.recv(200), b"READY=1", "what it says when it has reloaded")
    server.stop()
    equal(hears.recv(200), b"STOPPING=1", "what it says last")
    hears.close()


if __name__ == "__main__":
    sys.exit(main())
