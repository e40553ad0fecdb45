#!/usr/bin/env python3
"""Who is whom, through the program: pre-shared keys, who may come in, certificates that are optional, revoked, several or
renewed, keys from elsewhere, what testers look at. harness.py says how it runs."""

import calendar
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

from harness import (CERTS, OPENSSL, PROMPT, Authority, Skip, Tool, check, client_identity, equal, free_port, main,
                     openssl, split_addr, test, wait_until)  # noqa: E402

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
def small_devices(t):
    """The suite with short tags, which OpenSSL's own client offers only when it must."""
    for options, said in (((), "handshake failed: protocol error: no shared cipher$"),
                          (("--psk-ccm8",), " connected: a, PSK-AES128-CCM8, full handshake$")):
        server = t.server("--psk", f"a:{KEY}", *options)
        t.s_client(server, "-psk_identity", "a", "-psk", KEY, "-cipher", "PSK-AES128-CCM8:@SECLEVEL=0")
        server.err.wait(said)
        t.ping(server, "--psk", f"a:{KEY}", *options)  # who knows better suites uses them
        server.err.wait(" connected: a, ECDHE-PSK-CHACHA20-POLY1305, ")


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


@test
def advice_is_for_what_is_wrong(t):
    """Other certificates help where these are missing or expired, and nowhere else."""
    folder = pathlib.Path(t.path("folder"))
    folder.mkdir(0o700)
    for options, said in ((("--psk", "bad"), "hexadecimal digits"), (("--psk-file", "none"), "none: No such file or directory"),
                          (("--psk-file", folder), "folder: Is a directory"), (("--alpn", ","), "1 to 255 bytes"),
                          (("--crl", "none", "--psk", f"a:{KEY}"), "none: No such file or directory"),
                          (("--keylog", "none/keys"), "none/keys: No such file or directory"),
                          (("--keylog", folder), "folder: Is a directory"),
                          (("--key-password", "none"), "none: No such file or directory")):
        for certs in (CERTS, folder):
            if certs == CERTS or options[0] not in ("--alpn", "--key-password"):
                run = t.dtls("server", "--certs", certs, *options, "127.0.0.1:1")
                one_line(run, 1, said)
                check("make certs" not in run.err.text, f"advice for another case: {run.err.text}")
    one_line(t.dtls("server", "--certs", folder, "127.0.0.1:1"), 1, "server.pem", "'make certs' makes a set")


@test
def options_of_the_other_mode(t):
    """None may be passed over that says who is let in."""
    for mode, options in (("server", ["--no-cert"]), ("server", ["--insecure"]), ("client", ["--no-client-cert"]),
                          ("client", ["--optional-cert"]), ("client", ["--psk", f"a:{KEY}", "--psk", f"b:{KEY}"]),
                          ("client", ["--psk-file", psk_file(t, f"a:{KEY}")])):
        one_line(t.dtls(mode, "--certs", CERTS, *options, "127.0.0.1:1"), 2, options[0])


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
def nobody_has_no_name(t):
    folder = folder_without_client(t)
    server = t.server("--optional-cert", "--allow", "client")
    is_refused(t, server, "--no-cert", certs=folder)
    server.err.wait(r'refused: "" is not allowed \(--allow\)$')
    t.ping(server)
    t.ping(t.server("--optional-cert", "--deny", "client"), "--no-cert", certs=folder)


@test
def names_are_whole_and_exact(t):
    ours = t.authority()
    server = t.server("--allow", "alice", "--allow", "alice.example")
    for n, (cn, names) in enumerate((("alice.example.evil", "DNS:alice.example.evil"), ("Alice", "URI:urn:alice"),
                                     ("alic", "DNS:lice"), ("alice\\\\", "email:alice@example"))):
        is_refused(t, server, *ours.issue(f"n{n}", cn=cn, names=names).options)
        server.err.wait(r"refused: .* is not allowed \(--allow\)$", n + 1)


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
    is_refused(t, server, "--session", session, "--deny", "server", why=r'refused: "server" is denied \(--deny\)$')
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
    ours = t.authority()
    for identity, why in ((ours.issue("elsewhere", usage="serverAuth", names="DNS:elsewhere.example"), "IP address mismatch"),
                          (ours.issue("revoked", usage="serverAuth"), "certificate revoked")):
        crl = ("--crl", ours.revoke(identity)) if "revoked" in why else ()
        server = t.server(*identity.options)
        is_refused(t, server, *crl, why=f"certificate refused: {why}")
        t.ping(server, *crl, "--insecure").err.wait(f" not verified: {why}$")


