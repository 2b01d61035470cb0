"""`steward chat`: ask an agent and see its events as they come.

With a question it shows that run and ends; without one it takes a question a line, from
a terminal or a pipe. It is an ordinary client of an edge: the address is that of the
cluster in `--data`, the token is made with the key there, unless both are given. Ctrl-C
stops the run, a second one the program. Exit codes: 0 every run succeeded, 1 a run or a
message failed or was refused, 2 wrong use, no cluster, or no way to it.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from steward.cli.layout import data_path
from steward.model.keys import DEFAULT_TENANT, DEFAULT_THREAD, UserKey

if TYPE_CHECKING:
    from steward.client.client import Client
    from steward.client.run import Run

TOKEN_TTL_S = 3600
EXIT_FAILED = 1
EXIT_WRONG_USE = 2
EXIT_INTERRUPTED = 130
MOST_LINE_BYTES = 1 << 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "chat",
        help="talk to an agent and see its events",
        description="Ask an agent and see its events; without a question, a line at a time.",
    )
    parser.add_argument("question", nargs="?", help="what to ask")
    parser.add_argument("--user", metavar="U", help="who asks; needed unless --token is given")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="(default)")
    parser.add_argument("--thread", default=DEFAULT_THREAD, metavar="ID", help="(main)")
    parser.add_argument("--agent", metavar="NAME", help="which agent; default: the first served")
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")
    parser.add_argument("--data", type=data_path, default=".steward", metavar="DIR")
    parser.add_argument("--url", help="an edge; default: that of the cluster in --data")
    parser.add_argument("--token", metavar="T", help="default: made with the key in --data")


def run(args: argparse.Namespace) -> int:
    """Ask, show, and return the exit code."""
    from steward.cli.cluster_file import NoCluster, read_cluster
    from steward.rpc.keys import KeyUnusable

    if (args.user is None) == (args.token is None):
        return _complain("give either --user, or --token")
    if args.question is not None and not args.question.strip():
        return _complain("the question is empty")
    try:
        url = args.url or read_cluster(args.data).url
        tokens = _token_source(args)
    except (NoCluster, KeyUnusable, ValueError) as error:
        return _complain(str(error))
    return asyncio.run(_chat(args, url, tokens))


def _token_source(args: argparse.Namespace) -> Callable[[], Awaitable[str]] | None:
    """Makes tokens with the key in the data directory; None when one was given."""
    from steward.rpc.keys import USER_KEY, load_or_create_key
    from steward.tokens import mint

    if args.token is not None:
        return None
    key = load_or_create_key(args.data, USER_KEY)
    user = UserKey(args.tenant, args.user)
    mint(key, user, TOKEN_TTL_S)  # An id that no token may have is wrong use, said now.

    async def provide() -> str:
        return mint(key, user, TOKEN_TTL_S)

    return provide


def _complain(text: str, code: int = EXIT_WRONG_USE) -> int:
    print(f"steward: {text}", file=sys.stderr)
    return code


async def _chat(
    args: argparse.Namespace, url: str, tokens: Callable[[], Awaitable[str]] | None
) -> int:
    from steward.client.client import Client
    from steward.client.commands import Opened, Problem
    from steward.errors import Reason, StewardError

    connections = 0

    def on_opened(opened: Opened) -> None:
        nonlocal connections
        connections += 1
        if connections > 1:
            print(f"steward: connected again ({opened.resume})", file=sys.stderr)

    def on_problem(problem: Problem) -> None:
        print(f"steward: {problem.reason}: {problem.message}", file=sys.stderr)

    client = Client(
        url, token=args.token, token_provider=tokens, on_opened=on_opened, on_problem=on_problem
    )
    chat = Chat(client, args)
    try:
        async with client:
            chat.listen()
            if args.question is not None:
                return await chat.ask(args.question)
            return await chat.converse()
    except StewardError as error:
        # Nobody there is the environment; an answer that says no is a refusal.
        nobody = connections == 0 and error.reason is Reason.MANAGER_UNAVAILABLE
        code = EXIT_WRONG_USE if nobody else EXIT_FAILED
        return _complain(f"{error.reason}: {error.message}", code)
    except asyncio.CancelledError:
        if not chat.interrupted:
            raise
        return EXIT_INTERRUPTED
    finally:
        chat.forget()


class Chat:
    """Asks one question after the other, and stops the run, then itself, on Ctrl-C."""

    def __init__(self, client: "Client", args: argparse.Namespace) -> None:
        self._client = client
        self._args = args
        self._run: Run | None = None
        self._cancel: asyncio.Task[None] | None = None
        self._task: asyncio.Task[int] | None = None
        self.interrupted = False

    def listen(self) -> None:
        """Take Ctrl-C over, for the task that calls this."""
        self._task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._on_interrupt)

    def forget(self) -> None:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)

    def _on_interrupt(self) -> None:
        if self._run is not None and self._cancel is None:
            print("steward: stopping the run; once more to leave", file=sys.stderr)
            self._cancel = asyncio.ensure_future(self._run.cancel())
        elif self._task is not None:
            self.interrupted = True
            self._task.cancel()

    async def ask(self, question: str) -> int:
        """Ask and show one run; the exit code."""
        from steward.cli.chat_view import RunView

        view = RunView(sys.stdout)
        run = await self._client.ask(question, thread_id=self._args.thread, agent=self._args.agent)
        self._run = run
        try:
            if run.accepted is not None and run.accepted.queue_position:
                waiting = run.accepted.queue_position
                print(f"steward: waits as number {waiting} in this thread", file=sys.stderr)
            async for event in run:
                if self._args.json:
                    print(event.raw, flush=True)
                else:
                    view.show(event)
            if not self._args.json:
                view.summary(run)
        finally:
            self._run = self._cancel = None
        return 0 if run.outcome == "success" else EXIT_FAILED

    async def converse(self) -> int:
        """A question a line, until the end of the input; the worst exit code of all."""
        from steward.errors import StewardError

        lines = Lines(sys.stdin.fileno())
        prompt = sys.stdin.isatty()
        worst = 0
        while True:
            if prompt:
                print("> ", end="", file=sys.stderr, flush=True)
            line = await lines.next()
            if line is None:
                if prompt:
                    print(file=sys.stderr)
                return worst
            if not line.strip():
                continue
            try:
                code = await self.ask(line.strip())
            except StewardError as error:
                if self._client.state == "CLOSED":
                    raise
                code = _complain(f"{error.reason}: {error.message}", EXIT_FAILED)
            worst = max(worst, code)


class Lines:
    """Lines of a file descriptor without a thread, so that Ctrl-C need not wait for a line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = b""
        self._at_end = False

    async def next(self) -> str | None:
        """The next line, a last one without its line end as well; None at the end."""
        while b"\n" not in self._held and not self._at_end:
            await self._readable()
            more = os.read(self._descriptor, 65_536)
            self._held += more
            self._at_end = not more or len(self._held) > MOST_LINE_BYTES
        line, found, self._held = self._held.partition(b"\n")
        return line.decode(errors="replace") if line or found else None

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, ready.set)
        except PermissionError:
            return  # A regular file: always readable.
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._descriptor)
