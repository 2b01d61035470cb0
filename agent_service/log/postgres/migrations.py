"""Migration 1 of the event log in PostgreSQL: its tables and its first functions.

Everything is in the schema `steward`. A migration that was released is never edited: later ones
follow it. Functions carry a version in their names, so that two versions of this program can
work on one database while a cluster is upgraded.

Layout: `stream` is one row per user, locked for as long as a group that writes to it lasts;
`chunk` holds runs of events in order of arrival (`packing.py`). All are partitioned by hash.

Tenants: every row names its tenant, and row-level security shows a transaction only the rows of the
tenants in its setting `steward.tenants`; `steward.scope = all` is for listings of the whole
log. Partitions have no policy of their own, so that nothing is seen through them. A
superuser is not bound by this, which is why this program refuses to work as one.
"""

PARTITIONS = 8
COMPACT_LOCK = 0x53_54_57_44
SLOTS = 64
"""Rows that share the counting of a log: groups of several processes need not queue for one."""

_TABLES = """
CREATE TABLE steward.meta (
    id int PRIMARY KEY CHECK (id = 1),
    log_id text NOT NULL
);
CREATE TABLE steward.total (
    slot int PRIMARY KEY,
    streams bigint NOT NULL DEFAULT 0,
    events bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 20);
CREATE SEQUENCE steward.stream_row;
CREATE TABLE steward.stream (
    id bigint NOT NULL DEFAULT nextval('steward.stream_row'),
    tenant text COLLATE "C" NOT NULL,
    user_id text COLLATE "C" NOT NULL,
    stream_id text NOT NULL,
    fence bigint NOT NULL,
    activation text NOT NULL,
    oldest bigint NOT NULL DEFAULT 1,
    next bigint NOT NULL DEFAULT 1,
    number bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant, user_id)
) PARTITION BY HASH (tenant, user_id);
CREATE INDEX stream_by_row ON steward.stream (id);
CREATE INDEX stream_by_fence ON steward.stream (fence);
CREATE TABLE steward.chunk (
    tenant text COLLATE "C" NOT NULL,
    stream bigint NOT NULL,
    first bigint NOT NULL,
    count int NOT NULL,
    epoch bigint NOT NULL,
    at timestamptz NOT NULL DEFAULT now(),
    thread_id text COLLATE "C" NOT NULL,
    conversation boolean NOT NULL,
    packed bytea NOT NULL,
    PRIMARY KEY (stream, first)
) PARTITION BY HASH (stream);
CREATE INDEX chunk_of_thread ON steward.chunk (stream, thread_id, first);
-- Arrival and time go together, so that a few pages tell where old ones are.
CREATE INDEX chunk_by_time ON steward.chunk USING brin (at) WITH (pages_per_range = 32);
CREATE TABLE steward.record (
    tenant text COLLATE "C" NOT NULL,
    stream bigint NOT NULL,
    kind smallint NOT NULL,
    key text COLLATE "C" NOT NULL,
    value bytea NOT NULL,
    PRIMARY KEY (stream, kind, key)
) PARTITION BY HASH (stream);
CREATE INDEX open_run ON steward.record (stream) WHERE kind = 2;
CREATE TABLE steward.thread (
    tenant text COLLATE "C" NOT NULL,
    stream bigint NOT NULL,
    thread_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    -- The first value that had a title: the thread keeps it.
    titled bytea,
    value bytea NOT NULL,
    PRIMARY KEY (stream, thread_id)
) PARTITION BY HASH (stream);
CREATE INDEX thread_newest ON steward.thread (stream, sequence DESC, thread_id);
"""

_OWNED = ("stream", "chunk", "record", "thread")

_PARTITION = """
CREATE TABLE steward.{table}_{part} PARTITION OF steward.{table}
    FOR VALUES WITH (MODULUS {partitions}, REMAINDER {part}){options};
ALTER TABLE steward.{table}_{part} ENABLE ROW LEVEL SECURITY;
ALTER TABLE steward.{table}_{part} FORCE ROW LEVEL SECURITY;
"""