@test
def an_insecure_session_is_no_proof(t):
    stranger = t.other_authority().issue("server", usage="serverAuth")
    server = t.server(*stranger.options, "--no-client-cert")
    session = t.path("session")
    for options in ((), ("--show-cert",)):
        t.ping(server, "--insecure", "--session", session, *options).err.wait(" not verified: .*")
        again = t.ping(server, "--insecure", "--session", session)
        again.err.wait("resumed session$")
        again.err.wait(" not verified: ")
        client = is_refused(t, server, "--session", session, why="certificate refused: unable to (verify|get)")
        equal(client.out.text, "", "what a server says that is not verified")
        os.unlink(session)


@test
def system_authorities(t):
    server = t.server("--no-client-cert")
    t.ping(server, "--ca", "system", "--no-cert", env={"SSL_CERT_FILE": f"{CERTS}/ca.pem"})
    is_refused(t, server, "--ca", "system", "--no-cert", why="certificate refused: ")


@test
def revoked_certificates(t):
    ours = t.authority()
    alice, bob = ours.issue("alice"), ours.issue("bob")
    crl = ours.revoke(bob)
    server = t.server("--crl", crl)
    t.ping(server, *alice.options)
    is_refused(t, server, *bob.options, why="refused by the peer: certificate revoked")
    server.err.wait("certificate refused: certificate revoked")
    server = t.server("--crl", t.other_authority().revoke())
    is_refused(t, server, *alice.options, why="refused by the peer: ")
    server.err.wait("certificate refused: unable to get certificate CRL")
    one_line(t.dtls("server", "--certs", CERTS, "--crl", t.path("none"), "127.0.0.1:1"), 1, "none: No such file")
    one_line(t.dtls("server", "--certs", CERTS, "--crl", alice.pem, "127.0.0.1:1"), 1, "no revocation list in PEM form")


@test
def a_session_is_as_good_as_its_certificate(t):
    """It was verified by other CAs and lists than those of now."""
    session = t.path("session")
    theirs = t.other_authority()
    server = t.server(*theirs.issue("server", usage="serverAuth").options, "--no-client-cert")
    t.ping(server, "--ca", theirs.pem, "--session", session)
    t.ping(server, "--ca", theirs.pem, "--session", session).err.wait("resumed session$")
    is_refused(t, server, "--session", session, why="certificate refused: unable to ")
    os.unlink(session)

    ours = t.authority()
    bad = ours.issue("bad", usage="serverAuth")
    server = t.server(*bad.options)
    t.ping(server, "--session", session, "--crl", ours.revoke())
    t.ping(server, "--session", session, "--crl", ours.revoke()).err.wait("resumed session$")
    is_refused(t, server, "--session", session, "--crl", ours.revoke(bad), why="certificate refused: certificate revoked$")
    os.unlink(session)

    below = Authority(t.path("below"), *theirs.issue("middle", ca=True))
    leaf, chain = below.issue("leaf", usage="serverAuth"), pathlib.Path(t.path("chain.pem"))
    chain.write_text(pathlib.Path(leaf.pem).read_text() + pathlib.Path(below.pem).read_text())
    server = t.server("--cert", chain, "--key", leaf.key, "--no-client-cert")
    for _ in range(2):  # in the file there is no intermediate, so nothing is resumed, and all is well
        t.ping(server, "--ca", theirs.pem, "--session", session).err.wait("full handshake$")


@test
def revocation_lists_that_are_too_old(t):
    ours = t.authority()
    alice = ours.issue("alice")
    crl = ours.revoke(seconds=1)

    def ended():
        shown = openssl("crl", "-in", crl, "-noout", "-nextupdate").strip().partition("=")[2]
        return time.time() > calendar.timegm(time.strptime(shown, "%b %d %H:%M:%S %Y GMT")) + 1

    wait_until(ended, "end of the list")
    server = t.server("--crl", crl)
    server.err.wait(r"crl\.pem: a revocation list in it is too old")
    is_refused(t, server, *alice.options, why="refused by the peer: ")
    server.err.wait("certificate refused: CRL has expired$")
    ours.revoke()
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    t.ping(server, *alice.options)
    equal(server.err.count("too old"), 1, "lines about old lists")


