#!/bin/sh
# What the README and dtls.h promise to whoever drops the two files into a project. First the README's own programs, built
# by the command shown there. Then the pages of tests/dropin, each in a fresh folder that holds nothing but the page
# (and lines.h, what the clients share), dtls.c, dtls.h and certificates, and run over loopback.
#
# DTLS_BIN is the program to test servers with, CERTS_DIR has the certificates. The pages are built with CC, CXX and
# DROPIN_FLAGS, which both get.
set -u
root=$PWD
cc=${CC:-cc}
cxx=${CXX:-c++}
flags=${DROPIN_FLAGS:-}
strict='-std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror'
posix=-D_POSIX_C_SOURCE=200809L # for pages alone: dtls.c asks for what it needs
libssl="-pthread $(pkg-config --cflags --libs openssl 2>/dev/null || echo -lssl -lcrypto)"
libuv=$(pkg-config --cflags --libs libuv 2>/dev/null || echo -luv)
libev=-lev
scratch=$(mktemp -d) || exit 1
readme_server=
echo_server=
relay=
running= # whatever else is
trap 'kill $readme_server $echo_server $relay $running 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

failed=0
fail() { # test, detail
    failed=1
    echo "not ok - $1: $2"
    return 1
}

await() { # condition: whether it comes true within 20 s
    tries=200
    until eval "$1"; do
        tries=$((tries - 1))
        [ $tries != 0 ] || return 1
        sleep 0.1
    done
}

ended() { # process: its exit status, once it has ended, or was ended after 20 s
    await "! kill -0 $1 2>/dev/null" || kill -KILL "$1"
    wait "$1"
}

# ---- the README ----

