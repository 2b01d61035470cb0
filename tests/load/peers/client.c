/* The client of every comparison: thousands of WebSockets on one epoll, cheap enough not to count.
 *
 *     client PORT REQUESTS MARK [READY [HELLO]]
 *
 * REQUESTS is a file of handshakes, each ended by a zero byte; the i-th is for the i-th connection.
 * A text frame that begins with MARK (or with one of two, MARK|MARK) is counted; a connection is up when its handshake is answered
 * and, if READY is given and not empty, a frame that begins so has come. With HELLO, that is the first
 * frame it sends, and a frame "2" is answered by "3" (Socket.IO). Frames with "sequence": are checked:
 * a gap or a repeat ends everything.
 *
 * Orders on stdin, a line each, and what is printed when it is done:
 *     connect N WINDOW      `up`: N more connections, at most WINDOW under way at once
 *     expect N              `got`: N frames were counted since the last order of this kind or of echo
 *     echo N ATONCE TEXT    `got`: N times TEXT was sent and answered, one under way on ATONCE sockets
 *     close                 `closed`
 * `broken WHY` and exit code 1 when anything is not as it has to be.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define MOST 65536
#define CHUNK (1 << 18)

typedef struct {
    int fd;
    char open, up, seen;
    long sequence;
    size_t have, room;
    unsigned char *part; /* what has come of an unfinished frame */
} Client;

static Client clients[MOST];
static int count, ups, wanted, window, under_way, epoll, port;
static long counted, expected, to_send;
static char *requests, *next_request, *requests_end;
static const char *marks[2], *ready = "", *hello = "";
static size_t ready_size;
static unsigned char buffer[CHUNK + (1 << 20)], message[4096];
static size_t message_size;

static void broken(const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    printf("broken ");
    vprintf(format, rest);
    printf("\n");
    fflush(stdout);
    exit(1);
}

static void say(const char *word) {
    printf("%s\n", word);
    fflush(stdout);
}

static void put(Client *client, const void *data, size_t size) {
    if (send(client->fd, data, size, MSG_NOSIGNAL) != (ssize_t)size) broken("send: %s", strerror(errno));
}

/* A client's frame. The mask is not zero, so that a server has to unmask. */
static size_t masked(unsigned char *at, unsigned char first, const unsigned char *text, size_t size) {
    static const unsigned char mask[4] = {0x5a, 0x01, 0xc3, 0x7e};
    size_t used = 0;
    at[used++] = first;
    if (size < 126) {
        at[used++] = (unsigned char)(0x80 | size);
    } else {
        at[used++] = 0xfe;
        at[used++] = (unsigned char)(size >> 8);
        at[used++] = (unsigned char)size;
    }
    memcpy(at + used, mask, 4);
    used += 4;
    for (size_t i = 0; i < size; i++) at[used + i] = text[i] ^ mask[i & 3];
    return used + size;
}

static void say_text(Client *client, const char *text) {
    unsigned char frame[256];
    put(client, frame, masked(frame, 0x81, (const unsigned char *)text, strlen(text)));
}

static void connect_more(void) {
    while (under_way < window && wanted > 0) {
        if (next_request >= requests_end || count == MOST) broken("there are not so many handshakes");
        struct sockaddr_in from = {.sin_family = AF_INET}, to = {.sin_family = AF_INET};
        int on = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
        /* Each source address has ports of its own. */
        from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + (unsigned)count % 4);
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(fd, (void *)&from, sizeof from)) broken("bind: %s", strerror(errno));
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        to.sin_port = htons((unsigned short)port);
        if (connect(fd, (void *)&to, sizeof to)) broken("connect: %s", strerror(errno));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        Client *client = &clients[count++];
        client->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = client};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) broken("epoll: %s", strerror(errno));
        put(client, next_request, strlen(next_request));
        next_request += strlen(next_request) + 1;
        under_way++;
        wanted--;
    }
}

static void is_up(Client *client) {
    if (client->up) return;
    client->up = 1;
    ups++;
    under_way--;
    connect_more();
    if (!under_way && !wanted) say("up");
}

/* Frames lie in a buffer that has a zero behind what came. */
static int begins(const unsigned char *at, const char *mark) {
    return !strncmp((const char *)at, mark, strlen(mark));
}