@test
def revoked_servers(t):
    ours = t.authority()
    good, bad = (ours.issue(name, usage="serverAuth") for name in ("good", "bad"))
    crl = ours.revoke(bad)
    t.ping(t.server(*good.options), "--crl", crl).err.wait(" connected: good, ")
    is_refused(t, t.server(*bad.options), "--crl", crl, why="certificate refused: certificate revoked$")


@test
def reload_of_what_is_no_good(t):
    """Each of these must leave all as it was, with one line that names the file."""
    ours = t.authority()
    old, new = (ours.issue(name, usage="serverAuth", cn=name) for name in ("old", "new"))
    expired = ours.expired("expired", usage="serverAuth")
    pem, key, ca, crl = (pathlib.Path(t.path(name)) for name in ("now.pem", "now.key", "now-ca.pem", "now-crl.pem"))
    good = {pem: old.pem, key: old.key, ca: f"{CERTS}/ca.pem", crl: ours.revoke()}
    for to, path in good.items():
        shutil.copy(path, to)
    server = t.server("--cert", pem, "--key", key, "--ca", ca, "--crl", crl, "--also", f"{pem},{key}")
    before = t.client(server)
    before.err.wait(" connected: old, ")
    for nth, (path, content, said) in enumerate((
            (pem, b"", "now.pem: empty"), (pem, b"x" * 1000000, "now.pem: no certificate in PEM form"),
            (pem, None, "now.pem: No such file"), (pem, expired.pem, "now.pem: the certificate expired on "),
            (pem, new.pem, r"now\.key: the key does not match .*now\.pem"), (key, b"", "now.key: empty"),
            (key, None, "now.key: No such file"), (ca, b"", "now-ca.pem: empty"), (ca, None, "now-ca.pem: No such file"),
            (ca, new.key, "now-ca.pem: no CA certificate in PEM form"), (crl, None, "now-crl.pem: No such file"),
            (crl, new.pem, "now-crl.pem: no revocation list in PEM form")), 1):
        path.unlink()
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else pathlib.Path(content).read_bytes())
        server.send_signal(signal.SIGHUP)
        server.err.wait("^not reloaded: ", nth)
        check(re.search(f"^not reloaded: .*{said}.*$", server.err.lines()[-1]), f"{said!r} is not in {server.err.lines()[-1]!r}")
        shutil.copy(good[path], path)
    t.ping(server).err.wait(" connected: old, ")
    before.ask("ping", "pong")
    other = ours.issue("other")  # a client's
    shutil.copy(other.pem, pem)
    shutil.copy(other.key, key)
    server.send_signal(signal.SIGHUP)
    server.err.wait("^not reloaded: .*certificate is not for a server", 1)
    shutil.copy(old.pem, pem)
    shutil.copy(old.key, key)
    t.ping(server).err.wait(" connected: old, ")
    one_line(t.dtls("server", "--certs", CERTS, "--also", ",".join(other), "127.0.0.1:1"), 1, "not for a server")
    equal(server.err.count("^not reloaded: "), 13, "lines that tell of a failed reload")
    equal(server.err.count("^reloaded$"), 0, "reloads")
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    before.ends()


@test
def reload_at_once(t):
    """Whoever saw that it listens may send the signal."""
    for _ in range(10):
        server = t.server()
        server.send_signal(signal.SIGHUP)
        server.err.wait("^reloaded$")


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
    crl = ours.revoke()
    server = t.server("--crl", crl, "--recheck")
    clients = [t.client(server, *who.options) for who in (alice, bob)]
    for client in clients:
        client.connected()
    ours.revoke(bob)
    server.send_signal(signal.SIGHUP)
    server.err.wait("closed: no longer trusted: certificate revoked$")
    clients[1].exits(1)
    clients[0].ask("ping", "pong")


@test
def recheck_of_a_chain(t):
    """Who resumed sent no intermediates, so he cannot be verified now: he has to connect anew, and nobody else has."""
    theirs = t.other_authority()
    below = Authority(t.path("below"), *theirs.issue("middle", ca=True))
    leaf, chain = below.issue("leaf"), pathlib.Path(t.path("chain.pem"))
    chain.write_text(pathlib.Path(leaf.pem).read_text() + pathlib.Path(below.pem).read_text())
    server = t.server("--ca", theirs.pem, "--recheck")
    options, session = ("--cert", chain, "--key", leaf.key), t.path("session")
    t.ping(server, *options, "--session", session)
    resumed, full = t.client(server, *options, "--session", session), t.client(server, *options)
    for client, how in ((resumed, "resumed session$"), (full, "full handshake$")):
        client.err.wait(how)
    server.err.wait("resumed session$")  # of a resumed handshake it hears the last word
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    server.err.wait(" closed: no longer trusted: unable to get local issuer certificate$")
    resumed.exits(1)
    full.ask("ping", "pong")
    t.ping(server, *options, "--session", session).err.wait("full handshake$")


