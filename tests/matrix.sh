#!/bin/sh
# ./test.sh on other systems: Debian's releases, each with its OpenSSL, and other processors and C libraries. Every cell
# is a fresh minimal system in a folder with nothing but make and git, where the README's two commands must do the rest.
# usage: tests/matrix.sh FOLDER [CELL...]      FOLDER keeps the logs; a cell's system goes when it is done
# Needs root, debootstrap, which it installs, and a Debian mirror: that of this machine, or MIRROR. While the cells of other
# processors are tested, all of this machine's programs for them go to qemu.
set -u
cells='bullseye bookworm trixie sid experimental i386 aarch64 musl'

[ $# -gt 0 ] && [ -n "$1" ] || {
    sed -n '4s/^# //p' "$0" >&2
    exit 2
}
mkdir -p -- "$1" && folder=$(cd -- "$1" && pwd) && cd -- "$(dirname -- "$0")/.." || exit 1
shift
[ $# = 0 ] || cells=$*
root= log= failed=0 handler=none binfmt=/proc/sys/fs/binfmt_misc

remove() { # the cell's system; what was mounted there went with the last process
    [ -z "$root" ] || rm -rf --one-file-system "$root"
    root=
    [ ! -e "$binfmt/$handler" ] || echo -1 >"$binfmt/$handler"
    handler=none
}
trap remove EXIT
trap 'exit 1' HUP INT TERM

not_ok() { # cell, detail
    tail -n 20 "$log" | sed 's/^/# /'
    echo "not ok - matrix $1: $2"
    failed=1
    return 1
}

skip() { # cell, reason
    echo "skip - matrix $1: $2"
}

inside() { # command: in the cell, in the source's folder
    # Not the caller's mounts: these end with the command.
    unshare --mount --pid --fork --kill-child sh -c '
        mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && mount -t tmpfs tmpfs "$0/tmp" &&
            exec chroot "$0" env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 \
                DEBIAN_FRONTEND=noninteractive sh -c "cd /src && $1"' "$root" "$1" </dev/null >>"$log" 2>&1
}

system() { # cell, release, architecture: makes it
    root=$folder/$1
    log=$folder/$1.log
    rm -rf --one-file-system "$root"
    : >"$log"
    [ ! -e "$root" ] || not_ok "$1" "$root is in use" || return
    debootstrap --variant=minbase --arch="$3" --include=make,git "$2" "$root" $mirror >>"$log" 2>&1 ||
        not_ok "$1" 'debootstrap failed' || return
    printf '127.0.0.1 localhost\n::1 localhost\n' >"$root/etc/hosts"
    echo 'Acquire::Check-Valid-Until "false";' >"$root/etc/apt/apt.conf.d/valid-until" # a mirror may be behind by weeks
    mkdir "$root/src"
    # Nothing that was built here.
    tar -cf - --exclude=./tests/build --exclude=./.git --exclude=./dtls --exclude='./libdtls.*' --exclude='./certs/*.pem' \
        --exclude='./certs/*.key' --exclude='./certs/.[bcr]*' --exclude=./certs/psk.txt . | tar -xf - -C "$root/src"
}

# What every ./test.sh in the cell said.
counted() {
    grep ' passed, .* failed, ' "$log" |
        awk '{ p += $1; f += $3; s += $5 } END { printf "%d passed, %d failed, %d skipped", p, f, s }'
}

done_with() { # cell, beginning of OpenSSL's version, what else there is to say
    version=$(sed -n 's/^dtls [0-9.]*, //p' "$log" | tail -n 1)
    case $version in
    "OpenSSL $2"*) echo "ok - matrix $1: $version${3:+, $3}; $(counted)" ;;
    *) not_ok "$1" "OpenSSL $2 was to be tried, not $version" ;;
    esac
}

builds() { # cell, environment
    inside "$2 make -B CFLAGS='-O2 -Werror' all libdtls.a && ./dtls --version" || not_ok "$1" 'builds with warnings'
}

debian() { # release, beginning of OpenSSL's version
    system "$1" "$1" "$native" && all_of_it "$1" "$2"
}

# sid with the OpenSSL that is still in experimental.
cell_experimental() {
    system experimental sid "$native" || return
    echo "deb ${mirror:-http://deb.debian.org/debian} experimental main" >"$root/etc/apt/sources.list.d/experimental.list"
    printf 'Package: src:openssl\nPin: release a=experimental\nPin-Priority: 990\n' >"$root/etc/apt/preferences.d/openssl"
    inside 'apt-get update' || not_ok experimental 'packages' || return
    all_of_it experimental 4.0
}

# As on a new machine, then with all that tests can make use of. LLVM and libwolfssl-dev take a gigabyte.
all_of_it() { # cell, beginning of OpenSSL's version
    inside 'echo ping | make demo' && grep -q '^pong$' "$log" || not_ok "$1" 'make demo' || return
    builds "$1" '' || return
    inside ./test.sh || not_ok "$1" "./test.sh: $(counted)" || return
    inside 'sh tests/setup.sh all' && install g++ || not_ok "$1" 'packages' || return
    programs "$1" '' 'library fuzz dropin peers' || return
    [ "$1" != bookworm ] || inside 'CC=clang CXX=clang++ ./test.sh' || not_ok "$1" "./test.sh with clang: $(counted)" || return
    done_with "$1" "$2"
}

install() { # packages
    inside "apt-get install -qy --no-install-recommends $1"
}

