/* The limit: what one thread can push and echo with epoll and send, and nothing else.
 *
 *     sender TEXT
 *
 * Not a WebSocket server: it reads a handshake without looking at it, answers with bytes made
 * beforehand, and trusts every client. It takes the orders of all peers (see server.py).
 * A socket that takes less than a whole write ends it: orders are small enough never to fill one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536
#define CHUNK 65536

static const char ANSWER[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

static struct {
    char open;       /* the handshake is done */
    int have;        /* bytes of a frame that has not come whole */
    unsigned char part[1024];
} states[MOST];
static int sockets[MOST], count;
static unsigned char in[CHUNK + 1024], out[CHUNK + 1024];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void put(int fd, const void *data, size_t size) {
    if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size) fail("send");
}

static size_t head(unsigned char *at, size_t size) {
    at[0] = 0x81;
    if (size < 126) {
        at[1] = (unsigned char)size;
        return 2;
    }
    at[1] = 126;
    at[2] = (unsigned char)(size >> 8);
    at[3] = (unsigned char)size;
    return 4;
}

/* Unmask what came whole and send it back in one write; keep the rest. */
static void echo(int fd, size_t have) {
    size_t at = 0, filled = 0;
    while (have - at >= 6) {
        size_t size = in[at + 1] & 127, start = at + 2;
        if (size == 126) {
            size = (size_t)in[at + 2] << 8 | in[at + 3];
            start += 2;
        }
        if (start + 4 + size > have) break;
        if ((in[at] & 15) == 1) {
            filled += head(out + filled, size);
            for (size_t i = 0; i < size; i++) out[filled + i] = in[start + 4 + i] ^ in[start + (i & 3)];
            filled += size;
        }
        at = start + 4 + size;
    }
    states[fd].have = (int)(have - at);
    if (have - at > sizeof states[fd].part) exit(1);
    memcpy(states[fd].part, in + at, have - at);
    if (filled) put(fd, out, filled);
}

static void readable(int fd) {
    size_t before = (size_t)states[fd].have;
    memcpy(in, states[fd].part, before);
    ssize_t got = recv(fd, in + before, CHUNK, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        for (int i = 0; i < count; i++)
            if (sockets[i] == fd) sockets[i] = sockets[--count];
        close(fd);
    } else if (states[fd].open) {
        echo(fd, before + (size_t)got);
    } else {
        states[fd].open = 1;
        sockets[count++] = fd;
        put(fd, ANSWER, sizeof ANSWER - 1);
    }
}

int main(int argc, char **argv) {
    if (argc != 2 || strlen(argv[1]) > 1024) return 2;
    unsigned char frame[1100];
    size_t size = head(frame, strlen(argv[1]));
    memcpy(frame + size, argv[1], strlen(argv[1]));
    size += strlen(argv[1]);

    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in where = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof where;
    if (bind(listener, (void *)&where, length) || listen(listener, 4096)) fail("listen");
    getsockname(listener, (void *)&where, &length);
    printf("port %d\n", ntohs(where.sin_port));
    fflush(stdout);

    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, found[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    event.data.fd = 0;
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (;;) {
        int many = epoll_wait(epoll, found, 256, -1);
        for (int i = 0; i < many; i++) {
            int fd = found[i].data.fd;
            if (fd == listener) {
                int taken = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                if (taken < 0) continue;
                if (taken >= MOST) return 1;
                setsockopt(taken, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                memset(&states[taken], 0, sizeof states[taken]);
                event.data.fd = taken;
                epoll_ctl(epoll, EPOLL_CTL_ADD, taken, &event);
            } else if (fd == 0) {
                char line[64];
                int turns, burst;
                ssize_t got = read(0, line, sizeof line - 1);
                if (got <= 0) return 0;
                line[got] = 0;
                if (sscanf(line, "push %d %d", &turns, &burst) != 2 || burst * size > CHUNK) return 2;
                for (int n = 0; n < burst; n++) memcpy(out + (size_t)n * size, frame, size);
                for (int turn = 0; turn < turns; turn++)
                    for (int n = 0; n < count; n++) put(sockets[n], out, size * (size_t)burst);
                printf("pushed\n");
                fflush(stdout);
            } else {
                readable(fd);
            }
        }
    }
}