@test
def recheck_closes_who_lost_a_key(t):
    keys = psk_file(t, f"a:{KEY}", f"b:{OTHER}")
    for options in ((), ("--recheck",)):
        psk_file(t, f"a:{KEY}", f"b:{OTHER}")
        server = t.server("--psk-file", keys, *options)
        a, b = t.client(server, "--psk", f"a:{KEY}"), t.client(server, "--psk", f"b:{OTHER}")
        a.connected()
        b.connected()
        psk_file(t, f"b:{OTHER}")
        server.send_signal(signal.SIGHUP)
        server.err.wait("^reloaded$")
        if options:
            server.err.wait(" closed: no longer trusted: its pre-shared key is no longer known$")
            a.exits(1)
        else:
            a.ask("ping", "pong")
        b.ask("ping", "pong")


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
    for offered, chosen in (("echo,coap", "coap"), ("mqtt,echo", "echo")):  # the server's order counts
        foreign = t.s_client(server, "-alpn", offered, identity=client_identity())
        foreign.out.wait(f"^ALPN protocol: {chosen}$")
    for names, said in ((",", "1 to 255 bytes"), ("coap,", "1 to 255 bytes"), ("x" * 256, "1 to 255 bytes"),
                        ("ab," * 2000, "at most")):
        for mode in ("server", "client"):
            one_line(t.dtls(mode, "--certs", CERTS, "--alpn", names, "127.0.0.1:1"), 1, "alpn", said)


# ---- keys from elsewhere ---------------------------------------------------------------------------------------------


@test
def keys_with_a_password(t):
    key, word = t.path("locked.key"), pathlib.Path(t.path("word"))
    openssl("pkcs8", "-topk8", "-in", f"{CERTS}/server.key", "-out", key, "-passout", "pass:open sesame")
    word.write_text("open sesame\n")
    t.ping(t.server("--cert", f"{CERTS}/server.pem", "--key", key, "--key-password", str(word)))
    word.write_text("wrong\n")
    word.write_text("open sesame\r\nand what stands below does not count")
    t.ping(t.server("--cert", f"{CERTS}/server.pem", "--key", key, "--key-password", str(word)))
    server = t.server("--also", f"{CERTS}/server.pem,{key}", "--key-password", str(word))
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    word.write_text("wrong\n")
    server.send_signal(signal.SIGHUP)
    server.err.wait("^not reloaded: .*locked.key: .*another password$")
    t.ping(server)
    for text in ("", "\n", " open sesame\n", "x" * 100000):
        word.write_text(text)
        run = t.dtls("server", "--certs", CERTS, "--cert", f"{CERTS}/server.pem", "--key", key, "--key-password", str(word),
                     "127.0.0.1:1")
        one_line(run, 1, "locked.key", "another password")
    for options, said in ((["--key-password", str(word)], "another password"), ([], "'openssl pkey' removes it")):
        run = t.dtls("server", "--certs", CERTS, "--cert", f"{CERTS}/server.pem", "--key", key, *options, "127.0.0.1:1")
        one_line(run, 1, "locked.key", said)


@test
def keys_from_a_store(t):
    version = subprocess.run([OPENSSL, "version"], stdout=subprocess.PIPE, check=True).stdout.decode()
    if version.startswith("OpenSSL 1"):
        raise Skip("OpenSSL 1.1.1 has no store that reads keys")
    t.ping(t.server("--cert", f"{CERTS}/server.pem", "--key", f"file:{os.path.abspath(CERTS)}/server.key"))
    key, word = t.path("locked.key"), pathlib.Path(t.path("word"))
    openssl("pkcs8", "-topk8", "-in", f"{CERTS}/server.key", "-out", key, "-passout", "pass:open sesame")
    word.write_text("open sesame\n")
    locked = ["--cert", f"{CERTS}/server.pem", "--key", f"file:{key}"]
    t.ping(t.server(*locked, "--key-password", str(word)))
    one_line(t.dtls("server", "--certs", CERTS, *locked, "127.0.0.1:1"), 1, "locked.key")
    one_line(t.dtls("server", "--certs", CERTS, "--cert", f"{CERTS}/server.pem", "--key",
                    f"file:{os.path.abspath(CERTS)}/client.key", "127.0.0.1:1"), 1, "client.key", "does not match", "server.pem")
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
    equal(stat.S_IMODE(log.stat().st_mode), 0o600, "mode of the log of secrets")
    check(re.fullmatch(r"CLIENT_RANDOM [0-9a-f]{64} [0-9a-f]{96}\n", log.read_text()), f"logged {log.read_text()!r}")
    one_line(t.dtls("client", "--certs", CERTS, "--keylog", t.path("none/keys"), "127.0.0.1:1"), 1, "none/keys: No such file")


