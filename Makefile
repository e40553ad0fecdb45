# Plain make, for GNU make and bmake alike. Try: make demo

CFLAGS = -O2 -g
WARN = -std=c11 -Wall -Wextra -Wpedantic -Wshadow -Wconversion
PREFIX = /usr/local
DESTDIR =

# Not CPPFLAGS: bmake puts -nostdinc there when DESTDIR is set.
# Asked for when a recipe runs, each library on its own: some systems have pkg-config files for one of them only.
LIBSSL = -pthread $$(pkg-config --cflags --libs openssl 2>/dev/null || echo -lssl -lcrypto)
LIBSSL_CFLAGS = $$(pkg-config --cflags openssl 2>/dev/null)
LIBEDIT = $$(pkg-config --cflags --libs libedit 2>/dev/null || echo -ledit)

# Fortified functions need an optimizing compiler.
HARDEN = -fstack-protector-strong $$(case "$(CFLAGS)" in *-O[123s]*) echo -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 ;; esac)

all: dtls

dtls: dtls.c dtls.h
	$(CC) $(WARN) $(HARDEN) $(CFLAGS) -DDTLS_MAIN -o $@ dtls.c $(LDFLAGS) $(LIBSSL) $(LIBEDIT) $(LDLIBS)

libdtls.a: dtls.c dtls.h
	$(CC) $(WARN) $(HARDEN) $(CFLAGS) -fPIC -c -o libdtls.o dtls.c $(LIBSSL_CFLAGS)
	$(AR) rcs $@ libdtls.o
	rm -f libdtls.o

certs:
	@sh certs/certs.sh all

delete-certs:
	@sh certs/certs.sh delete

client-cert:
	@[ -n "$$NAME" ] || { echo 'usage: make client-cert NAME=alice' >&2; exit 2; }
	@sh certs/certs.sh client "$$NAME"

server-cert:
	@[ -n "$$NAME" ] || { echo 'usage: make server-cert NAME=gateway SAN=DNS:gw.example.org,IP:192.0.2.7' >&2; exit 2; }
	@sh certs/certs.sh server "$$NAME" "$$SAN"

revoke:
	@[ -n "$$NAME" ] || { echo 'usage: make revoke NAME=alice' >&2; exit 2; }
	@sh certs/certs.sh revoke "$$NAME"

crl:
	@sh certs/certs.sh crl

show-certs:
	@sh certs/certs.sh show

psk:
	@[ -n "$$NAME" ] || { echo 'usage: make psk NAME=sensor-1' >&2; exit 2; }
	@sh certs/certs.sh psk "$$NAME"

test:
	@./test.sh

demo:
	@sh tests/setup.sh
	@$(MAKE) -s all certs
	@sh tests/demo.sh

install: dtls libdtls.a
	mkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib
	install -m 755 dtls $(DESTDIR)$(PREFIX)/bin/dtls
	install -m 644 dtls.h $(DESTDIR)$(PREFIX)/include/dtls.h
	install -m 644 libdtls.a $(DESTDIR)$(PREFIX)/lib/libdtls.a

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/dtls $(DESTDIR)$(PREFIX)/include/dtls.h $(DESTDIR)$(PREFIX)/lib/libdtls.a

clean:
	rm -rf dtls dtls.dSYM libdtls.o libdtls.a tests/build

.PHONY: all certs delete-certs client-cert server-cert revoke crl show-certs psk test demo install uninstall clean
