#!/bin/sh
# A server on a free loopback port in the background, and a client that talks to it on this terminal.
set -u
cd "$(dirname -- "$0")/.." || exit 1
log=$(mktemp) || exit 1
server=
trap '[ -z "$server" ] || { kill "$server"; wait "$server"; } 2>/dev/null; rm -f "$log"' EXIT
trap 'exit 129' HUP
trap : INT # the client's to handle
trap 'exit 143' TERM

start() {
    addr=127.0.0.1:$port
    ./dtls server $addr 2>"$log" &
    server=$!
}

port=$((20000 + $$ % 10000))
start
tries=100
until grep -q '^listening on ' "$log"; do
    tries=$((tries - 1))
    if kill -0 $server 2>/dev/null && [ $tries != 0 ]; then
        sleep 0.1
    elif grep -q 'in use' "$log" && [ $tries != 0 ]; then
        port=$((port + 1))
        start
    else
        cat "$log" >&2
        echo 'demo.sh: the server does not start' >&2
        exit 1
    fi
done

[ ! -t 0 ] || echo "A server listens on $addr. Try: ping, echo TEXT, whoami, stats, bc TEXT. ^D ends it." >&2
./dtls client $addr || {
    status=$?
    echo "demo.sh: the client ended with $status; the server said:" >&2
    cat "$log" >&2
    exit $status
}