@test
def both_sides_log_the_same_secret(t):
    logs = [pathlib.Path(t.path(name)) for name in ("server-keys", "client-keys")]
    server = t.server("--keylog", str(logs[0]))
    relay = t.relay(server)
    t.ping(relay, "--keylog", str(logs[1]))
    server.err.wait(" closed: ")
    equal(logs[0].read_text(), logs[1].read_text(), "what server and client log")
    hello = relay.handshake(to_server=True)[0].data  # record, message, version, then the random
    equal(logs[0].read_text().split()[1], hello[27:59].hex(), "the random that is logged")
    foreign = t.path("foreign-keys")
    t.s_client(server, "-keylogfile", foreign, identity=client_identity())
    server.connected(2)
    wait_until(lambda: os.path.exists(foreign) and "CLIENT_RANDOM" in pathlib.Path(foreign).read_text(), "its secrets")
    line = [line for line in pathlib.Path(foreign).read_text().splitlines() if line.startswith("CLIENT_RANDOM")][0]
    check(line in logs[0].read_text().splitlines(), "OpenSSL logs another secret")


@test
def wireshark_decrypts(t):
    if not shutil.which("tshark") or os.geteuid() != 0:
        raise Skip("no tshark, or not root")
    log, capture = t.path("keys"), t.path("capture.pcap")
    server = t.server()
    port, marks = split_addr(server.addr)[1], free_port()
    sniffer = Tool(t, shutil.which("tshark"), "-l", "-P", "-i", "lo", "-f", f"udp port {port} or udp port {marks}", "-w", capture,
                   "-F", "pcap", "-n")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

        def mark(size):  # what was sent before it is captured when it is
            sock.sendto(bytes(size), ("127.0.0.1", marks))
            return sniffer.out.count(f"UDP {size + 42} ")

        wait_until(lambda: mark(700), "capture")
        client = t.client(server, "--keylog", log)
        client.ask("echo a secret in the capture", "a secret in the capture")
        client.ends()
        wait_until(lambda: mark(900), "end of the capture")
    sniffer.send_signal(signal.SIGINT)
    sniffer.reap(20)
    raw = pathlib.Path(capture).read_bytes()
    check(b"a secret in the capture" not in raw, "it was sent in the clear")
    shown = subprocess.run(["tshark", "-r", capture, "-o", f"tls.keylog_file:{log}", "-d", f"udp.port=={port},dtls", "-x"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=True).stdout.decode()
    check("Decrypted DTLS" in shown, "tshark decrypts nothing")
    check(b"a secret in the capture".hex() in "".join(re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ){1,16})", shown, re.M))
          .replace(" ", ""), "the message is not in what tshark decrypts")


@test
def sessions_are_kept(t):
    server = t.server("--psk", f"a:{KEY}")
    session = pathlib.Path(t.path("session"))
    for options in ((), ("--psk", f"a:{KEY}")):
        t.ping(server, *options, "--session", str(session)).err.wait("full handshake$")
        t.ping(server, *options, "--session", str(session)).err.wait("resumed session$")
        check(b"BEGIN SSL SESSION" in session.read_bytes(), "no session in the file")
        session.unlink()
    old = session.with_name("old")
    t.ping(server, "--session", str(old))
    server.send_signal(signal.SIGHUP)
    server.err.wait("^reloaded$")
    t.ping(server, "--session", str(old)).err.wait("full handshake$")  # the server knows it no more
    t.ping(server, "--session", str(old)).err.wait("resumed session$")
    t.ping(server, "--psk", f"a:{KEY}", "--session", str(old)).err.wait("full handshake$")  # a client with other means
    t.ping(server, "--session", str(old)).err.wait("full handshake$")
    t.ping(server, "--session", str(old), "--name", "localhost").err.wait("(full handshake|resumed session)$")
    is_refused(t, server, "--session", str(old), "--name", "none.example", why="none.example was wanted")
    client = t.ping(server, "--session", t.path("none/session"))
    client.err.wait("^dtls: .*none/session: the session cannot be written: No such file or directory$")
    old.chmod(0o644)
    t.ping(server, "--session", str(old))
    equal(stat.S_IMODE(old.stat().st_mode), 0o600, "mode of a session's file that was there")


