#!/bin/sh
# What the server costs beside what it must cost at least: builds, and prints one table. Linux only.
# usage: tests/bench.sh [--quick]       about 60 seconds, or 12
#   BENCH_ONLY     handshake, echo, memory or flood: only that part
#   BENCH_ROUNDS   measurements of each figure
#   BENCH_HELLOS   ClientHellos in the flood (200000)
#   BENCH_SERVER   program (./dtls server, the default) or library (a few lines on dtls.h: no commands, no log)
set -eu
cd "$(dirname "$0")/.."

case ${1-} in
'' | --quick) ;;
*)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' tests/bench.sh >&2
    exit 2
    ;;
esac
if [ "$(uname)" != Linux ]; then
    echo 'bench.sh: skipped, it needs Linux (source addresses in 127.0.0.0/8, CPU clocks of other processes)'
    exit 77
fi

build=tests/build
mkdir -p $build
cc=${CC:-cc}
cflags="-std=c11 -O2 ${CFLAGS-}"
libssl="-pthread $(pkg-config --cflags --libs openssl 2>/dev/null || echo -lssl -lcrypto)"
libedit=$(pkg-config --cflags --libs libedit 2>/dev/null || echo -ledit)

CERTS_DIR=$build/bench-certs
export CERTS_DIR
mkdir -p $CERTS_DIR
sh certs/certs.sh all >/dev/null

# shellcheck disable=SC2086 # flags are words
$cc $cflags -DBENCH_DTLS -o $build/bench tests/bench.c dtls.c $libssl
server=${BENCH_SERVER:-program}
# shellcheck disable=SC2086
if [ "$server" = program ] &&
    ! $cc $cflags -DDTLS_MAIN -o $build/bench-dtls dtls.c $libssl $libedit 2>$build/bench.log; then
    echo "bench.sh: the program does not build (see $build/bench.log), measuring the library" >&2
    server=library
fi
if [ "$server" = program ]; then
    set -- ${1+"$1"} $CERTS_DIR $build/bench-dtls server -q --certs $CERTS_DIR {}
else
    set -- ${1+"$1"} $CERTS_DIR $build/bench --serve $CERTS_DIR {}
fi
exec $build/bench "$@"
