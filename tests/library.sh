#!/bin/sh
# What whoever drops the two files into a project relies on: they compile as they are, the names they export are their own,
# the library neither prints nor exits, and the header suits C and C++.
set -u
cc=${CC:-cc}
cxx=${CXX:-c++}
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

result() { # name, what is wrong: nothing is good
    if [ -z "$2" ]; then
        echo "ok - $1"
    else
        echo "not ok - $1: $(echo "$2" | head -n 20 | tr '\n' ' ')"
    fi
}

header() { # name, compiler with flags, source suffix, headers...
    name=$1 compiler=$2 source=$scratch/header.$3
    shift 3
    printf '#include %s\n' "$@" >"$source"
    result "$name" "$($compiler -Wall -Wextra -Wpedantic -Werror -I. $cflags -fsyntax-only "$source" 2>&1)"
}

cflags=$(pkg-config --cflags openssl 2>/dev/null)
result 'dtls.c compiles without any flag' "$($cc -c -o "$scratch/dtls.o" $cflags dtls.c 2>&1)"
if [ -e "$scratch/dtls.o" ]; then
    nm -g -P "$scratch/dtls.o" | sed 's/^_//' >"$scratch/names" # macOS puts an underscore before every name
    result 'library exports only dtls_ names' "$(awk '$2 !~ /[Uvw]/ { print $1 }' "$scratch/names" | grep -v '^dtls_')"
    result 'library neither prints nor exits' "$(awk '$2 ~ /[Uvw]/ { print $1 }' "$scratch/names" |
        grep -Ex '_*v?[fd]?printf(_chk)?|puts|putchar|perror|_*stdoutp?|_*stderrp?|_*[eE]xit|abort|_*assert.*|el_.*')"
fi

header 'header alone is C99' "$cc -std=c99" c '"dtls.h"' '"dtls.h"'
header 'header goes before OpenSSL' "$cc -std=c99" c '"dtls.h"' '<openssl/ssl.h>' # both declare struct ssl_st
header 'header goes after OpenSSL' "$cc -std=c99" c '<openssl/ssl.h>' '"dtls.h"'
if $cxx --version >/dev/null 2>&1; then
    header 'header alone is C++17' "$cxx -std=c++17" cc '"dtls.h"'
else
    echo 'skip - header alone is C++17: no C++ compiler'
fi
