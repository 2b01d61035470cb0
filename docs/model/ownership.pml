/*
 * Ownership of one user, as a model for SPIN: who may write, start tools and be heard, while nodes
 * crash, pause and are suspected at any time. Names P1..P20 and I1..I10 are the protocol's; README.md
 * says what is modelled and what is not, check.py runs it.
 *
 * A pause needs no step of its own: every process may wait as long as it likes between any two steps.
 * Messages need none to be late either: a request, a release or an answer is acted on at any later time.
 *
 * Guards (each is on unless -DNO_<GUARD>):           Faults and sizes (off or small unless given):
 *   FENCE ACTIVATION EXPECTED ATOMIC_SEAL              -DREPLICAS=2  registry replicas
 *   APPEND_FIRST INTENT_FIRST EDGE_EPOCH               -DINCARNATIONS=4  of both nodes together
 *   SELF_FENCE GUARDED_COMMIT PLACEMENT_COMPARE        -DEVENTS=3  events in the user's log
 *   REREAD COMPARE_DELETE MUTATION_EPOCH               -DLOSS -DLATE  requests and answers to the log
 *   GENERATION LOG_HEAD                                -DTOOLS -DMOVES -DRELEASES -DTIMERS -DRESTORE
 * -DIGNORE_<INVARIANT> leaves a check out; -DREACH=n turns a wanted situation into an error, to show
 * that it can be reached.
 */

#ifndef REPLICAS
#define REPLICAS 1
#endif
#ifndef INCARNATIONS
#define INCARNATIONS 3
#endif
#ifndef EVENTS
#define EVENTS 3
#endif

/* Epoch = generation * 2 + revision. Three epochs; with a restore two in each of two generations. */
#ifdef RESTORE
#define LAST 4
#define LAST_REVISION 2
#define EACH_EPOCH(step) :: step(1) :: step(2) :: step(3) :: step(4)
#else
#define LAST 3
#define LAST_REVISION 3
#define EACH_EPOCH(step) :: step(1) :: step(2) :: step(3)
#endif

/* ---- The guards -------------------------------------------------------------------------------- */

#ifndef NO_FENCE            /* The log compares the epoch of every append and seal with its fence. */
#define FENCE(held) (held)
#else
#define FENCE(held) true
#endif
#ifndef NO_ACTIVATION       /* The log remembers which manager object sealed the epoch. */
#define ACTIVATION(held) (held)
#else
#define ACTIVATION(held) true
#endif
#ifndef NO_EXPECTED         /* The log compares the number of an append with its own next one. */
#define EXPECTED(held) (held)
#else
#define EXPECTED(held) true
#endif
#ifndef NO_ATOMIC_SEAL      /* Sealing and reading are one step; else: read, and seal later. */
#define ATOMIC_SEAL true
#else
#define ATOMIC_SEAL false
#endif
#ifndef NO_APPEND_FIRST     /* P9: append, then show. */
#define APPEND_FIRST(held) (held)
#else
#define APPEND_FIRST(held) true
#endif
#ifndef NO_INTENT_FIRST     /* P10: the tool starts after its intent was accepted. */
#define INTENT_FIRST(held) (held)
#else
#define INTENT_FIRST(held) true
#endif
#ifndef NO_EDGE_EPOCH       /* P15: the edge drops messages of a lower epoch than it has heard. */
#define EDGE_EPOCH(held) (held)
#else
#define EDGE_EPOCH(held) true
#endif
#ifndef NO_SELF_FENCE       /* P11: a node that learns that it is fenced stops, and stays stopped. */
#define SELF_FENCE true
#else
#define SELF_FENCE false
#endif
#ifndef NO_GUARDED_COMMIT   /* P5: the store compares that the node lives, in this incarnation. */
#define GUARDED_COMMIT(held) (held)
#else
#define GUARDED_COMMIT(held) true
#endif
#ifndef NO_PLACEMENT_COMPARE /* P5, P16: the store compares that the placement is the one that was read. */
#define PLACEMENT_COMPARE(held) (held)
#else
#define PLACEMENT_COMPARE(held) true
#endif
#ifndef NO_REREAD           /* P7: after an unknown result the registry reads before it answers. */
#define REREAD true
#else
#define REREAD false
#endif
#ifndef NO_COMPARE_DELETE   /* P16, P17: a release removes the placement of its own epoch only. */
#define COMPARE_DELETE(held) (held)
#else
#define COMPARE_DELETE(held) true
#endif
#ifndef NO_MUTATION_EPOCH   /* I10: timers, trims and deletes are compared with the fence as well. */
#define MUTATION_EPOCH(held) (held)
#else
#define MUTATION_EPOCH(held) true
#endif
#ifndef NO_GENERATION       /* P18: the generation is raised at every restore. */
#define GENERATION true
#else
#define GENERATION false
#endif
#ifndef NO_LOG_HEAD         /* P18: nothing is granted up to the fence of the log. */
#define LOG_HEAD(held) (held)
#else
#define LOG_HEAD(held) true
#endif

