"""A user whose run with tools is in flight, and who must not notice more than a pause.

For tests that do something to a real cluster. The agent is `worker` of the end-to-end tests: tool
calls one after the other, each noted in a file, until `<file>.enough` is there.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from steward.testing.local_cluster import LocalCluster
from steward.testing.tab import Tab, open_tab

SOON_S = 30.0
RUN_S = 60.0


class Witness:
    """The tab of that user, and the file of its worker."""

    def __init__(self, tab: Tab, file: Path) -> None:
        self.tab = tab
        self.file = file

    async def goes_on(self) -> None:
        """Returns when a tool call has ended that began after this was called."""
        await self.tab.until("tool_executing", SOON_S)
        await self.tab.until("tool_completed", SOON_S)

    async def ends(self) -> None:
        """Let the run end, and read up to its end. All is whole: nothing lost, nothing twice."""
        enough(self.file)
        end = await self.tab.until("agent_completed", RUN_S)
        assert end["data"]["outcome"] == "success"
        assert self.tab.findings() == []
        assert [frame["type"] for frame in self.tab.frames].count("ready") == 1
        said = "".join(
            event["data"]["delta"] for event in self.tab.events if event["type"] == "agent_text"
        )
        calls = sum(event["type"] == "tool_completed" for event in self.tab.events)
        assert said == "".join(f"{number} " for number in range(calls - 1))

    def kept_manager(self) -> None:
        """The manager is the same one."""
        epochs = {event["epoch"] for event in self.tab.events}
        assert epochs == {self.tab.ready["manager"]["epoch"]}

    def stayed(self) -> None:
        """The manager is the same one, and each tool call was made once."""
        self.kept_manager()
        lines = self.file.read_text().splitlines()
        assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))


def enough(file: Path) -> None:
    """The worker with this file makes its last call."""
    Path(f"{file}.enough").touch()


@asynccontextmanager
async def witness(
    http: aiohttp.ClientSession, cluster: LocalCluster, token: str, file: Path
) -> AsyncIterator[Witness]:
    """A witness from its first tool call on; a call takes a tenth of a second."""
    async with await open_tab(http, cluster.url, token) as tab:
        seen = Witness(tab, file)
        await tab.send("m1", f"{file} 100", agent="worker")
        await seen.goes_on()
        yield seen
