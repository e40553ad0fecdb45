#!/bin/sh
# The README's promise: dtls.c, dtls.h and the program shown there, compiled by the command shown there, are an echo server.
set -u
scratch=$(mktemp -d) || exit 1
server=
trap 'kill $server 2>/dev/null; rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

# The fenced block that follows a marker line.
block() { # marker
    awk -v marker="<!-- $1 -->" '
        $0 == marker { found = 1; next }
        found && /^```/ { if (inside) exit; inside = 1; next }
        inside' README.md
}

fail() { # test, detail
    echo "not ok - $1: $2"
    exit 1
}

block drop-in >"$scratch/main.c"
compile=$(block 'drop-in build' | grep '^cc ' | head -n 1)
[ -s "$scratch/main.c" ] || fail 'drop-in is in the README' 'no block after <!-- drop-in -->'
[ -n "$compile" ] || fail 'drop-in is in the README' 'no line with cc after <!-- drop-in build -->'

cp dtls.c dtls.h "$scratch"
cp -R "$CERTS_DIR" "$scratch/certs"
cd "$scratch" || exit 1
sh -c "$compile" >build.log 2>&1 || {
    cat build.log
    fail 'drop-in compiles' "$compile"
}
echo 'ok - drop-in compiles'

program=$(echo "$compile" | sed -n 's/.* -o *\([^ ]*\).*/\1/p')
addr=127.0.0.1:$(python3 -c '
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("127.0.0.1", 0))
print(s.getsockname()[1])')
"./${program:-a.out}" "$addr" >server.log 2>&1 &
server=$!

# Nobody tells when the server is up: until then the client is refused.
tries=50
until answer=$(printf 'hello\n' | "$DTLS_BIN" client "$addr" 2>client.log); do
    tries=$((tries - 1))
    if [ $tries = 0 ] || ! kill -0 $server 2>/dev/null; then
        cat server.log client.log
        fail 'drop-in echoes' "the client cannot talk to it at $addr"
    fi
    sleep 0.2
done
[ "$answer" = hello ] || fail 'drop-in echoes' "got '$answer' for 'hello'"
echo 'ok - drop-in echoes'

cd - >/dev/null || exit 1
block 'drop-in client' >"$scratch/client.c"
cd "$scratch" || exit 1
cc -O2 -o client client.c dtls.c -lssl -lcrypto >build.log 2>&1 || {
    cat build.log
    fail 'drop-in client compiles' 'see above'
}
answer=$(./client "$addr" 2>client.log) && [ "$answer" = hello ] || {
    cat client.log
    fail 'drop-in client talks to it' "got '$answer'"
}
echo 'ok - drop-in client talks to it'
