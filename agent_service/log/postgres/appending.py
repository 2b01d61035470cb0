"""Migration 2 of the event log in PostgreSQL: an append is decided and written in one pass.

The first version locked the rows of a group's users, read them, changed them, and wrote what the
reading had allowed: each user's row was looked up three times. Here one UPDATE finds, locks,
decides and changes, and its rows are what is inserted. At READ COMMITTED that is enough:
whoever waited for another writer of the same user has its condition looked at again, on the
row as the other left it, so nothing is written on the strength of what was true before.

Deadlocks: everybody takes users in one order, that of their stored names, in which `groups.py`
sorts an append. The functions of before, which processes of an older version still call while
a cluster is upgraded, get that order too; what they are called with and answer stays.
"""

from agent_service.log.postgres import migrations

# Events of more than one thread are several chunks: the first one comes with its append.
_APPEND_V2 = f"""
CREATE FUNCTION steward.append_v2(
    p_slot int,
    p_tenant text[], p_user text[], p_epoch bigint[], p_number bigint[], p_expected bigint[],
    p_count int[],
    p_events int[], p_thread text[], p_conversation boolean[], p_packed bytea[],
    c_op int[], c_offset int[], c_count int[], c_thread text[], c_conversation boolean[],
    c_packed bytea[],
    r_op int[], r_kind smallint[], r_key text[], r_value bytea[],
    t_op int[], t_thread text[], t_sequence bigint[], t_titled bytea[], t_value bytea[]
) RETURNS TABLE (op int, verdict int, value bigint) LANGUAGE plpgsql {migrations.PLANS} AS $$
#variable_conflict use_column
DECLARE
    asked int := cardinality(p_user);
    -- Which appends were written, in the order of their rows here, and the streams of these.
    ops int[];
    ids bigint[];
    -- Of each append its stream, 0 if it was not written.
    streams bigint[];
    written bigint;
BEGIN
    PERFORM set_config(
        'steward.tenants', (SELECT array_agg(DISTINCT t)::text FROM unnest(p_tenant) AS t), true);
    PERFORM set_config('idle_in_transaction_session_timeout', '10s', true);
    WITH done AS (
        UPDATE steward.stream s SET number = o.number, next = o.expected + o.count
        FROM unnest(p_tenant, p_user, p_epoch, p_number, p_expected, p_count,
                p_events, p_thread, p_conversation, p_packed) WITH ORDINALITY
            AS o (tenant, user_id, epoch, number, expected, count,
                events, thread_id, conversation, packed, op)
        WHERE s.tenant = o.tenant AND s.user_id = o.user_id
            AND s.fence = o.epoch AND s.number = o.number - 1 AND s.next = o.expected
        RETURNING o.op::int, s.id, o.tenant, o.epoch, o.expected, o.count,
            o.events, o.thread_id, o.conversation, o.packed
    ), kept AS (
        INSERT INTO steward.chunk
            (tenant, stream, first, count, epoch, thread_id, conversation, packed)
        SELECT tenant, id, expected, events, epoch, thread_id, conversation, packed
        FROM done WHERE events > 0
    )
    SELECT coalesce(array_agg(op), '{{}}'), array_agg(id), coalesce(sum(count), 0)
        INTO ops, ids, written FROM done;
    streams := array_fill(0::bigint, ARRAY[asked]);
    FOR at IN 1 .. cardinality(ops) LOOP
        streams[ops[at]] := ids[at];
    END LOOP;
    IF written > 0 THEN
        UPDATE steward.total t SET events = t.events + written WHERE slot = p_slot;
    END IF;
    IF cardinality(c_op) > 0 THEN
        INSERT INTO steward.chunk
            (tenant, stream, first, count, epoch, thread_id, conversation, packed)
        SELECT p_tenant[c.op], streams[c.op], p_expected[c.op] + c.start, c.count, p_epoch[c.op],
            c.thread_id, c.conversation, c.packed
        FROM unnest(c_op, c_offset, c_count, c_thread, c_conversation, c_packed)
            AS c (op, start, count, thread_id, conversation, packed)
        WHERE streams[c.op] > 0;
    END IF;
    IF cardinality(r_op) > 0 THEN
        INSERT INTO steward.record (tenant, stream, kind, key, value)
        SELECT p_tenant[r.op], streams[r.op], r.kind, r.key, r.value
        FROM unnest(r_op, r_kind, r_key, r_value) AS r (op, kind, key, value)
        WHERE streams[r.op] > 0 AND r.value IS NOT NULL
        ON CONFLICT (stream, kind, key) DO UPDATE SET value = EXCLUDED.value;
        DELETE FROM steward.record d
        USING unnest(r_op, r_kind, r_key, r_value) AS r (op, kind, key, value)
        WHERE streams[r.op] > 0 AND r.value IS NULL
            AND d.stream = streams[r.op] AND d.kind = r.kind AND d.key = r.key;
    END IF;
    IF cardinality(t_op) > 0 THEN
        INSERT INTO steward.thread AS known
            (tenant, stream, thread_id, sequence, titled, value)
        SELECT p_tenant[t.op], streams[t.op], t.thread_id, t.sequence, t.titled, t.value
        FROM unnest(t_op, t_thread, t_sequence, t_titled, t_value)
            AS t (op, thread_id, sequence, titled, value)
        WHERE streams[t.op] > 0 AND t.value IS NOT NULL
        ON CONFLICT (stream, thread_id) DO UPDATE SET sequence = EXCLUDED.sequence,
            titled = coalesce(known.titled, EXCLUDED.titled), value = EXCLUDED.value;
        DELETE FROM steward.thread d
        USING unnest(t_op, t_thread, t_value) AS t (op, thread_id, value)
        WHERE streams[t.op] > 0 AND t.value IS NULL
            AND d.stream = streams[t.op] AND d.thread_id = t.thread_id;
    END IF;
    IF cardinality(ops) = asked THEN
        RETURN;
    END IF;
    -- Why the others were not written. What would be written now was not possible a moment ago:
    -- the whole group is taken back, and comes again.
    RETURN QUERY
        SELECT o.op::int,
            CASE
                WHEN s.id IS NULL OR o.epoch <> s.fence THEN 1
                WHEN o.number = s.number THEN 2
                ELSE 3
            END,
            CASE WHEN o.epoch = s.fence THEN s.next ELSE coalesce(s.fence, 0) END
        FROM unnest(p_tenant, p_user, p_epoch, p_number, p_expected)
            WITH ORDINALITY AS o (tenant, user_id, epoch, number, expected, op)
        LEFT JOIN steward.stream s ON s.tenant = o.tenant AND s.user_id = o.user_id
        WHERE streams[o.op] = 0
            AND (o.epoch = s.fence AND o.number = s.number + 1 AND o.expected = s.next)
                IS NOT TRUE;
    GET DIAGNOSTICS written = ROW_COUNT;
    IF written + cardinality(ops) < asked THEN
        RAISE EXCEPTION 'a seal came between' USING ERRCODE = 'serialization_failure';
    END IF;
END
$$;
"""

# Since the body is all that changes, a process that is in the middle of a call ends it as before.
_ONE_ORDER = "".join(
    function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION").replace(before, after)
    for function, before, after in (
        (migrations.APPEND_V1, "ORDER BY s.id FOR", "ORDER BY s.tenant, s.user_id FOR"),
        (migrations.SEAL_V1, "ORDER BY s.id FOR", "ORDER BY s.tenant, s.user_id FOR"),
        (migrations.COMPACT_V1, "ORDER BY id FOR", "ORDER BY tenant, user_id FOR"),
    )
)

SECOND = _APPEND_V2 + _ONE_ORDER
