#!/bin/sh
# Certificates to try dtls.c with: a CA, a server, clients. Proper in every field, but the CA's key lies unencrypted beside
# them, so they are for trying and testing only.
set -eu
LC_ALL=C
export LC_ALL
work=.building # keys are born in it; also the lock that keeps two runs apart

usage() {
    cat >&2 <<'END'
usage: certs.sh all                 build what is missing of CA, server and client
       certs.sh client NAME         build NAME.pem and NAME.key, for one more client
       certs.sh server NAME [SAN]   the same for one more server; SAN, its names, is a list as in
                                    DNS:gw.example.org,IP:192.0.2.7 (default: DNS:NAME)
       certs.sh revoke NAME         revoke NAME.pem and write crl.pem, the list of all that is revoked
       certs.sh crl                 write crl.pem anew, with today's date
       certs.sh show                a table of the certificates that are there
       certs.sh psk NAME            add a pre-shared key for NAME to psk.txt, and tell how to use it
       certs.sh delete              remove what was built, and nothing that was put there by hand
CERTS_DIR is the folder to work in (default: the one of this script), CERTS_DAYS the validity (default: 825).
END
    exit 2
}

fail() { # exit status, text
    printf 'certs.sh: %s\n' "$2" >&2
    exit "$1"
}

printable() { # text
    printf '%s' "$1" | tr -c '\040-\176' '?'
}

# openssl chatters on stderr even when all is well: show that only when it fails.
ssl() {
    openssl "$@" 2>"$work/log" || {
        cat "$work/log" >&2
        fail 1 "openssl $1 failed"
    }
}

fingerprint() { # file
    cksum <"$1" | awk '{ print $1, $2 }'
}

built() { # file, name: whether this name was given to just this content
    [ -e .built ] && grep -Fqx "$(fingerprint "$1") $2" .built
}

# Builds NAME.key and NAME.pem, signed by the CA, or by itself for the CA.
build() { # NAME, commonName, line of extensions...
    name=$1 cn=$2
    shift 2
    for file in "$name.key" "$name.pem"; do
        [ ! -e "$file" ] || fail 1 "$dir/$file exists and is not overwritten"
    done

    printf '%s\n' '[req]' 'distinguished_name = name' 'prompt = no' '[name]' "commonName = $cn" \
        '[extensions]' 'subjectKeyIdentifier = hash' 'authorityKeyIdentifier = keyid:always' "$@" >"$work/conf"
    serial=0x$(openssl rand -hex 16)
    ssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/key"
    if [ "$name" = ca ]; then
        ssl req -new -x509 -config "$work/conf" -extensions extensions -key "$work/key" \
            -sha256 -days "$days" -set_serial "$serial" -out "$work/pem"
    else
        ssl req -new -config "$work/conf" -key "$work/key" -sha256 -out "$work/request"
        ssl x509 -req -in "$work/request" -extfile "$work/conf" -extensions extensions -CA ca.pem -CAkey ca.key \
            -sha256 -days "$days" -set_serial "$serial" -out "$work/pem"
    fi
    chmod 644 "$work/pem"

    # Both or none, and listed before they are there: a file that nothing lists would never be deleted.
    trap '' HUP INT TERM
    for part in key pem; do
        echo "$(fingerprint "$work/$part") $name.$part" >>.built
    done
    mv "$work/key" "$name.key"
    mv "$work/pem" "$name.pem"
    trap 'exit 1' HUP INT TERM
    echo "built $dir/$name.pem and $dir/$name.key"
}

build_ca() {
    [ -e ca.pem ] || build ca "dtls.c test CA $(openssl rand -hex 4)" \
        'basicConstraints = critical, CA:TRUE, pathlen:0' 'keyUsage = critical, keyCertSign, cRLSign'
}

build_leaf() { # NAME, extendedKeyUsage, subjectAltName or nothing
    [ -e ca.key ] || fail 1 "$dir/ca.key is missing, nothing can be signed without it"
    build "$1" "$1" 'basicConstraints = critical, CA:FALSE' 'keyUsage = critical, digitalSignature' \
        "extendedKeyUsage = $2" ${3:+"subjectAltName = $3"}
}

