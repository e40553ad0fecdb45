#!/bin/sh
# What whoever drops the two files into a project relies on: they compile as they are, without a warning whatever the
# optimization, the names they export are their own, the library neither prints nor exits nor needs the program's line
# editor, and the header suits C and C++. Prints the size, too.
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
libssl=$(pkg-config --cflags --libs openssl 2>/dev/null || echo -lssl -lcrypto)
strict='-std=c11 -pedantic -Wall -Wextra -Wshadow -Wconversion -Werror'
result 'dtls.c compiles without any flag' "$($cc -c -o "$scratch/dtls.o" $cflags dtls.c 2>&1)"
if [ -e "$scratch/dtls.o" ]; then
    nm -g -P "$scratch/dtls.o" | sed 's/^_//' >"$scratch/names" # macOS puts an underscore before every name
    result 'library exports only dtls_ names' "$(awk '$2 !~ /[Uvw]/ { print $1 }' "$scratch/names" | grep -v '^dtls_')"
    result 'library neither prints nor exits' "$(awk '$2 ~ /[Uvw]/ { print $1 }' "$scratch/names" |
        grep -Ex '_*v?[fd]?printf(_chk)?|puts|putchar|perror|_*stdoutp?|_*stderrp?|_*[eE]xit|abort|_*assert.*')"
    result 'library needs no line editor' "$(awk '$2 ~ /[Uvw]/ { print $1 }' "$scratch/names" |
        grep -E '^(el|history|readline|rl|add_history|tok)(_|$)')"
fi

# A compiler that optimizes more sees more.
result 'dtls.c compiles without a warning at -Os' "$($cc $strict -Os -c -o "$scratch/small.o" $cflags dtls.c 2>&1)"
[ ! -e "$scratch/small.o" ] || size "$scratch/small.o" |
    awk 'NR == 1 { known = $1 == "text" } # elsewhere the columns are others
        NR == 2 && known { printf "# library: with -Os text %d, data %d, bss %d bytes\n", $1, $2, $3 }'
result 'dtls.c compiles without a warning at -O3' "$($cc $strict -O3 -c -o "$scratch/fast.o" $cflags dtls.c 2>&1)"
# What CC's own flags include is not the library's.
result 'dtls.c breaks no aliasing rule' "$($cc -O2 -Wstrict-aliasing=2 -c -o "$scratch/alias.o" $cflags dtls.c 2>&1 |
    grep -E '^dtls\.[ch]:[0-9:]+ (warning|error|fatal error):')"
echo 'int main(void) { return 0; }' >"$scratch/try.c"
if $cc -O2 -flto -o "$scratch/try" "$scratch/try.c" >/dev/null 2>&1; then
    result 'dtls.c compiles and links without a warning with -flto' "$($cc $strict -O2 -flto -I. -o "$scratch/page" \
        tests/dropin/one_loop.c dtls.c $libssl 2>&1)"
else
    echo 'skip - dtls.c compiles and links without a warning with -flto: not with this compiler'
fi

header 'header alone is C99' "$cc -std=c99" c '"dtls.h"' '"dtls.h"'
header 'header goes before OpenSSL' "$cc -std=c99" c '"dtls.h"' '<openssl/ssl.h>' # both declare struct ssl_st
header 'header goes after OpenSSL' "$cc -std=c99" c '<openssl/ssl.h>' '"dtls.h"'
if $cxx --version >/dev/null 2>&1; then
    header 'header alone is C++17' "$cxx -std=c++17" cc '"dtls.h"'
else
    echo 'skip - header alone is C++17: no C++ compiler'
fi
