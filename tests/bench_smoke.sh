#!/bin/sh
# Whether tests/bench.sh still measures what it says: one short round of everything. Each figure must be there, and be
# one; how good it is is not judged here, since a busy machine would decide.
set -u
if [ "$(uname)" != Linux ] || [ "$(nproc)" -lt 2 ]; then
    echo 'skip - bench: needs Linux and two cores'
    exit 0
fi
table=$(mktemp) || exit 1
trap 'rm -f "$table"' EXIT
trap 'exit 1' HUP INT TERM
BENCH_ROUNDS=1 BENCH_HELLOS=2000 sh tests/bench.sh --quick >"$table" 2>&1 || {
    echo "not ok - bench runs: $(tail -n 1 "$table")"
    exit 1
}
sed 's/^/# bench: /' "$table"
status=0

row() { # its beginning, where in it the first figure stands, whether that may be 0
    figure=$(sed -n "s/^ *$1 *//p" "$table" | head -n 1 | awk -v n="$2" '{ print $n }')
    if echo "$figure" | grep -Eq '^-?[0-9]+([.][0-9]+)?$' &&
        { [ "$3" = zero ] || [ "$(echo "$figure" | tr -d 0.)" ]; }; then
        echo "ok - bench $1"
    else
        echo "not ok - bench $1: no figure, but '$figure'"
        status=1
    fi
}

row 'full mutual handshake' 1 more
row 'resumed handshake' 1 more
row 'echo of 64 bytes' 1 more
row 'echo of 1200 bytes' 1 more
row 'RSS per idle connection' 1 more
row 'flood of [0-9]* ClientHellos: growth' 1 zero
row 'per hello' 1 more
row 'a real client connects meanwhile' 1 more
exit $status