build_server() { # NAME, subjectAltName
    build_leaf "$1" serverAuth "$2"
}

build_client() { # NAME
    alt="DNS:$1"
    case $1 in *[!A-Za-z0-9-]* | *-) alt= ;; esac # not a DNS label
    [ ${#1} -le 63 ] || alt=
    build_leaf "$1" clientAuth "$alt"
}

is_host() { # text: labels of letters, digits and hyphens, the last one no number
    case $1 in '' | *[!A-Za-z0-9.-]* | .* | *. | *..* | -* | *- | *-.* | *.-*) return 1 ;; esac
    case ${1##*.} in *[!0-9]*) ;; *) return 1 ;; esac
    [ ${#1} -le 253 ] && ! printf '%s\n' "$1" | grep -q '[^.]\{64\}'
}

is_ipv4() { # text
    byte='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
    printf '%s\n' "$1" | grep -Eqx "($byte\.){3}$byte"
}

is_ipv6() { # text
    text=$1 group='[0-9A-Fa-f]{1,4}'
    case $text in
    *:*.*)
        is_ipv4 "${text##*:}" || return 1
        text=${text%:*}:0:0
        ;;
    esac
    printf '%s\n' "$text" | grep -Eqx "($group:){7}$group" || {
        printf '%s\n' "$text" | grep -Eqx "($group(:$group)*)?::($group(:$group)*)?" &&
            printf '%s\n' "$text" | awk -F: '{ for (i = 1; i <= NF; i++) n += $i != "" } END { exit n > 7 }'
    }
}

check_names() { # subjectAltName
    rest=$1,
    while [ -n "$rest" ]; do
        entry=${rest%%,*} rest=${rest#*,}
        case $entry in
        *[!A-Za-z0-9.:*-]*) ;;
        DNS:\*.*.*) ! is_host "${entry#DNS:??}" || continue ;;
        DNS:*) ! is_host "${entry#DNS:}" || continue ;;
        IP:*:*) ! is_ipv6 "${entry#IP:}" || continue ;;
        IP:*) ! is_ipv4 "${entry#IP:}" || continue ;;
        esac
        fail 2 "SAN has '$(printable "$entry")', which is no name; write it as in SAN=DNS:gw.example.org,IP:192.0.2.7"
    done
}

