"""The tables and functions of the auth store in PostgreSQL, as numbered migrations.

Everything is in the schema `steward_auth`, beside an event log or in a database of its own.
Functions carry a version in their names, so that two versions of this program can work on one
database while a cluster is upgraded.

Revocations get increasing numbers under a lock that lasts until the transaction ends: whoever has
read up to a number has missed none before it. Row-level security shows a transaction only the
revocations of the tenants in its setting `steward.tenants`; `steward.scope = all` is for learning
what is new. One-use secrets have no tenant of their own: who has the secret, has the row, and the
table knows only digests.
"""

from steward.postgres.migrator import Schema

_TABLES = """
CREATE TABLE steward_auth.last_change (
    id int PRIMARY KEY CHECK (id = 1),
    change bigint NOT NULL
);
INSERT INTO steward_auth.last_change VALUES (1, 0);
CREATE TABLE steward_auth.one_use (
    digest bytea PRIMARY KEY,
    expires_at_ms bigint NOT NULL,
    body bytea NOT NULL
);
CREATE INDEX one_use_by_expiry ON steward_auth.one_use (expires_at_ms);
CREATE TABLE steward_auth.revocation (
    tenant text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    issued_before_ms bigint NOT NULL,
    change bigint NOT NULL,
    PRIMARY KEY (tenant, user_id)
);
CREATE UNIQUE INDEX revocation_by_change ON steward_auth.revocation (change);
"""

# The sub-selects are evaluated once per statement, and not once per row.
_POLICY = """
CREATE FUNCTION steward_auth.tenants() RETURNS text[] LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting('steward.tenants', true), ''), '{}')::text[]
$$;
ALTER TABLE steward_auth.revocation ENABLE ROW LEVEL SECURITY;
ALTER TABLE steward_auth.revocation FORCE ROW LEVEL SECURITY;
CREATE POLICY tenants ON steward_auth.revocation USING (
    tenant = ANY ((SELECT steward_auth.tenants())::text[])
    OR (SELECT current_setting('steward.scope', true)) = 'all'
) WITH CHECK (tenant = ANY ((SELECT steward_auth.tenants())::text[]));
"""

# After a restart of the server it may be another one, with fewer changes: then all are told.
_MARKS = """
CREATE FUNCTION steward_auth.marks_v1(p_server timestamptz, p_after bigint, p_most int)
RETURNS TABLE (
    server timestamptz, change bigint, tenant text, user_id text, issued_before_ms bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    PERFORM set_config('steward.scope', 'all', true);
    RETURN QUERY
        SELECT pg_postmaster_start_time(), r.change, r.tenant, r.user_id, r.issued_before_ms
        FROM steward_auth.revocation r
        WHERE r.change > CASE WHEN p_server = pg_postmaster_start_time() THEN p_after ELSE 0 END
        ORDER BY r.change LIMIT p_most;
END
$$;
"""

# Each secret has one row, and deleting it is what hands it out: only one transaction can.
# What is new among the revocations is read last, so that an answer is never older than them.
_APPLY = """
CREATE FUNCTION steward_auth.apply_v1(
    p_keep bytea[], p_expires bigint[], p_body bytea[],
    p_take bytea[], p_now bigint,
    p_tenant text[], p_user text[], p_mark bigint[],
    p_server timestamptz, p_after bigint, p_most int
) RETURNS TABLE (
    taken bytea, body bytea,
    server timestamptz, change bigint, tenant text, user_id text, issued_before_ms bigint
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    number bigint;
BEGIN
    IF cardinality(p_keep) > 0 THEN
        INSERT INTO steward_auth.one_use (digest, expires_at_ms, body)
            SELECT * FROM unnest(p_keep, p_expires, p_body);
    END IF;
    IF cardinality(p_mark) > 0 THEN
        PERFORM set_config('steward.tenants',
            (SELECT array_agg(DISTINCT t)::text FROM unnest(p_tenant) AS t), true);
        UPDATE steward_auth.last_change SET change = change + cardinality(p_mark)
            RETURNING change INTO number;
        INSERT INTO steward_auth.revocation AS known (tenant, user_id, issued_before_ms, change)
            SELECT m.tenant, m.user_id, m.mark, number - m.op + 1
            FROM unnest(p_tenant, p_user, p_mark) WITH ORDINALITY
                AS m (tenant, user_id, mark, op)
            ON CONFLICT (tenant, user_id) DO UPDATE
            SET issued_before_ms = EXCLUDED.issued_before_ms, change = EXCLUDED.change
            WHERE known.issued_before_ms < EXCLUDED.issued_before_ms;
    END IF;
    IF cardinality(p_take) > 0 THEN
        RETURN QUERY
            DELETE FROM steward_auth.one_use
            WHERE digest = ANY (p_take) AND expires_at_ms > p_now
            RETURNING digest, body, NULL::timestamptz, NULL::bigint, NULL, NULL, NULL::bigint;
    END IF;
    RETURN QUERY
        SELECT NULL::bytea, NULL::bytea, m.*
        FROM steward_auth.marks_v1(p_server, p_after, p_most) m;
END
$$;
"""

# Late enough for every clock that is right within minutes. Others may sweep at the same time.
_SWEEP = """
CREATE FUNCTION steward_auth.sweep_v1(p_most int) RETURNS void LANGUAGE sql AS $$
    DELETE FROM steward_auth.one_use WHERE digest IN (
        SELECT digest FROM steward_auth.one_use
        WHERE expires_at_ms < extract(epoch FROM now()) * 1000 - 600000
        ORDER BY expires_at_ms LIMIT p_most FOR UPDATE SKIP LOCKED
    )
$$;
"""

MIGRATIONS: tuple[str, ...] = ("".join((_TABLES, _POLICY, _MARKS, _APPLY, _SWEEP)),)
"""From an empty schema to the present one; the version of a database is how many it had."""

SCHEMA = Schema("steward_auth", 0x53_54_57_41, MIGRATIONS)
