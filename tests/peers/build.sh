#!/bin/sh
# Builds the foreign libraries with connection IDs (RFC 9146), which few distributions have: Debian's sources of Mbed TLS
# and of wolfSSL, as they are, each as a static library in a folder of its own that is kept for the next time. 33 MB to
# download, a minute to compile.
# usage: tests/peers/build.sh FOLDER [mbedtls | wolfssl]
#   FOLDER    gets NAME/include, NAME/NAME.a and NAME/flags, the compiler's arguments for those who include it; or, where
#             that did not work, NAME.why: the reason in one line
#   MIRROR    of Debian, where not the one of this machine or Debian's own
# The exit status is 1 if one of them is not there.
set -u
cc=${CC:-cc}
ar=${AR:-ar}

[ $# -gt 0 ] && [ -n "$1" ] || {
    sed -n '5s/^# //p' "$0" >&2
    exit 2
}
mkdir -p -- "$1" && folder=$(cd -- "$1" && pwd) || exit 1
shift
[ $# -gt 0 ] || set -- mbedtls wolfssl
scratch=$(mktemp -d "$folder/.new.XXXXXX") || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 1' HUP INT TERM

# A mirror has what is in a release: sid's versions come and go, those of a stable one stay.
releases='
mbedtls 3.6.7 pool/main/m/mbedtls/mbedtls_3.6.7.orig.tar.bz2 a7e8bcbec0e6f761b4af24f25677626b35f762f68eef79c08677a363212d11f6
mbedtls 3.6.6 pool/main/m/mbedtls/mbedtls_3.6.6.orig.tar.bz2 8fb65fae8dcae5840f793c0a334860a411f884cc537ea290ce1c52bb64ca007a
wolfssl 5.9.2 pool/main/w/wolfssl/wolfssl_5.9.2.orig.tar.gz 2f4ef3d4fd387a9b3191d36a6316d69116c46ff69bb9583b6c82b36d7b8ca114
'

mirrors() { # one a line
    [ -z "${MIRROR-}" ] || {
        echo "$MIRROR"
        return
    }
    ! command -v apt-get >/dev/null 2>&1 ||
        apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep '/debian/*$' | sort -u
    echo http://deb.debian.org/debian
}

sum() { # file
    if command -v sha256sum >/dev/null 2>&1; then
        sha256sum "$1"
    elif command -v sha256 >/dev/null 2>&1; then
        sha256 -r "$1"
    else
        shasum -a 256 "$1"
    fi | cut -d ' ' -f 1
}

download() { # address, file
    if [ -x /usr/lib/apt/apt-helper ]; then # it knows this machine's proxies
        /usr/lib/apt/apt-helper -o Acquire::Retries=1 -o Acquire::http::Timeout=20 download-file "$1" "$2"
    elif command -v curl >/dev/null 2>&1; then
        curl -fsSL --connect-timeout 20 -o "$2" "$1"
    else
        wget -q -T 20 -O "$2" "$1"
    fi
}

fetch() { # path, sha256: to $folder, unless it is there
    archive=$folder/${1##*/}
    [ ! -f "$archive" ] || [ "$(sum "$archive")" != "$2" ] || return 0
    for mirror in $(mirrors); do
        if download "${mirror%/}/$1" "$scratch/archive" >>"$scratch/log" 2>&1 && [ "$(sum "$scratch/archive")" = "$2" ]; then
            mv "$scratch/archive" "$archive"
            return
        fi
        rm -f "$scratch/archive"
    done
    return 1
}

# Every C file is compiled for itself. The list of files and the flags are what the library's own build makes of its
# defaults; for wolfSSL, which has no defaults to speak of, wolfssl/options.h says what is chosen.
sources() { # name
    case $1 in
    mbedtls) echo library/*.c 3rdparty/everest/library/everest.c 3rdparty/everest/library/x25519.c \
        3rdparty/everest/library/Hacl_Curve25519_joined.c 3rdparty/p256-m/*.c 3rdparty/p256-m/p256-m/*.c ;;
    wolfssl) echo src/*.c wolfcrypt/src/*.c ;;
    esac
}

flags() { # name
    case $1 in
    mbedtls) echo -Iinclude -Ilibrary -I3rdparty/everest/include -I3rdparty/everest/include/everest \
        -I3rdparty/everest/include/everest/kremlib -I3rdparty/p256-m/p256-m/include \
        -I3rdparty/p256-m/p256-m/include/p256-m -I3rdparty/p256-m/p256-m_driver_interface ;;
    wolfssl) echo -I. -DBUILDING_WOLFSSL -DWOLFSSL_USER_SETTINGS ;;
    esac
}

configure() { # name
    [ "$1" = wolfssl ] || return 0
    {
        # DTLS 1.2 with connection IDs, of 10 bytes where nothing else is said
        printf '#define %s\n' WOLFSSL_DTLS WOLFSSL_DTLS_CID 'DTLS_CID_MAX_SIZE 20' NO_OLD_TLS HAVE_TLS_EXTENSIONS \
            HAVE_SUPPORTED_CURVES HAVE_EXTENDED_MASTER HAVE_SERVER_RENEGOTIATION_INFO SINGLE_THREADED
        # the suites
        printf '#define %s\n' HAVE_ECC HAVE_CURVE25519 ECC_TIMING_RESISTANT TFM_TIMING_RESISTANT WC_RSA_BLINDING WC_RSA_PSS \
            HAVE_AESGCM HAVE_AESCCM HAVE_CHACHA HAVE_POLY1305 HAVE_ONE_TIME_AUTH WOLFSSL_SHA384 WOLFSSL_SHA512 \
            WOLFSSL_STATIC_PSK WOLFSSL_SP_MATH_ALL NO_DES3 NO_RC4 NO_MD4 NO_DSA NO_DH
        # what wolfssl.c calls
        printf '#define %s\n' OPENSSL_EXTRA KEEP_PEER_CERT
    } >wolfssl/options.h && echo '#include <wolfssl/options.h>' >user_settings.h
}

compile() { # name: in the source's folder
    configure "$1" || return
    objects=
    for source in $(sources "$1"); do
        objects="$objects ${source%.c}.o"
    done
    {
        echo '.SUFFIXES: .c .o'
        echo "CC = $cc"
        echo "CFLAGS = -O1 -w $(flags "$1")"
        printf '.c.o:\n\t$(CC) $(CFLAGS) -c -o $@ $<\n'
        echo "peer.a: $objects"
        printf '\t%s rc $@ %s\n' "$ar" "$objects"
    } >peer.mk && make -j 4 -f peer.mk peer.a
}

install() { # name: from the source's folder to $scratch/ready
    mkdir -p "$scratch/ready/include" && mv peer.a "$scratch/ready/$1.a" && case $1 in
    mbedtls) cp -R include/mbedtls include/psa "$scratch/ready/include" && echo >"$scratch/ready/flags" ;;
    wolfssl) cp -R wolfssl user_settings.h "$scratch/ready/include" && echo -DWOLFSSL_USER_SETTINGS >"$scratch/ready/flags" ;;
    esac
}

fail() { # name, reason
    echo "$2" >"$folder/$1.why"
    echo "build.sh: $1: $2" >&2
    tail -n 5 "$scratch/log" >&2
    return 1
}

unpack() { # to $scratch/source
    rm -rf "$scratch/source" "$scratch/ready"
    mkdir "$scratch/source"
    case $archive in
    *.bz2) bzip2 -dc "$archive" ;;
    *) gzip -dc "$archive" ;;
    esac | (cd "$scratch/source" && tar xf -)
}

build() { # name
    stamp="$(cksum <"$0") $(echo "$cc $(uname -sm)" | cksum)"
    [ "$(cat "$folder/$1/stamp" 2>/dev/null)" != "$stamp" ] || return 0
    : >"$scratch/log"
    echo "$releases" | grep "^$1 " >"$scratch/wanted" || fail "$1" 'not known here' || return
    found=
    while read -r _ version path sha256; do
        ! fetch "$path" "$sha256" </dev/null || {
            found=$version
            break
        }
    done <"$scratch/wanted"
    [ -n "$found" ] || fail "$1" "the sources of $1 are not to be had: no network, or no mirror has that version" || return
    unpack >>"$scratch/log" 2>&1 || fail "$1" "${archive##*/} cannot be unpacked" || return
    (cd "$scratch"/source/* && compile "$1" && install "$1") >>"$scratch/log" 2>&1 ||
        fail "$1" "$1 $found does not compile" || return
    echo "$stamp" >"$scratch/ready/stamp"
    rm -rf "${folder:?}/$1" "$folder/$1.why"
    mv "$scratch/ready" "$folder/$1" || fail "$1" "no room in $folder"
}

status=0
for name in "$@"; do
    build "$name" || status=1
done
exit $status
