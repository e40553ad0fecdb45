#!/bin/sh
# Whole conversations of the program under valgrind, which sees what no sanitizer does: memory that was never written.
# usage: tests/valgrind.sh PROGRAM        a build without sanitizers
set -u
command -v valgrind >/dev/null || {
    echo 'skip - valgrind: not installed'
    exit
}
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

# For the tests it is the program itself: what valgrind finds becomes an exit status that they do not expect.
cat >"$scratch/dtls" <<END
#!/bin/sh
exec valgrind -q --error-exitcode=99 --leak-check=full --errors-for-leak-kinds=definite,indirect $(realpath "$1") "\$@"
END
chmod +x "$scratch/dtls"
DTLS_BIN=$scratch/dtls TEST_NAME=valgrind python3 tests/e2e.py 'commands over' 'pipe and from files' 'cut connection' \
    'forged datagrams change' 'terminal message while' 's client with crlf'
