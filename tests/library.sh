#!/bin/sh
# What whoever drops the two files into a project relies on: they compile as they are, without a warning whatever the
# optimization, and work with it; the names they export are their own, the library neither prints nor exits nor needs the
# program's line editor, and the header suits C and C++. And what those rely on who read dtls.c: that its parts are what its
# head says, and that the table of what the standards ask is complete. Prints the size, too. CERTS_DIR has certificates.
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

said() { # command...: what it says, and that it failed
    "$@" 2>&1 || echo "exit status $?"
}

header() { # name, compiler with flags, source suffix, headers...
    name=$1 compiler=$2 source=$scratch/header.$3
    shift 3
    printf '#include %s\n' "$@" >"$source"
    result "$name" "$(said $compiler -Wall -Wextra -Wpedantic -Werror -I. $cflags -fsyntax-only "$source")"
}

cflags=$(pkg-config --cflags openssl 2>/dev/null)
libssl="-pthread $(pkg-config --cflags --libs openssl 2>/dev/null || echo -lssl -lcrypto)"
strict='-std=c11 -pedantic -Wall -Wextra -Wshadow -Wconversion -Werror'
result 'dtls.c compiles without any flag' "$(said $cc -c -o "$scratch/dtls.o" $cflags dtls.c)"
if [ -e "$scratch/dtls.o" ]; then
    underscore=
    [ "$(uname)" != Darwin ] || underscore=_ # before every name
    ${NM:-nm} -g -P "$scratch/dtls.o" | sed "s/^$underscore//" >"$scratch/names"
    result 'library exports its calls' "$(awk '$2 == "T" { print $1 }' "$scratch/names" | grep -qx dtls_loop_new ||
        cat "$scratch/names")"
    # What has a dot in it is the compiler's: __x86.get_pc_thunk.ax.
    result 'library exports only dtls_ names' "$(awk '$2 !~ /[Uvw]/ && !/[.]/ { print $1 }' "$scratch/names" |
        grep -v '^dtls_')"
    result 'library neither prints nor exits' "$(awk '$2 ~ /[Uvw]/ { print $1 }' "$scratch/names" |
        grep -Ex '_*v?[fd]?printf(_chk)?|puts|putchar|perror|_*stdoutp?|_*stderrp?|_*[eE]xit|abort|_*assert.*')"
    result 'library needs no line editor' "$(awk '$2 ~ /[Uvw]/ { print $1 }' "$scratch/names" |
        grep -E '^(el|history|readline|rl|add_history|tok)(_|$)')"
fi

# A compiler that optimizes more sees more, and must make the same of it: whole connections in memory.
optimized() { # flags...
    name="dtls.c works, compiled without a warning, with $*"
    result "$name" "$(said $cc $strict "$@" -I. -o "$scratch/memory" tests/memory.c dtls.c -pthread $libssl &&
        said "$scratch/memory" "$CERTS_DIR" | grep -v '^ok - ')"
}

optimized -Os
optimized -O3
echo 'int main(void) { return 0; }' >"$scratch/try.c"
lto=-flto=auto # GCC has a remark on how many processes it takes, unless told; others know no such word
$cc $lto -o "$scratch/try" "$scratch/try.c" >/dev/null 2>&1 || lto=-flto
if $cc -O2 $lto -o "$scratch/try" "$scratch/try.c" >/dev/null 2>&1; then
    optimized -O3 $lto # sees both files at once
else
    echo 'skip - dtls.c works, compiled without a warning, with -O3 -flto: not with this compiler'
fi
if $cc -Os -c -o "$scratch/small.o" $cflags dtls.c 2>/dev/null; then
    size "$scratch/small.o" 2>/dev/null |
        awk 'NR == 1 { known = $1 == "text" } # elsewhere the columns are others
            NR == 2 && known { printf "# library: with -Os text %d, data %d, bss %d bytes\n", $1, $2, $3 }'
fi
# GCC looks for it, clang does not. What CC's own flags include is not the library's.
result 'dtls.c breaks no aliasing rule' "$($cc -O2 -Wstrict-aliasing=2 -c -o "$scratch/alias.o" $cflags dtls.c 2>&1 |
    grep -E '^dtls\.[ch]:[0-9:]+ (warning|error|fatal error):')"

header 'header alone is C99' "$cc -std=c99" c '"dtls.h"' '"dtls.h"'
header 'header goes before OpenSSL' "$cc -std=c99" c '"dtls.h"' '<openssl/ssl.h>' # both declare struct ssl_st
header 'header goes after OpenSSL' "$cc -std=c99" c '<openssl/ssl.h>' '"dtls.h"'
if $cxx --version >/dev/null 2>&1; then
    header 'header alone is C++17' "$cxx -std=c++17" cc '"dtls.h"'
else
    echo 'skip - header alone is C++17: no C++ compiler'
fi
python3 tests/structure.py
python3 tests/conformance.py
