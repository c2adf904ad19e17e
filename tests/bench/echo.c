/* The floor under every server here: sends back what comes, one epoll loop, nothing of what a server needs beside. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int send_all(int fd, const char *at, ssize_t size)
{
    while (size > 0) {
        ssize_t n = send(fd, at, (size_t)size, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return -1;
        at += n > 0 ? n : 0;
        size -= n > 0 ? n : 0;
    }
    return 0;
}

int main(int argc, char **argv)
{
    static char buffer[1 << 20];
    struct sockaddr_in address = {.sin_family = AF_INET};
    struct epoll_event events[256], e = {.events = EPOLLIN};
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0), ep = epoll_create1(0);

    if (argc != 2)
        return 2;
    address.sin_port = htons((uint16_t)atoi(argv[1]));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096))
        die("bind");
    e.data.fd = listener;
    epoll_ctl(ep, EPOLL_CTL_ADD, listener, &e);
    for (;;) {
        int n = epoll_wait(ep, events, 256, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                fd = accept(listener, NULL, NULL);
                if (fd < 0)
                    continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                e.data.fd = fd;
                epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
                continue;
            }
            ssize_t size = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
            if (size <= 0 ? size == 0 || errno != EAGAIN : send_all(fd, buffer, size))
                close(fd);
        }
    }
}
