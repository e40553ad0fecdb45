#!/usr/bin/env python3
"""Branch coverage of dtls.c's library part by all tests together, with gcc and gcov.

    python3 tests/coverage.py CERTS_DIR        some minutes; builds in tests/build/coverage

Each test program is built with --coverage and runs; what each of them took of a branch is added up. Prints the share of
branches taken and, by line, those that were not, with the reason that tests/uncovered.txt gives. Fails where the share is
below the goal, and where a branch that was not taken has no reason.
"""

import collections
import gzip
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "tests/build/coverage"
REASONS = ROOT / "tests/uncovered.txt"
GOAL_PERCENT = 92
LIMIT_S = 900  # for each program
FAULTS = '"$0" "$1" quick && "$0" "$1" all 0 20'  # samples, and one in twenty of all: OpenSSL's own are many

Program = collections.namedtuple("Program", "name sources flags libs command")


def pkg_config(package, otherwise):
    found = subprocess.run(["pkg-config", "--cflags", "--libs", package], stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
    return shlex.split(found.stdout.decode()) if found.returncode == 0 else otherwise


LIBSSL = ["-pthread", *pkg_config("openssl", ["-lssl", "-lcrypto"])]
LIBEDIT = pkg_config("libedit", ["-ledit"])


def wraps():
    """What tests/faults.c wants to have put in front of the system's functions."""
    words = re.findall(r"^ \* wrap: (.*)$", (ROOT / "tests/faults.c").read_text(), re.M)
    return [f"-Wl,--wrap={word}" for line in words for word in line.split()]


def programs(certs):
    def make(name, *sources, flags=(), libs=(), command=()):
        return Program(name, ["dtls.c", *sources], ["-pthread", *flags], [*LIBSSL, *libs],
                       command or [str(BUILD / name / "program"), certs])

    yield make("unit", "tests/unit.c", libs=LIBEDIT)._replace(sources=["tests/unit.c"])
    yield make("edges", "tests/edges.c")
    yield make("odd", "tests/odd.c")
    yield make("standards", "tests/standards.c")
    yield make("anew", "tests/anew.c")
    yield make("trust", "tests/trust.c")
    yield make("moves", "tests/moves.c")
    yield make("keyholder", "tests/keyholder.c", command=[str(BUILD / "keyholder/program")])
    yield make("memory", "tests/memory.c")
    yield make("loops", "tests/loops.c")
    yield make("simulate", "tests/simulate.c", command=[str(BUILD / "simulate/program"), "150"])
    yield make("faults", "tests/faults.c", flags=wraps(), command=["sh", "-c", FAULTS, str(BUILD / "faults/program"), certs])
    for target in ("server", "client", "addr", "cid"):
        inputs = sorted(str(path) for path in (ROOT / "tests/corpus" / target).iterdir())
        program = make(f"fuzz-{target}", f"tests/fuzz_{target}.c", "tests/fuzz_replay.c",
                       command=[str(BUILD / f"fuzz-{target}/program"), *inputs])
        # That of connection IDs has the library inside.
        yield program if target != "cid" else program._replace(sources=program.sources[1:])
    yield make("e2e", flags=["-DDTLS_MAIN"], libs=LIBEDIT,
               command=["sh", "-c", f"{sys.executable} tests/e2e.py && {sys.executable} tests/identity.py && {sys.executable} tests/roam.py"])


def build(program):
    folder = BUILD / program.name
    folder.mkdir(parents=True)
    objects = []
    for source in program.sources:
        objects.append(str(folder / (pathlib.Path(source).stem + ".o")))
        subprocess.run(["gcc", "-O0", "-g", "--coverage", "-fprofile-update=atomic", *program.flags, "-I.",
                        "-c", "-o", objects[-1], source], cwd=ROOT, check=True)
    subprocess.run(["gcc", "--coverage", *program.flags, "-o", folder / "program", *objects, *program.libs], cwd=ROOT,
                   check=True)


def run(program, certs):
    """The tests' own verdicts are not asked for again, but a program that fails covers what it should not."""
    env = {**os.environ, "CERTS_DIR": certs, "DTLS_BIN": str(BUILD / "e2e/program")}
    with open(BUILD / program.name / "log", "wb") as log:
        done = subprocess.run(program.command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log,
                              stderr=subprocess.STDOUT, timeout=LIMIT_S)
    if done.returncode:
        print(f"not ok - coverage: {program.name} fails under gcov: status {done.returncode}, see {log.name}", flush=True)
    return done.returncode == 0


def gather(program, taken, texts):
    """Adds what one program took: {(line, branch): times}, and each line's function."""
    folder = BUILD / program.name
    for data in folder.glob("*.gcda"):
        subprocess.run(["gcov", "--json-format", "--branch-probabilities", data.name], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)
    for report in folder.glob("*.gcov.json.gz"):
        for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
            if pathlib.Path(file["file"]).name != "dtls.c":
                continue
            for line in file["lines"]:
                texts[line["line_number"]] = line.get("function_name", "")
                for i, branch in enumerate(line["branches"]):
                    taken[line["line_number"], i] += branch["count"]


def read_reasons():
    """{(function, text of the line): reason}; each is `function: text ## reason`, and what starts with # is a remark."""
    reasons = {}
    for line in REASONS.read_text().splitlines():
        if line and not line.startswith("#"):
            place, reason = line.rsplit(" ## ", 1)
            function, text = place.split(": ", 1)
            reasons[function, text.strip()] = reason
    return reasons


def report(taken, functions):
    source = (ROOT / "dtls.c").read_text().splitlines()
    end = next(number for number, line in enumerate(source, 1) if line.startswith("#ifdef DTLS_MAIN"))
    library = {place: count for place, count in taken.items() if place[0] < end}
    missed = sorted({line for (line, _), count in library.items() if count == 0})
    share = 100 * sum(count > 0 for count in library.values()) / len(library)
    reasons, unexplained = read_reasons(), 0
    for line in missed:
        function, text = functions[line], source[line - 1].strip()
        reason = reasons.pop((function, text), None)
        unexplained += reason is None
        print(f"# coverage: {line}: {function}: {text}: {reason or 'no reason given'}")
    print(f"# coverage: {share:.1f} % of {len(library)} branches in the library part of dtls.c were taken, "
          f"{len(missed)} lines have some that were not")
    lines = {line.strip() for line in source}
    for function, text in reasons:  # what the faults' sample takes depends on the OpenSSL: those may be covered
        if text not in lines:
            print(f"# coverage: reason for a line that is gone: {function}: {text}")
    good = share >= GOAL_PERCENT and not unexplained
    print(f"{'ok' if good else 'not ok'} - coverage of {GOAL_PERCENT} % of the branches, the rest explained")
    return good


def main():
    certs = os.path.abspath(sys.argv[1])
    if not shutil.which("gcov") or not shutil.which("gcc"):
        print("skip - coverage: no gcc with gcov")
        return 0
    shutil.rmtree(BUILD, ignore_errors=True)
    taken, functions, good = collections.Counter(), {}, True
    for program in programs(certs):
        build(program)
        good &= run(program, certs)
        gather(program, taken, functions)
    return 0 if report(taken, functions) and good else 1


if __name__ == "__main__":
    sys.exit(main())
