#!/bin/sh
# Builds everything under sanitizers and runs every test: ./test.sh [all | kqueue] [PROGRAM [NAME...]], or
# ./test.sh matrix [CELL...]
# With NAMEs the program runs only those of its tests whose names contain one of them: ./test.sh edges 'stale cookie'.
# With "all" everything that is sampled otherwise (simulated worlds, injected faults, fuzzing, floods) runs at full length,
# and valgrind and coverage besides: half an hour. With "kqueue" the same tests as without it run on the kqueue
# backend, which tests/kqueue lets Linux have. With "matrix" they run on other systems, in fresh ones below tests/build, and
# dtls.c is compiled for systems that are not at hand: two hours, as root on Debian. The last line counts the results; the
# exit status is 1 if anything failed, or if nothing passed. LIMIT_S seconds (300) are a program's limit without "all".
set -u
cd "$(dirname -- "$0")" || exit 1
programs='library unit edges odd standards anew trust moves roam_storm keyholder memory loops threads simulate faults fuzz backend dropin e2e identity peers loss hostile roam blackhole bench roam_cost'
more='valgrind coverage'
named='unit edges odd standards anew trust moves roam_storm keyholder memory loops threads fuzz backend e2e identity peers loss hostile roam blackhole' # have tests to choose from
mode=quick
limit_s=${LIMIT_S:-300} # for each program
worlds=600              # simulated with an optimizing compiler, and
worlds_sanitized=60     # under sanitizers
cells=                  # of the matrix
kqueue="-DDTLS_USE_KQUEUE -I$PWD/tests/kqueue"

case ${1-} in
all)
    mode=all limit_s=3000 worlds=25000 worlds_sanitized=1000
    programs="$programs $more"
    shift
    ;;
matrix)
    shift
    cells=$* limit_s=20000
    programs='cross matrix'
    [ $# = 0 ] || programs=matrix
    set --
    ;;
kqueue)
    CC="${CC:-cc} $kqueue"
    export CC
    shift
    ;;
esac
case "$# $programs $more " in
0*) ;;
[1-9]*" $1 "*)
    programs=$1
    shift
    ;;
*)
    echo "usage: ./test.sh [all | kqueue] [PROGRAM [NAME...]], or ./test.sh matrix [CELL...]" >&2
    echo "PROGRAM is one of ${programs% $more} $more; NAME is a part of a test's name" >&2
    exit 2
    ;;
esac
case "$# $named " in
0*) ;;
*" $programs "*) ;;
*)
    echo "test.sh: $programs has no tests to choose from; these have: $named" >&2
    exit 2
    ;;
esac

scratch=$(mktemp -d) || exit 1
log=$scratch/log
children=
trap 'kill $children 2>/dev/null; wait; rm -rf "$scratch"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

say() { # line
    echo "$1" | tee -a "$log"
}

count() { # kind of result
    grep -c "^$1 - " "$log"
}

finish() {
    echo "$(count ok) passed, $(count 'not ok') failed, $(count skip) skipped"
    [ "$(count 'not ok')" = 0 ] && [ "$(count ok)" != 0 ]
    exit
}

wanted() { # program
    case " $programs " in *" $1 "*) ;; *) return 1 ;; esac
}

build() { # file, sanitizer flags, compiler arguments...
    file=tests/build/$1 flags=$2
    shift 2
    rm -f "$file"
    $cc $flags -I. -o "$file" "$@" >"$file.log" 2>&1 &
    children="$children $!"
}

run() { # program, file that must have been built or "", command...
    program=$1 file=$2
    shift 2
    wanted "$program" || return 0
    if [ -n "$file" ] && [ ! -x "$file" ]; then
        cat "$file.log"
        say "not ok - $program: $file does not build"
        return
    fi
    # In the background, because a shell looks at its traps only between two commands, or while it waits.
    python3 tests/run.py "$log" $limit_s "$program" "$@" &
    children=$!
    wait "$children" || say "not ok - $program: could not run"
    children=
}

: >"$log"
sh tests/setup.sh $([ $mode = all ] && echo all || echo test) || exit

cc=${CC:-cc}
sanitize='-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1'
races='-fsanitize=thread -g -O1' # the same test that loops is, since no program can have both sanitizers
leaks=1
echo 'int main(void) { return 0; }' >"$scratch/try.c"
if ! { $cc $sanitize -o "$scratch/try" "$scratch/try.c" && ASAN_OPTIONS=detect_leaks=0 "$scratch/try"; } 2>/dev/null; then
    sanitize='-g -O1' races='-g -O1'
    say 'skip - sanitizers: not with this compiler'
elif ! ASAN_OPTIONS=detect_leaks=1 "$scratch/try" 2>/dev/null; then
    leaks=0
    say 'skip - leak detection: not on this system'
fi

export ASAN_OPTIONS="detect_leaks=$leaks:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=1:max_free_fill_size=65536:free_fill_byte=221"
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1:abort_on_error=1
export DTLS_BIN="$PWD/tests/build/dtls"
export CERTS_DIR="$scratch/certs"

