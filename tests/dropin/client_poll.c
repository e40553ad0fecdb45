/* A client inside a poll(2) loop, beside another descriptor.
 *
 *   client_poll ADDR      sends its input line by line, prints the answers, ends when it has them all */
#include "lines.h"

#include <poll.h>

int main(int argc, char **argv)
{
    dtls_loop *loop = connect_to(argc == 2 ? argv[1] : "");
    while (loop && !done) {
        struct pollfd fds[] = {{.fd = dtls_loop_fd(loop), .events = POLLIN},
                               {.fd = wants_input() ? STDIN_FILENO : -1, .events = POLLIN}};
        poll(fds, 2, dtls_loop_timeout(loop));
        dtls_loop_poll(loop, 0);
        if (conn && fds[1].revents)
            read_lines();
        end_when_answered();
    }
    dtls_loop_free(loop);
    return status;
}