# Not what needs sanitizers, and not the peers and floods, which wait for real time.
bookworm_without_sanitizers() { # cell, environment, what else there is to say
    builds "$1" "$2" || return
    programs "$1" "$2" 'library unit edges odd standards anew trust moves keyholder memory loops backend dropin e2e simulate faults' || return
    done_with "$1" 3.0 "$3"
}

# Compiled by a cross compiler, run by qemu, 32-bit x86 as well, which not every kernel runs. Sanitizers do not work there,
# and what takes a minute otherwise takes ten.
emulated() { # cell, Debian's architecture, compiler's name, byte 5 of its ELF files, byte 19
    [ -e $binfmt/register ] || mount -t binfmt_misc binfmt_misc $binfmt 2>/dev/null || {
        skip "$1" 'no binfmt_misc in this kernel'
        return
    }
    system "$1" bookworm amd64 || return
    inside "dpkg --add-architecture $2 && apt-get update" && install "gcc libc6-dev openssl python3 qemu-user-static \
        gcc-$3 g++-$3 libssl-dev:$2 libedit-dev:$2 libuv1-dev:$2 libev-dev:$2 libstdc++6:$2" || not_ok "$1" 'packages' || return
    handler=dtls-$1
    [ ! -e "$binfmt/$handler" ] || echo -1 >"$binfmt/$handler" # somebody was killed
    # F: the interpreter is opened now, so that it need not be found from inside.
    printf '%s' ":$handler:M::\\x7fELF\\x$4\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\x$5\\x00:\
\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:\
$root/usr/bin/qemu-$1-static:F" >$binfmt/register || not_ok "$1" 'binfmt_misc' || return
    bookworm_without_sanitizers "$1" "CC=$3-gcc CXX=$3-g++ NM=$3-nm LIMIT_S=3000" 'under qemu'
}

# Debian has the C library, and what dtls.c needs as source only.
cell_musl() {
    system musl bookworm "$native" || return
    inside 'sed "s/^deb /deb-src /" /etc/apt/sources.list >/etc/apt/sources.list.d/source.list && apt-get update' &&
        install 'gcc libc6-dev musl-tools dpkg-dev pkg-config perl openssl python3' &&
        inside 'for kind in linux asm asm-generic; do
            for from in /usr/include/$kind /usr/include/$(gcc -print-multiarch)/$kind; do
                [ ! -d $from ] || ln -s $from /usr/include/$(uname -m)-linux-musl/
            done
        done' &&
        inside 'cd /root && apt-get source -q openssl ncurses libedit' &&
        inside 'cd /root/openssl-*/ && CC=musl-gcc ./config no-shared no-tests --prefix=/opt/musl --libdir=lib &&
            make -sj2 build_libs && make -s install_dev' &&
        inside 'cd /root/ncurses-*/ && CC=musl-gcc ./configure --prefix=/opt/musl --without-cxx --without-cxx-binding \
            --without-ada --without-progs --without-tests --without-manpages --without-debug --disable-db-install \
            --with-terminfo-dirs=/etc/terminfo:/lib/terminfo:/usr/share/terminfo && make -sj2 libs && make -s install.libs install.includes' &&
        inside 'cd /root/libedit-*/ && include=/opt/musl/include && CC=musl-gcc \
            CFLAGS="-O1 -D__STDC_ISO_10646__=201103L -I$include -I$include/ncurses" \
            LDFLAGS=-L/opt/musl/lib ./configure --prefix=/opt/musl --disable-shared --disable-examples &&
            : its files look older than what they are made from && now=ACLOCAL=:\ AUTOCONF=:\ AUTOMAKE=:\ AUTOHEADER=: &&
            make -s $now && make -s $now install && sed -i "s/^Libs:.*/& -lncurses/" /opt/musl/lib/pkgconfig/libedit.pc' &&
        inside 'ln -s /opt/musl/include/* "/usr/include/$(uname -m)-linux-musl/" &&
            ln -s /opt/musl/lib/*.a "/usr/lib/$(uname -m)-linux-musl/"' ||
        not_ok musl 'libraries for musl cannot be built' || return
    bookworm_without_sanitizers musl 'CC=musl-gcc PKG_CONFIG_LIBDIR=/opt/musl/lib/pkgconfig' 'libraries built for it'
}

programs() { # cell, environment, programs of ./test.sh
    for program in $3; do
        inside "$2 ./test.sh $program" || not_ok "$1" "./test.sh $program" || return
    done
}

[ "$(id -u)" = 0 ] &&
    { command -v debootstrap || apt-get install -qy --no-install-recommends debootstrap; } >/dev/null 2>&1 || {
    echo 'not ok - matrix: needs root and debootstrap'
    exit 1
}
mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
    grep -v security | head -n 1)}
native=$(dpkg --print-architecture)
for cell in $cells; do
    case $cell in
    bullseye) debian bullseye 1.1.1 ;;
    bookworm) debian bookworm 3.0 ;;
    trixie) debian trixie 3.5 ;;
    sid) debian sid '' ;;
    experimental) cell_experimental ;;
    aarch64) emulated aarch64 arm64 aarch64-linux-gnu 02 b7 ;;
    i386) emulated i386 i386 i686-linux-gnu 01 03 ;;
    musl) cell_musl ;;
    *)
        echo "not ok - matrix $cell: not one of the cells"
        failed=1
        ;;
    esac
    remove
done
exit $failed