# The sub-selects are evaluated once per statement, and not once per row.
_POLICY = """
ALTER TABLE steward.{table} ENABLE ROW LEVEL SECURITY;
ALTER TABLE steward.{table} FORCE ROW LEVEL SECURITY;
CREATE POLICY tenants ON steward.{table} USING (
    tenant = ANY ((SELECT steward.tenants())::text[])
    OR (SELECT current_setting('steward.scope', true)) = 'all'
) WITH CHECK (tenant = ANY ((SELECT steward.tenants())::text[]));
"""

_TENANTS = """
CREATE FUNCTION steward.tenants() RETURNS text[] LANGUAGE sql STABLE AS $$
    SELECT coalesce(nullif(current_setting('steward.tenants', true), ''), '{}')::text[]
$$;
"""

# Plans are made once per session: what is joined is always few rows found by their key.
PLANS = """
    SET plan_cache_mode = force_generic_plan
    SET enable_seqscan = off
    SET enable_hashjoin = off
    SET enable_mergejoin = off
"""

APPEND_V1 = f"""
CREATE FUNCTION steward.append_v1(
    p_slot int,
    p_tenant text[], p_user text[], p_epoch bigint[], p_number bigint[], p_expected bigint[],
    p_count int[],
    c_op int[], c_offset int[], c_count int[], c_thread text[], c_conversation boolean[],
    c_packed bytea[],
    r_op int[], r_kind smallint[], r_key text[], r_value bytea[],
    t_op int[], t_thread text[], t_sequence bigint[], t_titled bytea[], t_value bytea[]
) RETURNS TABLE (verdict int, value bigint) LANGUAGE plpgsql {PLANS} AS $$
#variable_conflict use_column
DECLARE
    -- Of each append: its stream, what comes next there, and what was decided (0: write).
    rows bigint[];
    nexts bigint[];
    fences bigint[];
    verdicts int[];
    written bigint;
BEGIN
    PERFORM set_config(
        'steward.tenants', (SELECT array_agg(DISTINCT t)::text FROM unnest(p_tenant) AS t), true);
    PERFORM set_config('idle_in_transaction_session_timeout', '10s', true);
    -- Whoever else writes to one of these users waits here, or was waited for; the order keeps
    -- two groups from waiting for each other. What follows are statements of their own, which
    -- see what the others did.
    PERFORM 1 FROM unnest(p_tenant, p_user) AS o (tenant, user_id)
        JOIN steward.stream s ON s.tenant = o.tenant AND s.user_id = o.user_id
        ORDER BY s.id FOR UPDATE OF s;
    SELECT array_agg(coalesce(s.id, 0) ORDER BY o.op),
        array_agg(coalesce(s.next, 0) ORDER BY o.op),
        array_agg(coalesce(s.fence, 0) ORDER BY o.op),
        array_agg(CASE
            WHEN s.id IS NULL OR o.epoch <> s.fence THEN 1
            WHEN o.number = s.number THEN 2
            WHEN o.number <> s.number + 1 OR o.expected <> s.next THEN 3
            ELSE 0
        END ORDER BY o.op),
        coalesce(sum(o.count) FILTER (
            WHERE o.epoch = s.fence AND o.number = s.number + 1 AND o.expected = s.next), 0)
        INTO rows, nexts, fences, verdicts, written
        FROM unnest(p_tenant, p_user, p_epoch, p_number, p_expected, p_count)
            WITH ORDINALITY AS o (tenant, user_id, epoch, number, expected, count, op)
        LEFT JOIN steward.stream s ON s.tenant = o.tenant AND s.user_id = o.user_id;
    UPDATE steward.stream s SET number = o.number, next = s.next + o.count
        FROM unnest(p_tenant, p_user, p_number, p_count)
            WITH ORDINALITY AS o (tenant, user_id, number, count, op)
        WHERE verdicts[o.op] = 0 AND s.tenant = o.tenant AND s.user_id = o.user_id;
    IF written > 0 THEN
        INSERT INTO steward.chunk
            (tenant, stream, first, count, epoch, thread_id, conversation, packed)
        SELECT p_tenant[c.op], rows[c.op], nexts[c.op] + c.start, c.count, p_epoch[c.op],
            c.thread_id, c.conversation, c.packed
        FROM unnest(c_op, c_offset, c_count, c_thread, c_conversation, c_packed)
            AS c (op, start, count, thread_id, conversation, packed)
        WHERE verdicts[c.op] = 0;
        UPDATE steward.total t SET events = t.events + written WHERE slot = p_slot;
    END IF;
    IF cardinality(r_op) > 0 THEN
        INSERT INTO steward.record (tenant, stream, kind, key, value)
        SELECT p_tenant[r.op], rows[r.op], r.kind, r.key, r.value
        FROM unnest(r_op, r_kind, r_key, r_value) AS r (op, kind, key, value)
        WHERE verdicts[r.op] = 0 AND r.value IS NOT NULL
        ON CONFLICT (stream, kind, key) DO UPDATE SET value = EXCLUDED.value;
        DELETE FROM steward.record d
        USING unnest(r_op, r_kind, r_key, r_value) AS r (op, kind, key, value)
        WHERE verdicts[r.op] = 0 AND r.value IS NULL
            AND d.stream = rows[r.op] AND d.kind = r.kind AND d.key = r.key;
    END IF;
    IF cardinality(t_op) > 0 THEN
        INSERT INTO steward.thread AS known
            (tenant, stream, thread_id, sequence, titled, value)
        SELECT p_tenant[t.op], rows[t.op], t.thread_id, t.sequence, t.titled, t.value
        FROM unnest(t_op, t_thread, t_sequence, t_titled, t_value)
            AS t (op, thread_id, sequence, titled, value)
        WHERE verdicts[t.op] = 0 AND t.value IS NOT NULL
        ON CONFLICT (stream, thread_id) DO UPDATE SET sequence = EXCLUDED.sequence,
            titled = coalesce(known.titled, EXCLUDED.titled), value = EXCLUDED.value;
        DELETE FROM steward.thread d
        USING unnest(t_op, t_thread, t_value) AS t (op, thread_id, value)
        WHERE verdicts[t.op] = 0 AND t.value IS NULL
            AND d.stream = rows[t.op] AND d.thread_id = t.thread_id;
    END IF;
    RETURN QUERY
        SELECT o.verdict,
            CASE o.verdict WHEN 0 THEN o.next + o.count WHEN 1 THEN o.fence ELSE o.next END
        FROM unnest(verdicts, nexts, fences, p_count) WITH ORDINALITY
            AS o (verdict, next, fence, count, op)
        ORDER BY o.op;
END
$$;
"""

