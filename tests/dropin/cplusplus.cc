// A client in C++17: sends its words and prints the answers. dtls.c stays C: cc -c dtls.c, then link with c++.
//
//   cplusplus ADDR WORD...
#include "dtls.h"

#include <iostream>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct free_loop {
    void operator()(dtls_loop *loop) const
    {
        dtls_loop_free(loop);
    }
};

struct conversation {
    std::vector<std::string> words;
    std::size_t answers = 0;

    void on_event(dtls_conn *conn, dtls_event event, std::string_view message)
    {
        if (event == DTLS_EV_CONNECTED) {
            for (const auto &word : words)
                if (int err = dtls_conn_send(conn, word.data(), word.size()); err < 0)
                    std::cerr << word << ": " << dtls_strerror(err) << '\n';
        } else if (event == DTLS_EV_MESSAGE) {
            std::cout << message << '\n';
            if (++answers == words.size())
                dtls_conn_close(conn);
        } else if (event == DTLS_EV_CLOSED) {
            std::cerr << dtls_conn_reason_text(conn) << '\n';
            dtls_loop_stop(dtls_endpoint_loop(dtls_conn_endpoint(conn)));
        }
    }
};

int main(int argc, char **argv)
{
    if (argc < 3) {
        std::cerr << "usage: cplusplus ADDR WORD...\n";
        return 2;
    }
    conversation talk{{argv + 2, argv + argc}}; // before the loop: freeing that may raise a last event
    std::unique_ptr<dtls_loop, free_loop> loop{dtls_loop_new(nullptr)};
    dtls_config config{};
    config.cert_file = "certs/client.pem";
    config.key_file = "certs/client.key";
    config.ca_file = "certs/ca.pem";
    config.idle_timeout_ms = 10000; // nobody waits longer for an answer that was lost
    config.user = &talk;
    // noexcept: an exception must not pass through frames of C.
    config.on_event = [](dtls_conn *conn, dtls_event event, const void *data, std::size_t len) noexcept {
        auto *self = static_cast<conversation *>(dtls_endpoint_user(dtls_conn_endpoint(conn)));
        self->on_event(conn, event, {static_cast<const char *>(data), len});
    };

    dtls_error err{};
    dtls_target server{};
    dtls_endpoint *client = loop ? dtls_endpoint_new(loop.get(), &config, &err) : nullptr; // the loop frees it
    if (!client || dtls_addr_parse(&server.peer, argv[1], &err) < 0 || !dtls_endpoint_connect(client, &server, &err)) {
        std::cerr << (loop ? err.text : "no memory or descriptor for a loop") << '\n';
        return 1;
    }
    return dtls_loop_run(loop.get()) == 0 && talk.answers == talk.words.size() ? 0 : 1;
}