# The fenced block that follows a marker line.
block() { # marker
    awk -v marker="<!-- $1 -->" '
        $0 == marker { found = 1; next }
        found && /^```/ { if (inside) exit; inside = 1; next }
        inside' "$root/README.md"
}

folder() { # name: made with what every project has, and entered
    mkdir "$scratch/$1" && cd "$scratch/$1" && cp "$root/dtls.c" "$root/dtls.h" . && cp -R "$CERTS_DIR" certs
}

test_readme() {
    folder README || fail 'drop-in' "no folder for it" || return
    block drop-in >main.c
    compile=$(block 'drop-in build' | grep '^cc ' | head -n 1)
    [ -s main.c ] || fail 'drop-in is in the README' 'no block after <!-- drop-in -->' || return
    [ -n "$compile" ] || fail 'drop-in is in the README' 'no line with cc after <!-- drop-in build -->' || return
    sh -c "$cc ${compile#cc }" >build.log 2>&1 || {
        cat build.log
        fail 'drop-in compiles' "$compile"
        return
    }
    echo 'ok - drop-in compiles'

    program=$(echo "$compile" | sed -n 's/.* -o *\([^ ]*\).*/\1/p')
    addr=127.0.0.1:$(python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
    "./${program:-a.out}" "$addr" >server.log 2>&1 &
    readme_server=$!

    # Nobody tells when the server is up: until then the client is refused.
    tries=50
    until answer=$(printf 'hello\n' | "$DTLS_BIN" client "$addr" 2>client.log); do
        tries=$((tries - 1))
        if [ $tries = 0 ] || ! kill -0 $readme_server 2>/dev/null; then
            cat server.log client.log
            fail 'drop-in echoes' "the client cannot talk to it at $addr"
            return
        fi
        sleep 0.2
    done
    [ "$answer" = hello ] || fail 'drop-in echoes' "got '$answer' for 'hello'" || return
    echo 'ok - drop-in echoes'

    block 'drop-in client' >client.c
    $cc -O2 -o client client.c dtls.c -lssl -lcrypto -pthread >build.log 2>&1 || {
        cat build.log
        fail 'drop-in client compiles' 'see above'
        return
    }
    answer=$(./client "$addr" 2>client.log) && [ "$answer" = hello ] || {
        cat client.log
        fail 'drop-in client talks to it' "got '$answer'"
        return
    }
    echo 'ok - drop-in client talks to it'
}

# ---- the pages ----

good() { # page
    echo "ok - dropin $1"
}

bad() { # page, detail: after all that its folder has to say
    for log in "$scratch/$1"/*.log "$scratch/$1/out"; do
        [ ! -s "$log" ] || head -n 30 "$log" | sed "s|^|# ${log##*/}: |"
    done
    fail "dropin $1" "$2"
}

skip() { # page, reason
    echo "skip - dropin $1: $2"
}

builds() { # command...: whether it makes try from the source text on its input
    cat >"$scratch/try.c"
    "$@" -o "$scratch/try" >/dev/null 2>&1
}

# The page's folder is made and entered.
page() { # file, compiler, arguments to the compiler after the page's name...
    name=${1%.*}
    folder "$name" && cp "$root/tests/dropin/$1" "$root/tests/dropin/lines.h" . ||
        fail "dropin $name" "no folder for it, or no page" || return
    source=$1 compiler=$2
    shift 2
    # The compiler, as the flags, may be several words.
    $compiler $flags -o "$name" "$source" "$@" $libssl >build.log 2>&1 || bad "$name" "does not build: $compiler"
}

c_page() { # file, libraries...
    file=$1
    shift
    page "$file" "$cc $strict $posix" ../dtls.o "$@"
}

test_echo_server() {
    page echo_server.c "$cc $strict" dtls.c || return
    : >out # there before anybody looks for it
    ./echo_server 127.0.0.1:0 >out 2>server.log &
    echo_server=$!
    await "grep -q '^listening on ' out || ! kill -0 $echo_server 2>/dev/null"
    addr=$(sed -n 's/^listening on //p' out)
    [ -n "$addr" ] || bad echo_server 'does not listen' || return
    answers=$(printf '%s\n' one two three | "$DTLS_BIN" client -q "$addr" 2>client.log) &&
        [ "$answers" = "$(printf '%s\n' one two three)" ] || bad echo_server "answers '$answers'" || return
    echo_addr=$addr
}

end_echo_server() {
    cd "$scratch/echo_server" || return
    kill "$echo_server"
    ended "$echo_server" || bad echo_server "exit status $? after SIGTERM" || return
    good echo_server
}

# Between client and server, for one client: prints its address, and loses the first datagram.
lossy='
import select, socket, sys
front, back = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
front.bind(("127.0.0.1", 0))
host, port = sys.argv[1].rsplit(":", 1)
back.connect((host, int(port)))
print("127.0.0.1:%d" % front.getsockname()[1], flush=True)
front.recv(65535)
while True:
    for ready in select.select([front, back], [], [])[0]:
        if ready is front:
            data, client = front.recvfrom(65535)
            back.send(data)
        else:
            front.sendto(back.recv(65535), client)
'

# The first datagram is lost: whoever does not ask the library when to call it again never connects. The first line is
# answered before there is a second one: whoever blocks on one descriptor never sees the other.
test_client() { # page
    [ -n "$echo_addr" ] || fail "dropin $1" 'no echo_server to talk to' || return
    : >relay.out
    python3 -c "$lossy" "$echo_addr" >relay.out 2>relay.log &
    relay=$!
    await "[ -s relay.out ] || ! kill -0 $relay 2>/dev/null"
    test_client_through "$1" "$(cat relay.out)"
    status=$?
    kill $relay
    wait $relay 2>/dev/null
    relay=
    return $status
}

test_client_through() { # page, address
    mkfifo in
    exec 3<>in # holds it open, whether the client is there or not
    : >out
    "./$1" "$2" <in >out 2>client.log 3>&- &
    running=$!
    echo first >&3
    await "[ -s out ] || ! kill -0 $running 2>/dev/null"
    answer=$(cat out)
    printf '%s\n' second third >&3
    exec 3>&-
    ended $running
    status=$?
    running=
    [ "$answer" = first ] || bad "$1" "answers '$answer' while its input is open" || return
    [ "$(cat out)" = "$(printf '%s\n' first second third)" ] || bad "$1" 'not every answer, or in another order' || return
    [ $status = 0 ] || bad "$1" "exit status $status" || return
    "./$1" nowhere </dev/null >out 2>client.log
    status=$?
    [ $status = 1 ] || bad "$1" "exit status $status after an address that is none" || return
    grep -q '^nowhere: ' client.log || bad "$1" 'does not tell what is wrong with an address' || return
    good "$1"
}

# A page that needs nobody.
test_alone() { # page, output, arguments...
    page=$1 expected=$2
    shift 2
    "./$page" "$@" >out 2>program.log </dev/null &
    running=$!
    ended $running
    status=$?
    running=
    [ $status = 0 ] || bad "$page" "exit status $status" || return
    [ "$(sort out)" = "$expected" ] || bad "$page" 'another output than expected' || return
    good "$page"
}

test_library() { # page, library's name, header, flags
    if echo "#include <$3>
int main(void) { return 0; }" | builds $cc $posix $flags "$scratch/try.c" $4; then
        c_page "$1.c" $4 && test_client "$1"
    else
        skip "$1" "no $2"
    fi
}

test_cplusplus() {
    echo 'int number(void); int number(void) { return 0; }' >"$scratch/number.c"
    echo 'extern "C" int number(); int main() { return number(); }' >"$scratch/number.cc"
    if ! { $cc $flags -c -o "$scratch/number.o" "$scratch/number.c" &&
        $cxx -std=c++17 $flags -o "$scratch/try" "$scratch/number.cc" "$scratch/number.o"; } >/dev/null 2>&1; then
        skip cplusplus "no C++ compiler that goes with $cc"
        return
    fi
    page cplusplus.cc "$cxx -std=c++17 -Wall -Wextra -Wpedantic -Wshadow -Werror" ../dtls.o || return
    [ -n "$echo_addr" ] || fail 'dropin cplusplus' 'no echo_server to talk to' || return
    test_alone cplusplus "$(printf '%s\n' first second third)" "$echo_addr" first second third
}

test_pages() {
    $cc $flags -c -o "$scratch/dtls.o" "$root/dtls.c" $(pkg-config --cflags openssl 2>/dev/null) \
        >"$scratch/dtls.log" 2>&1 || {
        cat "$scratch/dtls.log"
        fail 'dropin dtls.c' "does not compile: $cc $flags"
        return
    }
    echo_addr=
    test_echo_server
    c_page client_poll.c && test_client client_poll
    test_library client_uv libuv uv.h "$libuv"
    test_library client_ev libev ev.h "$libev"
    c_page one_loop.c && test_alone one_loop "$(printf '%s\n' 'echo: hello' 'upper: HELLO')"
    c_page keys.c && test_alone keys 'sensor-1: hello'
    c_page two_loops.c -pthread && test_alone two_loops "$(printf '%s\n' 'answered: hello' 'answered: hello')"
    test_cplusplus
    [ -z "$echo_addr" ] || end_echo_server
}

test_readme
test_pages
exit $failed