SEAL_V1 = f"""
CREATE FUNCTION steward.seal_v1(
    p_slot int, p_tenant text[], p_user text[], p_epoch bigint[], p_activation text[],
    p_stream_id text[]
) RETURNS TABLE (
    op int, fence bigint, sealed boolean, stream_id text, next bigint, oldest bigint,
    number bigint, kind smallint, key text, value bytea
) LANGUAGE plpgsql {PLANS} AS $$
#variable_conflict use_column
DECLARE
    made int;
BEGIN
    PERFORM set_config(
        'steward.tenants', (SELECT array_agg(DISTINCT t)::text FROM unnest(p_tenant) AS t), true);
    PERFORM set_config('idle_in_transaction_session_timeout', '10s', true);
    INSERT INTO steward.stream (tenant, user_id, stream_id, fence, activation)
        SELECT o.tenant, o.user_id, o.stream_id, o.epoch, o.activation
        FROM unnest(p_tenant, p_user, p_epoch, p_activation, p_stream_id)
            AS o (tenant, user_id, epoch, activation, stream_id)
        ORDER BY o.tenant, o.user_id
        ON CONFLICT (tenant, user_id) DO NOTHING;
    GET DIAGNOSTICS made = ROW_COUNT;
    PERFORM 1 FROM unnest(p_tenant, p_user) AS o (tenant, user_id)
        JOIN steward.stream s ON s.tenant = o.tenant AND s.user_id = o.user_id
        ORDER BY s.id FOR UPDATE OF s;
    -- Totals come after streams wherever both are locked.
    IF made > 0 THEN
        UPDATE steward.total SET streams = streams + made WHERE slot = p_slot;
    END IF;
    UPDATE steward.stream s SET fence = o.epoch, activation = o.activation, number = 0
        FROM unnest(p_tenant, p_user, p_epoch, p_activation)
            AS o (tenant, user_id, epoch, activation)
        WHERE s.tenant = o.tenant AND s.user_id = o.user_id AND o.epoch > s.fence;
    RETURN QUERY
        SELECT o.op::int, s.fence, o.epoch = s.fence AND o.activation = s.activation,
            s.stream_id, s.next, s.oldest, s.number, r.kind, r.key, r.value
        FROM unnest(p_tenant, p_user, p_epoch, p_activation)
            WITH ORDINALITY AS o (tenant, user_id, epoch, activation, op)
        JOIN steward.stream s ON s.tenant = o.tenant AND s.user_id = o.user_id
        LEFT JOIN steward.record r ON r.stream = s.id
            AND o.epoch = s.fence AND o.activation = s.activation
        ORDER BY 1, r.kind, r.key;
END
$$;
"""