# Writes crl.pem. The list of what is revoked is kept as an index of openssl ca, and the number of the next CRL beside it.
# openssl works on copies: it rewrites them, and leaves more files next to them.
write_crl() { # file to revoke first, or nothing
    [ ! -e crl.pem ] || built crl.pem crl.pem ||
        fail 1 "$dir/crl.pem is not the one that was built, and is not overwritten; move it away"
    printf '%s\n' '[ca]' 'default_ca = lists' '[lists]' "database = $work/index" "crlnumber = $work/number" \
        'unique_subject = no' 'default_md = sha256' 'crl_extensions = extensions' \
        '[extensions]' 'authorityKeyIdentifier = keyid:always' >"$work/conf"
    : >"$work/index"
    [ ! -e .revoked ] || cat .revoked >"$work/index"
    echo 01 >"$work/number"
    [ ! -e .crlnumber ] || cat .crlnumber >"$work/number"
    [ $# = 0 ] || ssl ca -config "$work/conf" -cert ca.pem -keyfile ca.key -revoke "$1" -crl_reason superseded
    ssl ca -config "$work/conf" -cert ca.pem -keyfile ca.key -gencrl -crldays "$days" -out "$work/crl"
    chmod 644 "$work/crl"

    # The list goes first. If it is the only one to arrive, the next CRL is complete all the same.
    trap '' HUP INT TERM
    echo "$(fingerprint "$work/crl") crl.pem" >>.built
    mv "$work/index" .revoked
    mv "$work/number" .crlnumber
    mv "$work/crl" crl.pem
    trap 'exit 1' HUP INT TERM
    [ $# = 0 ] || echo "revoked $dir/$1"
    echo "wrote $dir/crl.pem, with $(grep -c . .revoked || :) revoked"
}

need_ca() {
    [ -e ca.pem ] || fail 1 "$dir/ca.pem is missing; make certs builds it"
    [ -e ca.key ] || fail 1 "$dir/ca.key is missing, nothing can be signed without it; put it back"
    public=$(openssl x509 -in ca.pem -noout -pubkey 2>/dev/null) ||
        fail 1 "$dir/ca.pem is no certificate; put the right one back"
    [ "$(openssl pkey -in ca.key -pubout 2>/dev/null)" = "$public" ] ||
        fail 1 "$dir/ca.key is not the key of $dir/ca.pem; put the right one back"
}

is_revoked() { # serial
    [ -e .revoked ] && cut -f4 .revoked | grep -Fqx "$1"
}

revoke() { # NAME
    need_ca
    pem=$1.pem
    [ -e "$pem" ] || fail 1 "$dir/$pem is missing; make show-certs lists what is there"
    serial=$(openssl x509 -in "$pem" -noout -serial 2>/dev/null) || fail 1 "$dir/$pem is no certificate"
    # What the system trusts must not count, an expired certificate may.
    SSL_CERT_DIR=$work SSL_CERT_FILE=$work/none openssl verify -CAfile ca.pem -no-CApath -no_check_time "$pem" \
        >/dev/null 2>&1 || fail 1 "$dir/$pem is not signed by $dir/ca.pem; its own CA can revoke it"
    if is_revoked "${serial#serial=}"; then
        echo "$dir/$pem is revoked already, nothing was changed; make crl writes $dir/crl.pem anew"
    else
        write_crl "$pem"
    fi
}

# What openssl says of each file, for tabulate: indented, below a line that names the file. Of several certificates in a
# file the first one counts.
describe() {
    ca=$(openssl x509 -in ca.pem -noout -subject_hash 2>/dev/null) || ca=
    for file in *; do
        case $file in *.key | psk.txt) continue ;; esac
        shown=$(printable "$file")
        if [ -f "$file" ] && [ -r "$file" ]; then
            kind=$(sed -n -e 's/^-----BEGIN \(TRUSTED \)*CERTIFICATE-----.*/x509/p' \
                -e 's/^-----BEGIN X509 CRL-----.*/crl/p' "./$file" | head -n 1)
        elif [ -f "$file" ] || { [ -h "$file" ] && [ ! -e "$file" ]; }; then
            echo "certs.sh: $dir/$shown cannot be read" >&2
            echo bad
            continue
        else
            continue
        fi
        case $kind in
        x509)
            set -- -nameopt multiline,utf8 -subject -serial -enddate -text -certopt \
                no_header,no_version,no_serial,no_signame,no_validity,no_subject,no_issuer,no_pubkey,no_sigdump,no_aux
            own=-issuer_hash
            ;;
        crl)
            set -- -lastupdate -nextupdate -text
            own=-hash
            ;;
        *) continue ;;
        esac
        if ! text=$(openssl "$kind" -in "./$file" -noout "$@" 2>/dev/null); then
            echo "certs.sh: $dir/$shown is damaged" >&2
            echo bad
            continue
        fi
        echo "$kind $shown"
        printf '%s\n' "$text" | tr -d '\000-\010\013-\037' | tr '\177-\377' '?' | sed 's/^/ /'
        serial=$(printf '%s\n' "$text" | sed -n 's/^serial=//p' | head -n 1)
        if [ "$(openssl "$kind" -in "./$file" -noout "$own" 2>/dev/null)" = "$ca" ]; then
            ! is_revoked "$serial" || echo revoked
        elif [ "$kind" = crl ]; then
            echo foreign
        fi
    done
}

