#!/bin/sh
# Makes sure of what building takes and, with the argument "test", of what the tests take besides, and tries to get the
# libraries of two of them; with "all" it also tries to get the foreign peers and the tools of ./test.sh all. Says nothing
# when all of it is there. Installs what is missing where it may: as root, with a sudo that asks no password, or with
# Homebrew. Elsewhere it prints the command to run and exits with 2, unless only libraries, peers and tools are missing:
# tests that want them are skipped.
set -u
needed='compiler make openssl-headers libedit-headers openssl'
welcome='pkg-config' # installed along with the rest, but nothing fails without it
extra=
case ${1-} in
test | all)
    needed="$needed python3"
    welcome="$welcome sanitizers"
    extra='libuv libev'
    ;;
esac
[ "${1-}" != all ] || extra="$extra fuzzer gnutls wolfssl mbedtls socat libcoap valgrind"

# What each package manager calls it; "-": part of the base system, or not to be had.
packages='
need            apt-get               dnf                apk          pacman   pkg      pkgin      brew
compiler        gcc,libc6-dev         gcc                gcc,musl-dev gcc      -        -          -
make            make                  make               make         make     -        -          -
openssl-headers libssl-dev            openssl-devel      openssl-dev  openssl  openssl  openssl    openssl@3
libedit-headers libedit-dev           libedit-devel      libedit-dev  libedit  libedit  editline   libedit
openssl         openssl               openssl            openssl      openssl  openssl  openssl    openssl@3
python3         python3               python3            python3      python   python3  python312  python3
pkg-config      pkg-config            pkgconf-pkg-config pkgconf      pkgconf  pkgconf  pkgconf    pkgconf
sanitizers      -                     libasan,libubsan   -            -        -        -          -
libuv           libuv1-dev            libuv-devel        libuv-dev    libuv    libuv    libuv      libuv
libev           libev-dev             libev-devel        libev-dev    libev    libev    libev      libev
fuzzer          clang,libclang-rt-dev clang,compiler-rt  clang        clang    -        -          -
gnutls          gnutls-bin            gnutls-utils       gnutls-utils gnutls   gnutls   gnutls     gnutls
wolfssl         libwolfssl-dev        wolfssl-devel      wolfssl-dev  wolfssl  wolfssl  wolfssl    wolfssl
mbedtls         libmbedtls-dev        mbedtls-devel      mbedtls-dev  mbedtls  mbedtls3 mbedtls    mbedtls
socat           socat                 socat              socat        socat    socat    socat      socat
libcoap         libcoap3-bin          -                  -            -        -          -          -
valgrind        valgrind              valgrind           valgrind     valgrind valgrind -          -
'

scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

give_up() { # text
    echo "setup.sh: $1" >&2
    exit 2
}

compiles() { # source text, flags...
    echo "$1" >"$scratch/try.c"
    shift
    ${CC:-cc} -o "$scratch/try" "$scratch/try.c" "$@"
}

has() { # need
    case $1 in
    compiler) compiles 'int main(void) { return 0; }' ;;
    make) command -v make || command -v bmake ;;
    openssl-headers) compiles '#include <openssl/ssl.h>' -c $(pkg-config --cflags openssl) ;;
    libedit-headers) compiles '#include <histedit.h>' -c $(pkg-config --cflags libedit) ;;
    openssl | pkg-config | socat | valgrind) command -v "$1" ;;
    python3) python3 -c 'import sys; sys.exit(sys.version_info < (3, 9))' ;;
    fuzzer) (CC=clang && compiles 'int LLVMFuzzerTestOneInput(void) { return 0; }' -fsanitize=fuzzer) ;;
    gnutls) command -v gnutls-cli ;;
    libcoap) command -v coap-server-openssl ;;
    libuv) compiles '#include <uv.h>' -c $(pkg-config --cflags libuv) ;;
    libev) compiles '#include <ev.h>' -c ;;
    wolfssl) compiles '#include <wolfssl/options.h>' -c ;;
    mbedtls) compiles '#include <mbedtls/ssl.h>' -c ;;
    sanitizers) compiles 'int main(void) { return 0; }' -fsanitize=address,undefined ;;
    esac >/dev/null 2>&1
}

lacking() { # needs... -> those that are not there
    for need in "$@"; do
        has "$need" || printf '%s ' "$need"
    done
}

missing=$(lacking $needed $extra)
[ -n "$missing" ] || exit 0

# Libraries, peers and tools are a wish.
give_up_if_needed() { # text
    [ -z "$(lacking $needed)" ] || give_up "$1"
    echo "setup.sh: going on without: $(lacking $extra)" >&2
    exit 0
}

for manager in apt-get dnf apk pacman pkg pkgin brew none; do
    ! command -v $manager >/dev/null 2>&1 || break
done
refresh="$manager update"
case $manager in
apt-get) install='apt-get install -qy --no-install-recommends' ;;
dnf) install='dnf install -qy' refresh='dnf makecache' ;;
apk) install='apk add' ;;
pacman) install='pacman -S --needed --noconfirm' refresh='pacman -Sy' ;;
pkg) install='pkg install -y' ;;
pkgin) install='pkgin -y install' ;;
brew) install='brew install' ;;
none) give_up_if_needed "please install by hand, no package manager known here: $missing" ;;
esac

names=$(echo "$packages" | awk -v manager=$manager -v needs=" $missing $(lacking $welcome) " '
    $1 == "need" { for (i = 2; i <= NF; i++) if ($i == manager) column = i }
    NF && index(needs, " " $1 " ") && $column != "-" && !seen[$column]++ {
        gsub(",", " ", $column)
        printf "%s%s", sep, $column
        sep = " "
    }')
[ -n "$names" ] || give_up_if_needed "please install by hand, $manager has no package for it: $missing"

if [ "$manager" = brew ] || [ "$(id -u)" = 0 ]; then
    as=
elif sudo -n true >/dev/null 2>&1; then
    as='sudo -n'
else
    give_up_if_needed "missing: $missing
as root, please run:
    $refresh && $install $names"
fi

echo "setup.sh: installing $names" >&2
run() {
    $as env DEBIAN_FRONTEND=noninteractive "$@" </dev/null
}
{
    # Package lists may be empty, or so old that what they name is gone. A package that this system does not have must not
    # hold up the others.
    run $install $names || { run $refresh && run $install $names; } || for name in $names; do run $install "$name"; done
} >"$scratch/log" 2>&1
missing=$(lacking $needed $extra)
[ -z "$missing" ] || {
    cat "$scratch/log" >&2
    give_up_if_needed "still missing after $install $names: $missing"
}