# Streams are taken in the order of their rows, after `p_after`. Old chunks of a stream are a prefix
# of it, since they were written in its order; those of its last append, which have one time, stay.
# One process compacts at a time: another one is told that all is done.
COMPACT_V1 = f"""
CREATE FUNCTION steward.compact_v1(p_before timestamptz, p_after bigint, p_streams int)
RETURNS TABLE (removed bigint, after bigint) LANGUAGE plpgsql {PLANS} AS $$
#variable_conflict use_column
DECLARE
    looked bigint[];
    old bigint[];
    gone bigint;
BEGIN
    IF NOT pg_try_advisory_xact_lock({COMPACT_LOCK}) THEN
        RETURN QUERY SELECT 0::bigint, NULL::bigint;
        RETURN;
    END IF;
    PERFORM set_config('steward.scope', 'all', true);
    SELECT array_agg(id ORDER BY id) INTO looked
        FROM (SELECT id FROM steward.stream WHERE id > p_after ORDER BY id LIMIT p_streams) s;
    SELECT array_agg(id) INTO old FROM (
        SELECT l.id,
            (SELECT at FROM steward.chunk WHERE stream = l.id ORDER BY first LIMIT 1) AS eldest,
            (SELECT at FROM steward.chunk WHERE stream = l.id ORDER BY first DESC LIMIT 1) AS newest
        FROM unnest(looked) AS l (id)
    ) s WHERE eldest < p_before AND eldest <> newest;
    IF old IS NULL THEN
        RETURN QUERY SELECT 0::bigint, looked[cardinality(looked)];
        RETURN;
    END IF;
    PERFORM set_config('steward.tenants', (
        SELECT array_agg(DISTINCT tenant)::text FROM steward.stream WHERE id = ANY (old)), true);
    PERFORM 1 FROM steward.stream WHERE id = ANY (old) ORDER BY id FOR UPDATE;
    WITH last AS (
        SELECT l.id,
            (SELECT at FROM steward.chunk WHERE stream = l.id ORDER BY first DESC LIMIT 1) AS at
        FROM unnest(old) AS l (id)
    ), dropped AS (
        DELETE FROM steward.chunk c USING last
        WHERE c.stream = last.id AND c.at < p_before AND c.at <> last.at
        RETURNING c.stream, c.first, c.count
    ), upto AS (
        SELECT stream, max(first + count) AS oldest, sum(count) AS events
        FROM dropped GROUP BY stream
    ), moved AS (
        UPDATE steward.stream s SET oldest = u.oldest FROM upto u
        WHERE s.id = u.stream AND s.oldest < u.oldest
    )
    SELECT coalesce(sum(events), 0) INTO gone FROM upto;
    UPDATE steward.total SET events = events - gone WHERE slot = 0;
    RETURN QUERY SELECT gone, looked[cardinality(looked)];
END
$$;
"""


def _first() -> str:
    partitions = "".join(
        _PARTITION.format(
            table=table,
            part=part,
            partitions=PARTITIONS,
            # Room for the next versions of a row in its page: no index entry is written then.
            options=" WITH (fillfactor = 60)" if table in ("stream", "record") else "",
        )
        for table in _OWNED
        for part in range(PARTITIONS)
    )
    policies = "".join(_POLICY.format(table=table) for table in _OWNED)
    slots = f"INSERT INTO steward.total (slot) SELECT generate_series(0, {SLOTS - 1});"
    named = "INSERT INTO steward.meta SELECT 1, substr(md5(random()::text || now()), 1, 16);"
    return "".join(
        (_TABLES, partitions, _TENANTS, policies, APPEND_V1, SEAL_V1, COMPACT_V1, slots, named)
    )


FIRST = _first()