@test
def files_that_are_no_sessions(t):
    server, file = t.server(), pathlib.Path(t.path("file"))
    locked = (b"-----BEGIN SSL SESSION PARAMETERS-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,"
              + b"00" * 16 + b"\n\nAAAAAAAAAAAAAAAAAAAAAA==\n-----END SSL SESSION PARAMETERS-----\n")
    for content in (b"x", b"\0" * 1000000, pathlib.Path(f"{CERTS}/client.key").read_bytes(), locked):
        file.write_bytes(content)
        one_line(t.client(server, "--session", str(file), stdin=b"ping\n"), 1, "file: no session in it")
        check(file.read_bytes() == content, "it was written over")
    file.write_bytes(b"")
    t.ping(server, "--session", str(file))
    t.ping(server, "--session", str(file)).err.wait("resumed session$")
    one_line(t.client(server, "--session", t.tmp, stdin=b"ping\n"), 1, t.tmp, "Is a directory")


@test
def certificates_that_expire(t):
    end = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 3.5 * 86400))
    soon = t.authority().issue("soon", usage="serverAuth", end=end)
    server = t.server(*soon.options)
    server.err.wait(r"soon\.pem: a certificate in it expires in 3 days$")
    t.ping(server)  # it is only told
    fresh = t.server("--also", ",".join(soon))
    fresh.err.wait(r"soon\.pem: a certificate in it expires in 3 days$")
    equal(fresh.err.count("expires in"), 1, "lines about certificates that expire")
    for nth in (2, 3):
        fresh.send_signal(signal.SIGHUP)
        fresh.err.wait("expires in 3 days$", nth)
    lasting = t.server()
    t.ping(lasting)
    check("expires" not in lasting.err.text, "one that lasts is told of")


@test
def what_systemd_hears(t):
    keys = psk_file(t, f"a:{KEY}")
    for address in (t.path("notify"), "@" + t.path("notify")):  # a file, and an abstract one
        if address.startswith("@") and sys.platform != "linux":
            continue
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears:
            hears.bind("\0" + address[1:] if address.startswith("@") else address)
            hears.settimeout(PROMPT)
            server = t.server("--psk-file", keys, env={"NOTIFY_SOCKET": address})
            equal(hears.recv(200), b"READY=1", "what it says first")
            for mode in (0o600, 0o644, 0o600):  # whether it can reload or not, it is ready again
                os.chmod(keys, mode)
                before = time.clock_gettime(time.CLOCK_MONOTONIC)
                server.send_signal(signal.SIGHUP)
                said = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", hears.recv(200))
                check(said, "no RELOADING=1")
                check(before <= int(said[1]) / 1e6 + 1e-5 <= time.clock_gettime(time.CLOCK_MONOTONIC) + 1e-5, "another clock")
                equal(hears.recv(200), b"READY=1", "what it says when it has reloaded")
            server.stop()
            equal(hears.recv(200), b"STOPPING=1", "what it says last")
    server = t.server(env={"NOTIFY_SOCKET": t.path("nobody")})  # nobody listens there: no reason to stop
    t.ping(server)
    server.err.wait("nobody: ")


@test
def show_what_is_wrong(t):
    ours = t.authority()
    odd = ours.issue("odd", usage="serverAuth", cn="odd\x1b[31m", names="DNS:odd.example,URI:urn:x\x1b]0;x")
    server = t.server(*odd.options)
    client = t.ping(server, "--show-cert", "--name", "odd.example")
    client.err.wait_line("good")
    check("\x1b" not in client.err.text, "a certificate writes to the terminal")
    is_refused(t, server, "--show-cert", why="^refused: IP address mismatch, certificate 0$")
    t.ping(server, "--show-cert", "--insecure").err.wait("^refused: IP address mismatch, certificate 0$")
    t.ping(t.server("--show-cert")).err.wait(" connected: ")
    server = t.server("--show-cert")
    is_refused(t, server, *t.other_authority().issue("stranger").options, why="refused by the peer: unknown CA")
    server.err.wait("^  subject    CN=stranger$")
    server.err.wait("^refused: .*, certificate 0$")


if __name__ == "__main__":
    sys.exit(main())
