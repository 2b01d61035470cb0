"""A small process with a /readyz, for tests of the supervisor. Not a test module.

`standin.py OPS_PORT MODE [FILE]`, where MODE is `ready`, `unready`, `deaf` (ready, ignores
SIGTERM), `wrong-use` (says so and exits with 2), or `crash` (exits with 1).
A SIGTERM is noted in FILE by the pid.
"""

import os
import signal
import socket
import sys
import threading
from pathlib import Path


def main() -> None:
    port, mode = int(sys.argv[1]), sys.argv[2]
    file = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    if mode == "wrong-use":
        sys.exit("steward: the agent can't be loaded: no such file")
    if mode == "crash":
        sys.exit("something broke")

    def stop(number: int, _: object) -> None:
        if file is not None:
            with file.open("a") as out:
                out.write(f"{os.getpid()}\n")
        if mode != "deaf":
            os._exit(0)

    signal.signal(signal.SIGTERM, stop)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    threading.Thread(target=serve, args=(server, mode), daemon=True).start()
    while True:
        signal.pause()


def serve(server: socket.socket, mode: str) -> None:
    body = b'{"why": "no peer yet"}' if mode == "unready" else b'{"status": "ready"}'
    status = b"503 Service Unavailable" if mode == "unready" else b"200 OK"
    answer = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)


if __name__ == "__main__":
    # sys.exit with a text exits with 1; wrong use is 2, as the services do it.
    try:
        main()
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2 if sys.argv[2] == "wrong-use" else 1)
