"""Every name in a trace: spans, their attributes, and how long texts of users may be.

Runs and tools are named as OpenTelemetry's semantic conventions for generative AI name them
(`gen_ai.*`, status "development" in semconv 1.41); everything of Steward's own is under
`steward.*`. What users and agents wrote is under `CONTENT` alone, so that a collector can drop
it by these keys, and it is only recorded where `trace_content` says so. No user, tenant or
token is ever an attribute.
"""

from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final

import orjson

# Spans of the edge.
EDGE_CONNECT: Final = "edge.connect"
EDGE_RESUME: Final = "edge.resume"
EDGE_REATTACH: Final = "edge.reattach"
EDGE_RECEIVE: Final = "edge.receive"
EDGE_DELIVER: Final = "edge.deliver"
EDGE_ACKNOWLEDGE: Final = "edge.acknowledge"
# Of auth and registry.
AUTH_VALIDATE: Final = "auth.validate"
REGISTRY_RESOLVE: Final = "registry.resolve"
# Of the node.
MANAGER_ACTIVATE: Final = "manager.activate"
MANAGER_ADMIT: Final = "manager.admit"
# Of the log.
LOG_SEAL: Final = "log.seal"
LOG_COMMIT: Final = "log.commit"
# Of anybody.
VIOLATION: Final = "violation"

# Of the node, for its agents.
INVOKE_AGENT: Final = "invoke_agent"
EXECUTE_TOOL: Final = "execute_tool"
_APPEND: Final = "append"

# Attributes of the conventions.
OPERATION_NAME: Final = "gen_ai.operation.name"
AGENT_NAME: Final = "gen_ai.agent.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
USAGE: Final = MappingProxyType(
    {
        "input_tokens": "gen_ai.usage.input_tokens",
        "output_tokens": "gen_ai.usage.output_tokens",
    }
)
"""What an agent may say in the `usage` of its result, and its attribute."""

ERROR_TYPE: Final = "error.type"
FUNCTION: Final = "function"

# Attributes of the conventions that hold what users and agents wrote.
INPUT_MESSAGES: Final = "gen_ai.input.messages"
OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
TOOL_ARGUMENTS: Final = "gen_ai.tool.call.arguments"
TOOL_RESULT: Final = "gen_ai.tool.call.result"
CONTENT: Final = frozenset({INPUT_MESSAGES, OUTPUT_MESSAGES, TOOL_ARGUMENTS, TOOL_RESULT})
"""All keys under which content is recorded, and the only ones."""

# Attributes of Steward.
SEQUENCE: Final = "steward.sequence"
EPOCH: Final = "steward.epoch"
EVENT_TYPE: Final = "steward.event.type"
RUN_ID: Final = "steward.run_id"
ATTEMPT: Final = "steward.attempt"
OUTCOME: Final = "steward.outcome"
COMMAND: Final = "steward.command"
REASON: Final = "steward.reason"
CLOSE_CODE: Final = "steward.close_code"
CONNECTION_ID: Final = "steward.connection_id"
RESUME: Final = "steward.resume"
CAUSE: Final = "steward.cause"
KIND: Final = "steward.violation.kind"
SEVERITY: Final = "steward.violation.severity"
UPGRADED: Final = "steward.upgraded"
"""True on a span of a trace that was not sampled, kept for what happened in it."""
LINK: Final = "steward.link"
"""On a link: why the two are joined, one of the following."""

ATTACH: Final = "attach"
RESUMED: Final = "resume"
HANDOFF: Final = "handoff"
FAILOVER: Final = "failover"
REATTACH: Final = "reattach"

MOST_CONTENT_CHARS = 8_192
"""A text of a user is cut at so many characters, each attribute by itself."""


def run_span(agent: str) -> str:
    """The span of one execution of a run."""
    return f"{INVOKE_AGENT} {agent}"


def tool_span(tool: str) -> str:
    """The span of one call of a tool."""
    return f"{EXECUTE_TOOL} {tool}"


def append_span(event_type: str) -> str:
    """The span of one event from the agent's verb to its place in the log."""
    return f"{_APPEND} {event_type}"


def conversation(stream_id: str, thread_id: str) -> str:
    """One thread of one user, as an id that tells nothing of either."""
    return blake2b(f"{stream_id} {thread_id}".encode(), digest_size=8).hexdigest()


def messages(role: str, content: Any) -> str:
    """A message as `gen_ai.input.messages` and `gen_ai.output.messages` have it, cut to length."""
    text = content if isinstance(content, str) else orjson.dumps(content).decode()
    part = {"type": "text", "content": text[:MOST_CONTENT_CHARS]}
    return orjson.dumps([{"role": role, "parts": [part]}]).decode()


def content(value: Any) -> str:
    """Arguments or a result of a tool, cut to length."""
    return orjson.dumps(value).decode()[:MOST_CONTENT_CHARS]