mkdir -p tests/build
libssl=$(pkg-config --cflags --libs openssl 2>/dev/null) || libssl='-lssl -lcrypto'
libssl="-pthread $libssl"
libedit=$(pkg-config --cflags --libs libedit 2>/dev/null) || libedit=-ledit
if wanted unit; then build unit "$sanitize" tests/unit.c $libssl $libedit; fi
if wanted edges; then build edges "$sanitize" tests/edges.c dtls.c $libssl; fi
if wanted odd; then build odd "$sanitize" tests/odd.c dtls.c $libssl; fi
if wanted standards; then build standards "$sanitize" tests/standards.c dtls.c $libssl; fi
if wanted anew; then build anew "$sanitize" tests/anew.c dtls.c $libssl; fi
if wanted trust; then build trust "$sanitize" tests/trust.c dtls.c $libssl; fi
if wanted moves; then build moves "$sanitize" tests/moves.c dtls.c $libssl; fi
if wanted roam_storm; then build roam_storm "$sanitize" tests/roam_storm.c dtls.c $libssl; fi
if wanted roam_cost; then build roam_cost -O2 tests/roam_cost.c dtls.c $libssl; fi
if wanted keyholder; then build keyholder "$sanitize" tests/keyholder.c dtls.c $libssl; fi
if wanted memory; then build memory "$sanitize" tests/memory.c dtls.c $libssl; fi
if wanted loops; then build loops "$sanitize" tests/loops.c dtls.c $libssl; fi
if wanted simulate; then
    build simulate "$sanitize" tests/simulate.c dtls.c $libssl
    build simulate-fast -O2 tests/simulate.c dtls.c $libssl
fi
if wanted faults; then
    wraps=$(sed -n 's/^ \* wrap: //p' tests/faults.c | tr ' ' '\n' | sed 's/^/-Wl,--wrap=/')
    build faults "$sanitize" tests/faults.c dtls.c $wraps $libssl
    build faults-fast '-O2 -g' tests/faults.c dtls.c $wraps $libssl
fi
backends=
if wanted backend && [ "$(uname)" = Linux ]; then
    for name in edges loops; do
        for variant in '' -DKQUEUE_WITHOUT_USER -DKQUEUE_OF_MACOS; do
            build kqueue-$name$variant "$sanitize $kqueue $variant" tests/$name.c dtls.c $libssl
            backends="$backends kqueue-$name$variant"
        done
    done
fi
if wanted threads; then build threads "$races" tests/loops.c dtls.c $libssl; fi
if wanted dropin || wanted e2e || wanted identity || wanted peers || wanted loss || wanted hostile || wanted roam || wanted blackhole; then build dtls "$sanitize" -DDTLS_MAIN dtls.c $libssl $libedit; fi
if wanted peers && [ $mode = all ]; then
    sh tests/peers/build.sh tests/build/peers >tests/build/peers.log 2>&1 & # where it cannot, tests tell that they skip
    children="$children $!"
fi
if wanted valgrind; then build dtls-plain '-O1 -g' -DDTLS_MAIN dtls.c $libssl $libedit; fi
wait
children=
sh certs/certs.sh all >"$scratch/certs.log" 2>&1 || {
    cat "$scratch/certs.log"
    say 'not ok - certificates'
}

run library '' sh tests/library.sh
run unit tests/build/unit tests/build/unit "$CERTS_DIR" "$@"
run edges tests/build/edges tests/build/edges "$CERTS_DIR" "$@"
run odd tests/build/odd tests/build/odd "$CERTS_DIR" "$@"
run standards tests/build/standards tests/build/standards "$CERTS_DIR" "$@"
run anew tests/build/anew tests/build/anew "$CERTS_DIR" "$@"
run trust tests/build/trust tests/build/trust "$CERTS_DIR" "$@"
run moves tests/build/moves tests/build/moves "$CERTS_DIR" "$@"
run roam_storm tests/build/roam_storm tests/build/roam_storm "$CERTS_DIR" "$@"
run keyholder tests/build/keyholder tests/build/keyholder "$CERTS_DIR" "$@"
run memory tests/build/memory tests/build/memory "$CERTS_DIR" "$@"
run loops tests/build/loops tests/build/loops "$CERTS_DIR" "$@"
run threads tests/build/threads tests/build/threads "$CERTS_DIR" "$@"
run simulate tests/build/simulate tests/build/simulate $worlds_sanitized
run simulate tests/build/simulate-fast tests/build/simulate-fast $worlds
run faults tests/build/faults tests/build/faults "$CERTS_DIR" quick
[ $mode = quick ] || run faults tests/build/faults-fast sh -c '
    for part in 0 1; do "$0" "$1" all $part 2 & done; wait' tests/build/faults-fast "$CERTS_DIR"
run fuzz '' sh tests/fuzz.sh $mode "$@"
for name in $backends; do
    # With names: edges has some, loops others.
    [ $# = 0 ] || [ ! -x tests/build/$name ] || tests/build/$name -l "$@" >/dev/null 2>&1 || continue
    run backend tests/build/$name tests/build/$name "$CERTS_DIR" "$@"
done
run dropin tests/build/dtls env DROPIN_FLAGS="$sanitize" sh tests/dropin.sh
run e2e tests/build/dtls python3 tests/e2e.py "$@"
run identity tests/build/dtls python3 tests/identity.py "$@"
run peers tests/build/dtls python3 tests/peers.py "$@"
run loss tests/build/dtls python3 tests/loss.py $([ $mode = quick ] || echo --all) "$@"
run hostile tests/build/dtls python3 tests/hostile.py $([ $mode = quick ] || echo --all) "$@"
run roam tests/build/dtls python3 tests/roam.py "$@"
run blackhole tests/build/dtls python3 tests/blackhole.py $([ $mode = quick ] || echo --all) "$@"
run bench '' sh tests/bench_smoke.sh
run roam_cost tests/build/roam_cost tests/build/roam_cost "$CERTS_DIR" $([ $mode = all ] || echo quick)
run valgrind '' sh tests/valgrind.sh tests/build/dtls-plain
run coverage '' python3 tests/coverage.py "$CERTS_DIR"
run cross '' sh tests/cross.sh tests/build/matrix/zig
run matrix '' sh tests/matrix.sh tests/build/matrix $cells
finish
