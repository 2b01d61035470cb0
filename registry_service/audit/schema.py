"""Where the audit is kept in PostgreSQL, if the registry is told to: its database and tables.

Everything is in the schema `steward_audit`, beside an event log or in a database of its own.
Several clusters may share it. A row has the number that it has in the registry's store, within
an era: a registry whose store lost its past counts from the beginning again, and begins a new
era here, so that no row is ever taken for another.

Tenants: row-level security shows a transaction only the rows of the tenants in its setting
`steward.tenants`, or all with `steward.scope = all`. Rows of nodes have no tenant.
"""

from dataclasses import dataclass
from typing import ClassVar

from steward.postgres import connecting
from steward.postgres.connecting import Use
from steward.postgres.migrator import Schema


@dataclass(frozen=True, slots=True)
class Database(connecting.Database):
    """The database of the audit."""

    USE: ClassVar[Use] = Use("the audit's database", "registry.audit", "steward-audit")


_TABLES = """
CREATE TABLE steward_audit.era (
    cluster text COLLATE "C" PRIMARY KEY,
    era int NOT NULL,
    since timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE steward_audit.ledger (
    cluster text COLLATE "C" NOT NULL,
    era int NOT NULL,
    number bigint NOT NULL,
    revision bigint NOT NULL,
    at timestamptz NOT NULL,
    kind text NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    epoch bigint NOT NULL,
    node_id text NOT NULL,
    node_rev bigint NOT NULL,
    cause text NOT NULL,
    evidence text NOT NULL,
    traceparent text NOT NULL,
    PRIMARY KEY (cluster, era, number)
);
CREATE INDEX ledger_of_user ON steward_audit.ledger (tenant, user_id, at);
CREATE INDEX ledger_by_time ON steward_audit.ledger USING brin (at);
CREATE TABLE steward_audit.violation (
    cluster text COLLATE "C" NOT NULL,
    era int NOT NULL,
    number bigint NOT NULL,
    at timestamptz NOT NULL,
    severity text NOT NULL,
    kind text NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    epoch bigint NOT NULL,
    node_id text NOT NULL,
    node_rev bigint NOT NULL,
    reporter text NOT NULL,
    evidence text NOT NULL,
    traceparent text NOT NULL,
    count bigint NOT NULL,
    PRIMARY KEY (cluster, era, number)
);
CREATE INDEX violation_of_kind ON steward_audit.violation (severity, kind, at);
CREATE INDEX violation_by_time ON steward_audit.violation USING brin (at);
CREATE FUNCTION steward_audit.tenants() RETURNS text[] LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting('steward.tenants', true), ''), '{}')::text[]
$$;
"""

# The sub-selects are evaluated once per statement, and not once per row.
_POLICY = """
ALTER TABLE steward_audit.{table} ENABLE ROW LEVEL SECURITY;
ALTER TABLE steward_audit.{table} FORCE ROW LEVEL SECURITY;
CREATE POLICY tenants ON steward_audit.{table} USING (
    tenant = ANY ((SELECT steward_audit.tenants())::text[])
    OR (SELECT current_setting('steward.scope', true)) = 'all'
);
"""

_FIRST = _TABLES + "".join(_POLICY.format(table=table) for table in ("ledger", "violation"))

SCHEMA = Schema("steward_audit", 0x53_54_57_55, (_FIRST,))