static void text(Client *client, const unsigned char *at, size_t size) {
    if (*hello && size == 1 && *at == '2') say_text(client, "3");
    if (ready_size && size >= ready_size && !memcmp(at, ready, ready_size)) is_up(client);
    if (!begins(at, marks[0]) && !(marks[1] && begins(at, marks[1]))) {
        if (size > 15 && !memcmp(at, "{\"type\":\"error\"", 15)) broken("%.*s", (int)size, at);
        return;
    }
    const unsigned char *found = memmem(at, size, "\"sequence\":", 11);
    if (found) {
        long sequence = strtol((const char *)found + 11, NULL, 10);
        if (client->seen && sequence != client->sequence + 1)
            broken("%ld came after %ld", sequence, client->sequence);
        client->seen = 1;
        client->sequence = sequence;
    }
    counted++;
    if (to_send > 0) {
        to_send--;
        put(client, message, message_size);
    }
    if (counted == expected) say("got");
}

static void readable(Client *client) {
    size_t have = client->have, at = 0;
    memcpy(buffer, client->part, have);
    ssize_t got = recv(client->fd, buffer + have, CHUNK, 0);
    if (got <= 0) broken("a connection ended after %ld frames", counted);
    have += (size_t)got;
    buffer[have] = 0;
    if (!client->open) {
        unsigned char *end = memmem(buffer, have, "\r\n\r\n", 4);
        if (end) {
            if (memcmp(buffer, "HTTP/1.1 101", 12)) broken("refused: %.200s", buffer);
            client->open = 1;
            at = (size_t)(end + 4 - buffer);
            if (*hello) say_text(client, hello);
            if (!ready_size) is_up(client);
        }
    }
    while (client->open && have - at >= 2) {
        size_t size = buffer[at + 1] & 127, start = at + 2;
        if (size == 126) {
            if (have - at < 4) break;
            size = (size_t)buffer[at + 2] << 8 | buffer[at + 3];
            start += 2;
        } else if (size == 127) {
            broken("a frame of over 65,535 bytes");
        }
        if (start + size > have) break;
        int kind = buffer[at] & 15;
        if (kind == 1) {
            text(client, buffer + start, size);
        } else if (kind == 9) {
            unsigned char pong[256];
            put(client, pong, masked(pong, 0x8a, buffer + start, size));
        } else if (kind == 8) {
            broken("closed with %d", size > 1 ? buffer[start] << 8 | buffer[start + 1] : 0);
        }
        at = start + size;
    }
    client->have = have - at;
    if (client->have > client->room) {
        client->room = client->have;
        client->part = realloc(client->part, client->room);
    }
    if (client->have) memcpy(client->part, buffer + at, client->have);
}

static void order(char *line) {
    long number;
    int more, from;
    if (sscanf(line, "connect %d %d", &more, &window) == 2) {
        wanted += more;
        connect_more();
    } else if (sscanf(line, "expect %ld", &number) == 1) {
        /* May come behind the first of what it is about. */
        expected += number;
        if (counted == expected) say("got");
    } else if (sscanf(line, "echo %ld %d %n", &number, &more, &from) == 2) {
        message_size = masked(message, 0x81, (unsigned char *)line + from, strlen(line + from));
        expected += number;
        to_send = number - more;
        for (int i = 0; i < more; i++) put(&clients[i], message, message_size);
    } else if (!strcmp(line, "close")) {
        for (int i = 0; i < count; i++) close(clients[i].fd);
        say("closed");
        exit(0);
    } else {
        broken("no such order: %s", line);
    }
}

static void read_orders(void) {
    static char lines[8192];
    static size_t have;
    ssize_t got = read(0, lines + have, sizeof lines - have - 1);
    if (got <= 0) exit(0);
    have += (size_t)got;
    lines[have] = 0;
    for (char *end; (end = strchr(lines, '\n'));) {
        *end = 0;
        order(lines);
        have -= (size_t)(end + 1 - lines);
        memmove(lines, end + 1, have + 1);
    }
}

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    port = atoi(argv[1]);
    marks[0] = strtok(argv[3], "|");
    marks[1] = strtok(NULL, "|");
    if (argc > 4) ready = argv[4];
    ready_size = strlen(ready);
    if (argc > 5) hello = argv[5];
    FILE *file = fopen(argv[2], "rb");
    if (!file) broken("no requests: %s", strerror(errno));
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    requests = next_request = malloc((size_t)size + 1);
    requests_end = requests + fread(requests, 1, (size_t)size, file);

    epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, found[256];
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (;;) {
        int many = epoll_wait(epoll, found, 256, -1);
        for (int i = 0; i < many; i++) {
            if (found[i].data.ptr) readable(found[i].data.ptr);
            else read_orders();
        }
    }
}