/* ---- Checking ---------------------------------------------------------------------------------- */

#define MUST(name, held) \
    if \
    :: held \
    :: else -> printf("BROKEN "); printf(#name); printf("\n"); assert(false) \
    fi

#ifndef IGNORE_S
#define MUST_S(held) MUST(S, held)
#else
#define MUST_S(held) skip
#endif
#ifndef IGNORE_P8
#define MUST_P8(held) MUST(P8, held)
#else
#define MUST_P8(held) skip
#endif
#ifndef IGNORE_I2
#define MUST_I2(held) MUST(I2, held)
#else
#define MUST_I2(held) skip
#endif
#ifndef IGNORE_I5
#define MUST_I5(held) MUST(I5, held)
#else
#define MUST_I5(held) skip
#endif
#ifndef IGNORE_I8
#define MUST_I8(held) MUST(I8, held)
#else
#define MUST_I8(held) skip
#endif
#ifndef IGNORE_I9
#define MUST_I9(held) MUST(I9, held)
#else
#define MUST_I9(held) skip
#endif

#ifndef REACH
#define REACH 0
#endif
#define REACHED(number, held) \
    if \
    :: REACH == number && (held) -> printf("REACHED\n"); assert(false) \
    :: else \
    fi

/* ---- The placement store: linearizable, survives everything but a restore ------------------------ */

byte key[2];            /* P1: incarnation that holds the node's key, 0 = nobody. */
byte joined = 2;        /* Incarnations so far. */
byte generation, revision;
byte placed, placed_node, placed_as;    /* The placement: epoch (0 = none), node, incarnation. */
#define COUNTS (placed != 0 && key[placed_node] == placed_as)

/* ---- What the registry has told. Answers stay true as messages: anyone may act on them later. ---- */

byte told[LAST + 1];    /* Incarnation that was told to own this epoch, 0 = nobody yet. */
byte told_last;         /* Highest epoch of those. */
bool asks_release[LAST + 1], asks_move[LAST + 1];

/* ---- The event log ------------------------------------------------------------------------------ */

byte head, fence, fence_by;             /* Last sequence; epoch and activation of the last seal. */
byte written_under[EVENTS + 1];
bool is_intent[EVENTS + 1];

mtype = { seal, event, intent, timer, ok, fenced, conflict };
typedef Call { mtype kind; byte sequence, by; }
/* The one request in flight of each epoch at each node; its answer; and whether that is waited for. */
#define LINE(epoch, node) ((epoch) * 2 + (node))
#define LINES (LAST * 2 + 2)
Call call[LINES];
mtype answer[LINES];
byte answer_head[LINES];
bool waits[LINES];

/* ---- The wire from each node to the edge, and back ----------------------------------------------- */

chan wire[2] = [1] of { byte, byte };   /* Epoch of the manager that sends it; sequence. */
byte shown, heard;      /* The last event shown; the highest epoch of a manager heard. */

/* ---- What nobody in the system knows, for the checks only ---------------------------------------- */

byte owner[LAST + 1];   /* Incarnation that the store granted this epoch to. */
byte granted_last;
bool ended[LAST + 1];   /* The owner gave this epoch back itself. */
byte sealed_last, sealed_by;
byte shown_by;          /* Epoch of the manager that sent the last event shown. */

#define DEAD(incarnation) (key[0] != incarnation && key[1] != incarnation)
#define FREE(epoch) (epoch == 0 || ended[epoch] || DEAD(owner[epoch]))

/* ---- Registry: stateless but for the transaction that it waits for ------------------------------- */

inline Tell(epoch, incarnation) {
    MUST_I8(epoch <= LAST && owner[epoch] == incarnation);
    MUST_I2(told[epoch] == 0 || told[epoch] == incarnation);
    told[epoch] = incarnation;
    told_last = (epoch > told_last -> epoch : told_last)
}

#define TO_PLACE (!busy && revision < LAST_REVISION && (!COUNTS || asks_move[placed]))

inline Propose(node) {      /* P6: any living node will do. P16: a move is a placement as well. */
    atomic {
        TO_PLACE && key[node] != 0 && !(COUNTS && placed_node == node) ->
        busy = true; target = node; target_as = key[node]; seen_placed = placed;
#ifdef NO_REREAD
        guess = generation * 2 + revision + 1;
#endif
        printf("registry: asks the store to place on node %d, incarnation %d\n", node + 1, target_as)
    }
}

inline Forget() {
    busy = false; target = 0; target_as = 0; seen_placed = 0
}

inline Unknown() {          /* P7. With the re-read nothing is answered here: "Tell what counts" is it. */
    if
    :: REREAD -> Forget()
#ifdef NO_REREAD
    :: else ->
        printf("registry: result unknown; answers epoch %d for incarnation %d unread\n", guess, target_as);
        Tell(guess, target_as); Forget()
#endif
    fi
}

proctype Registry() {
    bool busy;
    byte target, target_as, seen_placed, epoch;
#ifdef NO_REREAD
    byte guess;
#endif
end:
    do
    :: atomic {             /* P4: tell what counts, to whoever asks. */
        !busy && COUNTS && told[placed] != placed_as ->
        printf("registry: tells that epoch %d is of incarnation %d\n", placed, placed_as);
        Tell(placed, placed_as)
    }
    :: Propose(0)
    :: Propose(1)
    :: atomic {             /* P5: the transaction arrives at the store. */
        busy ->
        epoch = generation * 2 + revision + 1;
        if
        :: GUARDED_COMMIT(key[target] == target_as) && PLACEMENT_COMPARE(placed == seen_placed) &&
           LOG_HEAD(epoch > fence) && revision < LAST_REVISION ->
            printf("store: grants epoch %d to node %d, incarnation %d\n", epoch, target + 1, target_as);
            MUST(I7, epoch > granted_last);
            MUST_I2(owner[epoch] == 0);
            MUST_I8(!DEAD(target_as) && FREE(granted_last));
            REACHED(5, COUNTS && asks_move[placed]);
            revision++;
            placed = epoch; placed_node = target; placed_as = target_as;
            owner[epoch] = target_as; granted_last = epoch;
            if
            :: printf("registry: tells that epoch %d is of incarnation %d\n", epoch, target_as);
               Tell(epoch, target_as); Forget()
            :: printf("store: the answer is lost\n"); Unknown()
            fi
        :: else -> Forget()     /* Refused, and answered; the winner is told as any placement. */
        fi;
        epoch = 0
    }
    :: atomic { busy -> printf("store: the request is lost\n"); Unknown() }
    :: atomic { busy -> printf("registry: restarts\n"); Forget() }
    od
}

inline Release(e) {         /* P17: a release arrives, however late. */
    atomic {
        asks_release[e] ->
        asks_release[e] = false;
        if
        :: placed != 0 && COMPARE_DELETE(placed == e) ->
            printf("store: release of epoch %d removes the placement of epoch %d\n", e, placed);
            placed = 0; placed_node = 0; placed_as = 0
        :: else
        fi
    }
}

inline Fence(node) {        /* P12, P13: suspicion at any time, right or wrong; one write. */
    atomic {
        key[node] != 0 ->
        printf("registry: fences node %d, incarnation %d\n", node + 1, key[node]);
        key[node] = 0
    }
}

proctype Store() {
#ifdef RESTORE
    bool saved, restored;
    byte saved_revision, saved_placed, saved_node, saved_as;
#endif
end:
    do
    :: Fence(0)
    :: Fence(1)
#ifdef RELEASES
    EACH_EPOCH(Release)
#endif
#ifdef RESTORE              /* P18: once, from a backup of any age. Leased keys are not restored. */
    :: atomic {
        !saved -> saved = true;
        saved_revision = revision; saved_placed = placed; saved_node = placed_node; saved_as = placed_as;
        printf("store: backup\n")
    }
    :: atomic {
        saved && !restored -> restored = true;
        revision = saved_revision; placed = saved_placed; placed_node = saved_node; placed_as = saved_as;
        saved_revision = 0; saved_placed = 0; saved_node = 0; saved_as = 0;
        key[0] = 0; key[1] = 0;
        generation = (GENERATION -> 1 : 0);
        printf("store: restored, generation %d\n", generation)
    }
#endif
    od
}

/* ---- The event log: requests of one epoch arrive, in order, perhaps twice, perhaps not at all ----- */

#define SEALABLE (e > fence || (e == fence && ACTIVATION(fence_by == call[line].by)))
#define CURRENT (e == fence && ACTIVATION(fence_by == call[line].by))
#define EFFECTIVE (e == sealed_last && call[line].by == sealed_by)
#define STORED(n) (n != 0 && n <= head && written_under[n] == e && is_intent[n] == (call[line].kind == intent))

inline Reply(result) {
    if
    :: waits[line] -> answer[line] = result; answer_head[line] = (result == ok && call[line].kind == seal -> head : 0)
    :: else
    fi
}

inline Seal() {
    if
    :: FENCE(SEALABLE) ->
        printf("log: epoch %d sealed by incarnation %d at sequence %d\n", e, call[line].by, head);
        if
        :: e > sealed_last -> sealed_last = e; sealed_by = call[line].by
        :: else
        fi;
        MUST_I2(owner[e] == call[line].by);
        MUST_P8(ATOMIC_SEAL || call[line].sequence == head || e == fence);
        fence = e; fence_by = call[line].by;
        Reply(ok)
    :: else -> printf("log: seal of epoch %d refused\n", e); Reply(fenced)
    fi
}

inline Append() {
    if
    :: !FENCE(CURRENT) -> printf("log: append of epoch %d refused, fenced\n", e); Reply(fenced);
       REACHED(2, fence == 2 && sealed_by != call[line].by)
    :: FENCE(CURRENT) && EXPECTED(call[line].sequence == head + 1) ->
        if
        :: head < EVENTS ->
            printf("log: stores number %d of epoch %d as %d\n", call[line].sequence, e, head + 1);
            MUST_S(EFFECTIVE);
            MUST(I1, e >= written_under[head]);
            MUST(I3, call[line].sequence == head + 1);
            head++;
            written_under[head] = e; is_intent[head] = (call[line].kind == intent);
            Reply(ok);
            REACHED(1, written_under[1] == 1 && written_under[2] == 2 && written_under[3] == 3)
        :: else
        fi
    :: FENCE(CURRENT) && !EXPECTED(call[line].sequence == head + 1) ->
        if
        :: STORED(call[line].sequence) -> Reply(ok)     /* The identical append again: answered as before. */
        :: else -> printf("log: append of epoch %d refused, conflict\n", e); Reply(conflict)
        fi
    fi
}

inline Timer() {
    if
    :: MUTATION_EPOCH(CURRENT) ->
        printf("log: timer of epoch %d changes data\n", e);
        MUST(I10, EFFECTIVE);
        Reply(ok)
    :: else -> Reply(fenced)
    fi
}

inline Clear() { call[line].kind = 0; call[line].sequence = 0; call[line].by = 0 }

proctype Log(byte e; byte line) {
end:
    do
    :: atomic {
        call[line].kind != 0 ->
        if
        :: call[line].kind == seal -> Seal()
        :: call[line].kind == event || call[line].kind == intent -> Append()
        :: call[line].kind == timer -> Timer()
        fi;
        if
        :: Clear()
#ifdef LATE
        :: skip             /* A copy stays under way and arrives again. */
#endif
#ifdef LOSS
        :: printf("log: the answer to epoch %d is lost\n", e);
           answer[line] = 0; answer_head[line] = 0; Clear()
#endif
        fi
    }
#ifdef LOSS
    :: atomic { call[line].kind != 0 -> Clear() }
#endif
    od
}

/* ---- Node: a host with at most one manager of the user ------------------------------------------- */

#define ALL 255
#define ASKED (asked != 0)
#define MAY_SHOW APPEND_FIRST(next_out <= have) && \
    (next_out <= have || ((asked == event || asked == intent) && next_out == have + 1))
#define MAY_START (INTENT_FIRST(tool != 0) && (tool != 0 || asked == intent))

inline Ask(what, number) {
    asked = what; waits[line] = true;
    call[line].kind = what; call[line].sequence = number; call[line].by = self;
    answer[line] = 0; answer_head[line] = 0
}

inline Done() { asked = 0; waits[line] = false; answer[line] = 0; answer_head[line] = 0 }

inline Drop() {
    Done();
    mine = 0; line = n; have = 0; tool = 0; next_out = 0
}

inline Exit() { Drop(); self = 0; knows = 0 }

inline Learn(epoch) {       /* Knowledge is sticky; with the guard it ends the manager in the same step. */
    knows = (epoch > knows -> epoch : knows);
    if
    :: SELF_FENCE -> Drop()
    :: else -> Done()
    fi
}

inline Activate(e) {        /* P8: only from a placement, and never again under an epoch that it dropped. */
    atomic {
        self != 0 && told[e] == self && e > mine && e > knows ->
        knows = (mine > knows -> mine : knows);     /* P11: a higher epoch at attach. */
        Drop();
        mine = e; line = LINE(e, n); have = (ATOMIC_SEAL -> 0 : head);
        printf("node %d, incarnation %d: manager for epoch %d\n", n + 1, self, e);
        Ask(seal, have)
    }
}

proctype Node(byte n) {
    byte self = n + 1;      /* Incarnation, 0 = not running. */
    byte knows;             /* Every epoch up to this one is known to be fenced. */
    byte mine;              /* Epoch of the manager, 0 = none. */
    byte line = n;          /* Its line to the log. */
    mtype asked;            /* The request that it waits for: at most one (I3). */
    byte have;              /* It has seen the log up to here, and numbers from here. */
    byte tool;              /* Accepted intent whose tool is still to start. */
    byte next_out;          /* Next sequence for the edge, 0 = no attach. */
end:
    do
    EACH_EPOCH(Activate)

    :: atomic {             /* The answer to the seal or to an append. */
        ASKED && answer[line] == ok ->
        if
        :: asked == seal -> have = (ATOMIC_SEAL -> answer_head[line] : have)
        :: asked == intent -> have++; tool = have
        :: asked == event -> have++
        :: asked == timer
        fi;
        Done()
    }
    :: atomic {             /* Refused: this user only: stop, drop (P11). */
        ASKED && (answer[line] == fenced || answer[line] == conflict) ->
        printf("node %d: learns that epoch %d is over\n", n + 1, mine);
        Learn(mine)
    }
#ifdef LOSS
    :: atomic {             /* Unknown: the identical request again. */
        ASKED && call[line].kind == 0 && answer[line] == 0 ->
        call[line].kind = asked; call[line].by = self;
        call[line].sequence = ((asked == event || asked == intent) -> have + 1 : have)
    }
#endif
    :: atomic {
        mine != 0 && !ASKED && have < EVENTS ->
        printf("node %d: appends event %d under epoch %d\n", n + 1, have + 1, mine);
        MUST_I9(mine > knows);
        Ask(event, have + 1)
    }
#ifdef TOOLS
    :: atomic {
        mine != 0 && !ASKED && have < EVENTS && tool == 0 ->
        printf("node %d: appends intent %d under epoch %d\n", n + 1, have + 1, mine);
        MUST_I9(mine > knows);
        Ask(intent, have + 1)
    }
    :: atomic {             /* P10. */
        mine != 0 && MAY_START ->
        printf("node %d: starts a tool under epoch %d\n", n + 1, mine);
        MUST_I9(mine > knows);
        MUST(I6, tool != 0 && tool <= head && is_intent[tool] && written_under[tool] == mine);
        REACHED(3, mine == 3);
        tool = 0
    }
#endif
#ifdef TIMERS
    :: atomic {             /* I10. */
        mine != 0 && !ASKED ->
        printf("node %d: timer under epoch %d\n", n + 1, mine);
        MUST_I9(mine > knows);
        Ask(timer, have)
    }
#endif
    :: atomic {             /* The edge attaches at its position, and never below what it heard. */
        mine != 0 && asked != seal && mine >= heard && next_out != shown + 1 -> next_out = shown + 1
    }
    :: atomic {             /* P9: to the edge, what is stored. */
        mine != 0 && next_out != 0 && MAY_SHOW && nfull(wire[n]) ->
        printf("node %d: sends event %d to the edge under epoch %d\n", n + 1, next_out, mine);
        MUST_I9(mine > knows);
        wire[n] ! mine, next_out;
        next_out++
    }

    :: atomic {             /* P11: told of a higher epoch, at any time or never. */
        mine != 0 && told_last > mine && knows < mine ->
        printf("node %d: hears of epoch %d\n", n + 1, told_last);
        Learn(mine)
    }
    :: atomic {             /* P11: the answer that its key is gone. A new process is a new incarnation. */
        self != 0 && key[n] != self && knows != ALL ->
        printf("node %d: learns that its key is gone\n", n + 1);
        if
        :: SELF_FENCE -> Exit()
        :: else -> knows = ALL
        fi
    }
    :: atomic { self != 0 -> printf("node %d: crashes\n", n + 1); Exit() }
    :: atomic {             /* P1, with P12 for a key of the process before it. */
        self == 0 && joined < INCARNATIONS ->
        joined++; self = joined; key[n] = self;
        printf("node %d: joins as incarnation %d\n", n + 1, self)
    }
#ifdef RELEASES
    :: atomic {             /* P17. */
        mine != 0 && !ASKED && tool == 0 && mine > knows ->
        printf("node %d: passivates, epoch %d\n", n + 1, mine);
        asks_release[mine] = true; ended[mine] = true; knows = mine; Drop()
    }
#endif
#ifdef MOVES
    :: atomic {             /* P16: at a step boundary; the take-over compares this epoch. */
        mine != 0 && !ASKED && tool == 0 && mine > knows ->
        printf("node %d: hands off, epoch %d\n", n + 1, mine);
        asks_move[mine] = true; ended[mine] = true; knows = mine; Drop()
    }
#endif
    od
}

/* ---- Edge and client: show what they are told, if it is the next one ------------------------------ */

inline Hear(node) {
    atomic {
        wire[node] ? epoch, sequence ->
        if
        :: EDGE_EPOCH(epoch >= heard) && sequence == shown + 1 ->
            printf("edge: shows event %d, from epoch %d\n", sequence, epoch);
            MUST(I4, sequence <= head);
            MUST_I5(epoch >= shown_by);
            heard = (epoch > heard -> epoch : heard);
            shown = sequence; shown_by = epoch;
            REACHED(4, shown == 3 && heard == 3 && written_under[1] == 1)
        :: EDGE_EPOCH(epoch >= heard) && sequence != shown + 1 ->
            printf("edge: ignores event %d, from epoch %d: not the next one\n", sequence, epoch);
            heard = (epoch > heard -> epoch : heard)    /* A repeat, or a gap: it attaches again. */
        :: !EDGE_EPOCH(epoch >= heard) -> printf("edge: drops a message of epoch %d\n", epoch)
        fi;
        epoch = 0; sequence = 0
    }
}

proctype Edge() {
    byte epoch, sequence;
end:
    do
    :: Hear(0)
    :: Hear(1)
    :: atomic { nempty(wire[0]) -> wire[0] ? _, _; printf("edge: a message is lost\n") }   /* A stream breaks. */
    :: atomic { nempty(wire[1]) -> wire[1] ? _, _; printf("edge: a message is lost\n") }
    od
}

init {
    byte i;
    atomic {
        key[0] = 1; key[1] = 2;
        i = 1;
        do
        :: i <= LAST -> run Log(i, LINE(i, 0)); run Log(i, LINE(i, 1)); i++
        :: else -> break
        od;
        i = 1;
        do
        :: i <= REPLICAS -> run Registry(); i++
        :: else -> break
        od;
        i = 0;
        run Store(); run Node(0); run Node(1); run Edge()
    }
}