tabulate() { # its input: what describe says
    awk -v now="$(date -u '+%Y %m %d %H %M %S')" '
    function day(y, m, d) { # counted from a day long ago
        if (m < 3) { y--; m += 12 }
        return 365 * y + int(y / 4) - int(y / 100) + int(y / 400) + int((153 * m - 457) / 5) + d
    }
    function month(name) { return (index("JanFebMarAprMayJunJulAugSepOctNovDec", name) + 2) / 3 }
    function date(text, part) { # Nov  6 12:57:00 2028 GMT
        return split(text, part, " ") < 4 ? "-" : sprintf("%d-%02d-%02d", part[4], month(part[1]), part[2])
    }
    function left(text, part, clock, days, whole) {
        if (split(text, part, " ") < 4) return "-"
        split(part[3], clock, ":")
        days = day(part[4], month(part[1]), part[2]) - today + (clock[1] * 3600 + clock[2] * 60 + clock[3] - second) / 86400
        whole = int(days)
        return whole > days ? whole - 1 : whole
    }
    function value(text) { sub(/^[^=]*= */, "", text); return text }
    function cell(column, text) {
        table[rows, column] = text
        if (length(text) > width[column]) width[column] = length(text)
    }
    function row(file, cn, names, serial, end, days, mark) {
        rows++
        cell(1, file); cell(2, cn); cell(3, names); cell(4, serial); cell(5, end); cell(6, days); cell(7, mark)
    }
    function finish() {
        if (kind == "x509")
            row(file, cn == "" ? "-" : cn, names == "" ? "-" : names, serial, date(end), left(end), mark)
        if (kind == "crl")
            lists = lists file ": revocation list with " revoked " revoked, last update " date(begin) ", next update " \
                date(end) ", days left " left(end) mark "\n"
        kind = cn = names = serial = begin = end = mark = ""
        revoked = awaited = 0
    }
    BEGIN {
        split(now, part, " ")
        today = day(part[1], part[2], part[3])
        second = part[4] * 3600 + part[5] * 60 + part[6]
        row("file", "subject CN", "subjectAltNames", "serial", "not after", "days left", "")
    }
    /^(x509|crl) / { finish(); kind = $1; file = substr($0, length($1) + 2); next }
    /^bad$/ { bad = 1 }
    /^revoked$/ { mark = "revoked" }
    /^foreign$/ { mark = ", not of ca.pem" }
    awaited {
        names = $0
        gsub(/^ +| +$/, "", names)
        gsub(/IP Address:/, "IP:", names)
        gsub(/, /, ",", names)
        awaited = 0
    }
    /^ +commonName *= / && cn == "" { cn = value($0) }
    /^ serial=/ && serial == "" { serial = value($0) }
    /^ (notAfter|nextUpdate)=/ && end == "" { end = value($0) }
    /^ lastUpdate=/ { begin = value($0) }
    /^ +Serial Number: / { revoked++ }
    /^ +X509v3 Subject Alternative Name:/ && names == "" { awaited = 1 }
    END {
        finish()
        if (rows == 1 && lists == "") print "no certificates are there; make certs builds some"
        for (i = 1; i <= rows && rows > 1; i++) {
            line = ""
            for (j = 1; j <= 7; j++) line = line sprintf(j == 6 ? "%" width[j] "s  " : "%-" width[j] "s  ", table[i, j])
            sub(/ +$/, "", line)
            print line
        }
        printf "%s", lists
        exit bad
    }'
}

# psk.txt has a line IDENTITY:HEX for each key, HEX being its bytes in hexadecimal. Empty lines and lines that begin with #
# are skipped.
add_psk() { # IDENTITY
    : >"$work/psk"
    if [ -e psk.txt ] || [ -h psk.txt ]; then
        { [ -f psk.txt ] && [ ! -h psk.txt ] && [ -r psk.txt ]; } ||
            fail 1 "$dir/psk.txt is no file that can be read; move it away"
        ! sed 's/:[^:]*$//' psk.txt | grep -Fqx -e "$1" ||
            fail 1 "$dir/psk.txt has a key for $1 already; delete its line to make another"
        awk 1 psk.txt >"$work/psk" # also ends a last line that has no end
    fi
    key=$(ssl rand -hex 32)
    printf '%s\n' "$1:$key" >"$work/line"
    cat "$work/line" >>"$work/psk"

    # Listed line by line, since others may be added or deleted by hand.
    trap '' HUP INT TERM
    echo "$(fingerprint "$work/line") psk.txt" >>.built
    mv "$work/psk" psk.txt
    trap 'exit 1' HUP INT TERM
    printf '%s\n' "added $1 to $dir/psk.txt; use it with" "./dtls server --psk-file $dir/psk.txt ADDR" \
        "./dtls client --psk $1:$key ADDR"
}

