#!/usr/bin/env python3
"""Checks the table of what the standards ask, tests/conformance.txt: each row is well formed, one that is kept names a
test that there is, and one that is not says why.

    python3 tests/conformance.py [FILE]       FILE: another table

Nothing need be built: the names of tests are asked of a program in tests/build where it is newer than its source, and
read from the sources otherwise. Whether a test passes is that program's to say. Prints one result, or one for each bad
row.
"""

import collections
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINE_MAX = 160
STRENGTHS = ("MUST", "MUST NOT", "SHOULD", "SHOULD NOT")
SHOWN, REASONED = ("kept", "libssl"), ("not", "n/a")
IN_PYTHON = ("e2e", "peers", "hostile", "roam")
# They list their tests, too:
IN_C = ("unit", "edges", "odd", "standards", "anew", "trust", "moves", "roam_storm", "keyholder", "memory", "loops")
REPORTING = ("simulate", "faults")  # without a list

TABLE = re.compile(r"\b(?:tests|attacks|kinds)\[\w*\] = \{\n(.*?)^ *\};", re.M | re.S)
STRING = r'"((?:[^"\\]|\\.)*)"'
HEADING = re.compile(r"# (RFC \d+), ")
SECTION = re.compile(r"(RFC \d+) \d+(?:\.\d+)*$")


def listed(command):
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout.decode().splitlines()


def names_in_c(program):
    source, built = ROOT / f"tests/{program}.c", ROOT / f"tests/build/{program}"
    if not source.exists():
        return []
    text = source.read_text()
    if program in IN_C and os.access(built, os.X_OK) and built.stat().st_mtime > source.stat().st_mtime:
        return listed([built, "-l"])
    if program == "faults":  # a kind's short name, then the one that it reports
        return [name for _, name in re.findall(rf"= \{{{STRING}, {STRING}", TABLE.search(text)[1])]
    if program == "simulate":  # what is counted is no part of the name
        return [re.sub(r"%\w+|\\n", "", name).strip() for name in re.findall(r'"ok - simulate (.*?)"', text)]
    alone = re.findall(rf"test_begin\({STRING}\)", text)
    return re.findall(rf"^\s*\{{{STRING}", TABLE.search(text)[1], re.M) + alone


class Tests(dict):
    """The names of each program's tests, found when they are asked for."""

    def __missing__(self, program):
        if program in IN_PYTHON:
            self[program] = listed([sys.executable, f"tests/{program}.py", "-l"])
        else:
            self[program] = names_in_c(program)
        return self[program]

    def problem(self, test):
        """What is wrong with "PROGRAM: NAME"; None: nothing."""
        program, _, name = test.partition(": ")
        if test.startswith("?"):
            return "no test shows it"
        if program not in IN_PYTHON + IN_C + REPORTING or not name:
            return f"no PROGRAM: NAME of {', '.join(IN_C + REPORTING + IN_PYTHON)}"
        names = self[program]
        found = [name] if names.count(name) == 1 else [known for known in names if name in known]
        if len(found) == 1:
            return None
        return f"{program} has {len(found)} such tests: {', '.join(found)}" if found else f"{program} has no such test"


def problem(line, heading, tests):
    fields = line.split(" | ")
    if len(line) > LINE_MAX:
        return f"{len(line)} characters, more than {LINE_MAX}"
    if len(fields) != 5 or any(field != field.strip() or not field for field in fields):
        return "not five fields with ' | ' between them"
    where, strength, _, keeper, last = fields
    section = SECTION.match(where)
    if not section or section[1] != heading:
        return f"not a section of {heading}, under whose heading it stands"
    if strength not in STRENGTHS:
        return f"not one of {', '.join(STRENGTHS)}"
    if keeper in SHOWN:
        return tests.problem(last)
    if keeper not in REASONED:
        return f"not one of {', '.join(SHOWN + REASONED)}"
    return None if len(last.split()) > 2 else "no reason"


def main():
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "tests/conformance.txt")
    heading, tests, kinds, seen, bad = None, Tests(), collections.Counter(), set(), 0
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            found = HEADING.match(line)
            heading = found[1] if found else heading
            continue
        what = tuple(line.split(" | ")[:3])
        wrong = "the same requirement again" if what in seen else problem(line, heading, tests)
        seen.add(what)
        kinds[line.split(" | ")[3] if line.count(" | ") > 3 else ""] += 1
        if wrong:
            bad += 1
            print(f"not ok - conformance: line {number}: {wrong}: {line}")
    total = sum(kinds.values())
    if not bad and total:
        counted = ", ".join(f"{kinds[kind]} {kind}" for kind in SHOWN + REASONED)
        print(f"ok - conformance: {total} requirements: {counted}")
    elif not total:
        print("not ok - conformance: no requirements in the table")
    return 0 if total and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
