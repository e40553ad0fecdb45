#!/bin/sh
# Fuzzes what others' bytes reach: each target is tests/fuzz_TARGET.c, its inputs start from tests/corpus/TARGET/.
# usage: tests/fuzz.sh quick|all [TARGET]
#   quick          the same executions each time, about 5 s for each target
#   all            FUZZ_SECONDS (60) for each target
#   BUILD          folder for what is built and for inputs that fail (tests/build)
# Where the compiler has no libFuzzer, the corpus is replayed, which any compiler can.
set -u
cd "$(dirname -- "$0")/.." || exit 1
targets='server client addr program cid'
mode=${1-}
case "$mode $# $targets " in
'quick 1'* | 'all 1'*) ;;
'quick 2'*" $2 "* | 'all 2'*" $2 "*) targets=$2 ;;
*)
    sed -n '3s/^# //p' tests/fuzz.sh >&2
    exit 2
    ;;
esac

build=${BUILD:-tests/build}
seconds=${FUZZ_SECONDS:-60}
scratch=$(mktemp -d) || exit 1
fuzzer=
trap 'rm -rf "$scratch"' EXIT
trap '[ -z "$fuzzer" ] || kill "$fuzzer"; exit 1' HUP INT TERM

flags='-std=gnu11 -g -O1 -fno-omit-frame-pointer'
sanitize='-fsanitize=address,undefined -fno-sanitize-recover=all'
libssl=$(pkg-config --cflags --libs openssl 2>/dev/null) || libssl='-lssl -lcrypto'
libssl="-pthread $libssl"
libedit=$(pkg-config --cflags --libs libedit 2>/dev/null) || libedit=-ledit
# A quarantine for a few executions: the default one makes a process of 70 MB one of 340.
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1}:quarantine_size_mb=8:max_free_fill_size=0"

compiles() { # compiler, flags...
    echo 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n ? 0 : 0; }' >"$scratch/try.c"
    "$@" -o "$scratch/try" "$scratch/try.c" >/dev/null 2>&1
}

sources() { # target
    case $1 in
    server | client | addr) echo "tests/fuzz_$1.c dtls.c $libssl" ;;
    program) echo "tests/fuzz_$1.c $libssl $libedit" ;;
    cid) echo "tests/fuzz_$1.c $libssl" ;;
    esac
}

build() { # target
    $compiler $flags $sanitize $extra -I. -o "$build/fuzz-$1" $(sources "$1")
}

quick_runs() { # target
    case $1 in
    server) echo 2000 ;;
    client) echo 4000 ;;
    addr) echo 60000 ;;
    program) echo 500000 ;;
    cid) echo 40000 ;;
    esac
}

longest() { # target
    case $1 in
    server | client | cid) echo 1024 ;;
    addr | program) echo 256 ;;
    esac
}

amount() { # target
    case $mode in
    quick) echo "-seed=1 -runs=$(quick_runs "$1")" ;;
    all) echo "-max_total_time=$seconds" ;;
    esac
}

reason() { # log
    grep -aE 'broken: |Sanitizer: |runtime error: |ERROR: libFuzzer' "$1" | head -n 1
}

# What failed, and the bytes that repeat it anywhere.
report() { # target, log
    echo "not ok - fuzz $1: $(reason "$2")"
    for input in "$build/fuzz-$1"-*-*; do
        [ -f "$input" ] || continue
        echo "# fuzz: $1: to repeat: $build/fuzz-$1 $input"
        echo "# fuzz: $1: its bytes: $(od -An -v -tx1 "$input" | tr -d ' \n')"
    done
}

fuzz() { # target
    log=$build/fuzz-$1.log
    mkdir -p "$scratch/$1"
    rm -f "$build/fuzz-$1"-*-*
    "$build/fuzz-$1" $(amount "$1") -max_len="$(longest "$1")" -timeout=20 -print_final_stats=1 \
        -artifact_prefix="$build/fuzz-$1-" "$scratch/$1" "tests/corpus/$1" >"$log" 2>&1 &
    fuzzer=$!
    wait $fuzzer
    status=$?
    fuzzer=
    if [ $status != 0 ]; then
        report "$1" "$log"
        return 1
    fi
    awk -v target="$1" '
        / cov: / { for (i = 1; i < NF; i++) figure[$i] = $(i + 1) }
        /number_of_executed_units/ { n = $2 }
        /average_exec_per_sec/ { rate = $2 }
        END {
            printf "# fuzz: %s: %d executions, %d a second, ", target, n, rate
            printf "%d edges, %d features\n", figure["cov:"], figure["ft:"]
        }' "$log"
    echo "ok - fuzz $1"
}

replay() { # target
    log=$build/fuzz-$1.log
    if ! "$build/fuzz-$1" "tests/corpus/$1"/* >"$log" 2>&1; then
        echo "not ok - fuzz $1: $(reason "$log"), with $(grep -a '^tests/corpus/' "$log" | tail -n 1)"
        return 1
    fi
    echo "ok - fuzz $1 (corpus only)"
}

mkdir -p "$build"
run=replay extra=tests/fuzz_replay.c compiler=${CC:-cc}
for c in "$compiler" "clang $(echo "$compiler " | cut -s -d ' ' -f 2-)"; do # with the same flags, if CC has some
    if compiles $c $sanitize -fsanitize=fuzzer; then
        run=fuzz extra=-fsanitize=fuzzer compiler=$c
        break
    fi
done
compiles $compiler $sanitize $extra || sanitize=

failed=0
for target in $targets; do
    rm -f "$build/fuzz-$target"
    if build "$target" >"$build/fuzz-$target.log" 2>&1; then
        $run "$target" || failed=1
    else
        cat "$build/fuzz-$target.log"
        echo "not ok - fuzz $target: does not build"
        failed=1
    fi
done
exit $failed
