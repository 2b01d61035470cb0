"""What agent authors import.

```python
from steward.agent import Run, agent

@agent("analyst")
async def analyst(run: Run) -> str: ...
```

An async generator of text is an agent too, and so is a plain `def`, which gets a
`BlockingRun`. Names not listed here are internal.
"""

from steward.agent.definition import agent
from steward.agent.failures import NonDeterministic, ToolFailed
from steward.agent.port import RunCancelled
from steward.agent.run import BlockingRun, NotAvailable, Run, RunInput

__all__ = [
    "BlockingRun",
    "NonDeterministic",
    "NotAvailable",
    "Run",
    "RunCancelled",
    "RunInput",
    "ToolFailed",
    "agent",
]
