#!/usr/bin/env python3
"""Proves what dtls.c's head says of its layout: the parts are the ones that it lists, and each calls only what stands in
itself or above it.

    python3 tests/structure.py [FILE]       FILE: another dtls.c; README.md is the one beside it

A call is any mention of a function: a name taken as a pointer or in a macro counts, one in a comment or string does not,
nor does a field or a local variable that only has the same name. Structs need no look, since a compiler takes no member
of one that is defined further down. Prints which part calls which, each part's lines and the longest functions, and one
result for each claim.
"""

import bisect
import collections
import pathlib
import re
import sys

LINES_MAX = 45  # of a function, from its first line to its closing brace
LONGEST = 5  # functions to print

NOISE = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.S)
BANNER = re.compile(r"^/\* ==== (\d+)\. (.+?) =+ \*/$", re.M)
LISTED = r" +(\d+)  (\S.*?)  +\S.*$"  # a part in a list of them
ATTRIBUTE = re.compile(r"__attribute__\s*\(\(.*?\)\)+", re.S)
FIELDS = re.compile(r"\b(?:struct|union|enum)\b[^;(){}=]*\{([^{}]*)\}")
# At the left margin: what comes before the name, the name, and whether a body follows the parameters.
FUNCTION = re.compile(r"^(?!typedef\b)[A-Za-z_][\w\s*]*?\b(?P<name>\w+)\([^;{}]*\)\s*(?P<end>[;{])", re.M)
BODY = re.compile(r"\{[^\n]*\}$|\{.*?^\}", re.M | re.S)  # in one line, or up to a brace at the left margin
NO_TYPE = r"(?<!\breturn)(?<!\belse)(?<!\bcase)(?<!\bsizeof)(?<!\bdo)"

Function = collections.namedtuple("Function", "name part begin end")  # offsets in the text
Mention = collections.namedtuple("Mention", "name part line caller")


def blank(text):
    return re.sub(r"[^\n]", " ", text)


class Source:
    def __init__(self, path):
        raw = path.read_text()
        banners = list(BANNER.finditer(raw))
        self.parts = [(int(found[1]), found[2]) for found in banners]
        self.starts = [found.start() for found in banners]
        self.head = re.findall(r"^ \*" + LISTED, raw, re.M)
        text = NOISE.sub(lambda found: blank(found[0]), raw)
        text = ATTRIBUTE.sub(lambda found: blank(found[0]), text)
        while True:
            without = FIELDS.sub(lambda found: found[0].replace("{" + found[1] + "}", f" {blank(found[1])} "), text)
            if without == text:
                break
            text = without
        self.text = text
        self.newlines = [found.start() for found in re.finditer("\n", text)]
        self.functions, self.declared = [], []
        for found in FUNCTION.finditer(text):
            part = self.part(found.start())
            if found["end"] == ";":
                self.declared.append(Function(found["name"], part, found.start(), found.end()))
            else:
                body = BODY.match(text, found.end() - 1)
                self.functions.append(Function(found["name"], part, found.start(), body.end()))
        self.home = {}  # a function's part; with one definition for each system the last
        for function in self.functions:
            self.home[function.name] = max(function.part, self.home.get(function.name, 0))
        self.mentions = list(self.find_mentions())

    def part(self, offset):
        """Counted from 1; 0 stands before the first."""
        return bisect.bisect(self.starts, offset)

    def line(self, offset):
        return bisect.bisect_left(self.newlines, offset) + 1

    def lines(self, function):
        return self.line(function.end - 1) - self.line(function.begin) + 1

    def title(self, part):
        return "%d. %s" % self.parts[part - 1] if part else "what stands before the parts"

    def find_mentions(self):
        begins = [function.begin for function in self.functions]
        heads = {found.start("name") for found in FUNCTION.finditer(self.text)}
        for found in re.finditer(r"(?<![.\w])(?<!->)(?<!struct )(?<!enum )(?<!goto )[A-Za-z_]\w*", self.text):
            name, at = found[0], found.start()
            if name not in self.home or at in heads:
                continue
            inside = bisect.bisect(begins, at) - 1
            function = self.functions[inside] if inside >= 0 and at < self.functions[inside].end else None
            around = self.text[function.begin:function.end] if function else self.text[at - 80:found.end() + 1]
            if not is_local(name, around):
                yield Mention(name, self.part(at), self.line(at), function.name if function else "file scope")


def is_local(name, text):
    """Whether this text declares or assigns a variable of that name."""
    return re.search(rf"\w{NO_TYPE}(?:\s+|\s*\*+\s*){name}\s*[=;,)\[]|\(\*\s*{name}\s*\)|(?<![.>\w]){name}\s*=(?!=)",
                     text)


def result(name, problems):
    about = f": {', '.join(dict.fromkeys(problem.split()[0] for problem in problems))}" if problems else ""
    print(f"{'not ok' if problems else 'ok'} - library {name}{about}")
    for problem in problems:
        print(f"    {problem}")
    return not problems


def differences(source, readme):
    wanted = [(str(number), name) for number, name in source.parts]
    if not wanted or [number for number, _ in source.parts] != list(range(1, len(wanted) + 1)):
        yield f"banners are not numbered from 1: {source.parts}"
    for where, listed in (("head", source.head), ("README.md", re.findall("^" + LISTED, readme, re.M))):
        for have, want in zip(listed + [None] * len(wanted), wanted + [None] * (len(listed) - len(wanted))):
            if have != want:
                yield f"{where} lists {have and '  '.join(have)} where the banners have {want and '  '.join(want)}"


def print_figures(source):
    calls = collections.Counter((mention.part, source.home[mention.name]) for mention in source.mentions)
    parts = range(1, len(source.parts) + 1)
    ends = [source.line(start) for start in source.starts[1:]] + [len(source.newlines) + 1]
    print("# library: which part (rows) calls which (columns) how often, and its lines")
    print("# " + " " * 20 + "".join(f"{part:5}" for part in parts) + "  lines")
    for part in parts:
        row = "".join(f"{calls[part, other] or '':5}" for other in parts)
        print(f"# {source.title(part):20}{row}{ends[part - 1] - source.line(source.starts[part - 1]):7}")
    longest = sorted(source.functions, key=source.lines, reverse=True)[:LONGEST]
    print("# library: longest functions: " + ", ".join(f"{one.name} {source.lines(one)}" for one in longest))


def main():
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).resolve().parent.parent / "dtls.c")
    source = Source(path)
    print_figures(source)
    good = [
        result("parts are as listed", list(differences(source, (path.parent / "README.md").read_text()))),
        result("every function is in a part",
               [f"{one.name} in line {source.line(one.begin)}" for one in source.functions if not one.part]),
        result("dtls.c calls only downwards",
               [f"{one.name} ({source.title(source.home[one.name])}) in line {one.line}, {one.caller} "
                f"({source.title(one.part)})" for one in source.mentions if source.home[one.name] > one.part]),
        result("nothing is declared ahead of its part",
               [f"{one.name} in line {source.line(one.begin)} ({source.title(one.part)}), defined in "
                f"{source.title(source.home[one.name])}"
                for one in source.declared if source.home.get(one.name, 0) > one.part]),
        result(f"no function has more than {LINES_MAX} lines",
               [f"{one.name} has {source.lines(one)}, from line {source.line(one.begin)}"
                for one in source.functions if source.lines(one) > LINES_MAX]),
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