delete_psk() {
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" >"$work/line"
        built "$work/line" psk.txt || return 0
    done <psk.txt
    rm -f psk.txt
}

# A file that was changed or replaced since it was built belongs to whoever did that.
delete() {
    [ -e .built ] || return 0
    while read -r sum size name; do
        case $name in */* | psk.txt) continue ;; esac
        if [ -f "$name" ] && [ "$(fingerprint "$name")" = "$sum $size" ]; then
            rm -f "$name"
        fi
    done <.built
    if [ -f psk.txt ] && grep -q ' psk\.txt$' .built; then
        delete_psk
    fi
    cut -d' ' -f3 .built | sort -u | while read -r name; do
        [ ! -e "$name" ] || echo "kept $dir/$name, which is not the one that was built"
    done
    rm -f .revoked .crlnumber .built
}

check_name() { # NAME, names that it cannot be...
    case $1 in
    '' | [.-]* | *[!A-Za-z0-9._-]*) fail 2 'NAME is made of A-Z a-z 0-9 . _ - with no . or - in front' ;;
    esac
    [ ${#1} -le 64 ] || fail 2 'NAME has at most 64 characters'
    name=$1
    shift
    case " $* " in *" $name "*) fail 2 "NAME cannot be $name, that file is another one" ;; esac
}

san=
case ${1-}:$# in
all:1 | delete:1 | crl:1 | show:1) ;;
client:2) check_name "$2" ca crl server ;;
server:[23])
    check_name "$2" ca crl server client
    san=${3:-DNS:$2}
    [ -n "${3-}" ] || is_host "$2" ||
        fail 2 "$2 is no host name, so SAN has to be given, as in SAN=DNS:gw.example.org,IP:192.0.2.7"
    check_names "$san"
    ;;
revoke:2) check_name "$2" ca crl ;;
psk:2)
    case $2 in '' | *[!A-Za-z0-9._@-]*) fail 2 'NAME is made of A-Z a-z 0-9 . _ - @' ;; esac
    [ ${#2} -le 127 ] || fail 2 'NAME has at most 127 characters' # no program takes more
    ;;
*) usage ;;
esac
days=${CERTS_DAYS:-825}
case $days in 0* | *[!0-9]* | ??????*) fail 2 "CERTS_DAYS is a number of days, 1 to 99999" ;; esac
if [ "$1" != delete ] && ! command -v openssl >/dev/null 2>&1; then
    fail 1 "the openssl command is missing"
fi

dir=${CERTS_DIR:-$(dirname -- "$0")}
[ -d "$dir" ] || case $1 in
delete) exit 0 ;;
revoke | crl | show) fail 1 "$dir is missing; make certs builds it" ;;
esac
mkdir -p -- "$dir"
CDPATH='' cd -- "$dir"
if [ "$1" = show ]; then # writes nothing, so needs no lock
    describe | tabulate
    exit
fi
umask 077 # key files are 0600 from their first byte
mkdir "$work" 2>/dev/null || {
    [ -d "$work" ] || fail 1 "cannot write to $dir"
    fail 1 "another run is at work in $dir; if it was killed: rm -r $dir/$work"
}
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

case $1 in
all)
    build_ca
    [ -e server.pem ] || build_server server 'DNS:localhost, IP:127.0.0.1, IP:::1'
    [ -e client.pem ] || build_client client
    ;;
client)
    build_ca
    build_client "$2"
    ;;
server)
    build_ca
    build_server "$2" "$san"
    ;;
revoke) revoke "$2" ;;
crl)
    need_ca
    write_crl
    ;;
psk) add_psk "$2" ;;
delete) delete ;;
esac
