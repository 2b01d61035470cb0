"""The bundled demo agent: a scripted planner over real tools. No model, no network.

It reads a question by words and patterns (`planner`), asks the bundled sales database by
SQL, computes by a calculator and looks at the clock, and says what it can't do. What it
answers is computed from what the tools return, never written down beforehand.
"""

import re
from collections.abc import AsyncIterator
from typing import Any

from agent_service.agents import clock
from agent_service.agents.answers import (
    Rows,
    amount,
    describe_filter,
    join,
    label,
    money,
    number,
    say_value,
)
from agent_service.agents.calculator import CalculationError, calculate
from agent_service.agents.planner import (
    CalculationPlan,
    ClockPlan,
    Refusal,
    SalesPlan,
    make_plan,
)
from agent_service.agents.sales import query_sales
from agent_service.agents.statements import statement
from steward.agent import Run, agent

ABILITIES = (
    "I am a scripted demo agent, not a language model. I can do three things:\n"
    "- answer questions about the 2025 sales of a small outdoor shop (regions North, South, East "
    "and West; tents, backpacks, stoves, lanterns and kettles), such as "
    '"Which region sold the most?", "Top 3 products in June", "Compare tents and stoves", '
    '"What share of revenue came from South?", "Average revenue per month";\n'
    '- calculate, such as "What is 17 * (3 + 4)?" or "15% of 240";\n'
    '- tell time and dates in UTC, such as "What time is it?", "How many days until 2027-01-01?".'
)


@agent("demo")
async def demo(run: Run) -> None:
    """Plan, use the tools of the plan, stream the answer."""
    await run.think("Reading the question", step=1, total_steps=3)
    plan = make_plan(run.input.text)
    match plan:
        case SalesPlan():
            await run.think(f"This is about sales: {_intent(plan)}", step=2, total_steps=3)
            answer = await _sales(run, plan)
        case CalculationPlan():
            await run.think("This is arithmetic: the calculator does it", step=2, total_steps=3)
            answer = await _calculation(run, plan)
        case ClockPlan():
            await run.think("This is about time: the clock knows", step=2, total_steps=3)
            answer = await _clock(run, plan)
        case Refusal():
            await run.think("None of my tools fits", step=2, total_steps=3)
            can_not = "" if plan.greeting else " I can't answer that."
            answer = f"{plan.reason}{can_not} {ABILITIES}"
    await run.think("Writing the answer", step=3, total_steps=3)
    await run.say(_pieces(answer))


async def _pieces(answer: str) -> AsyncIterator[str]:
    """The answer a few words at a time, as a model would stream it."""
    for piece in re.findall(r"(?:\S+\s*){1,3}", answer):
        yield piece


async def _query(run: Run, plan: SalesPlan, purpose: str, **options: Any) -> Rows:
    sql, parameters = statement(plan, **options)
    rows: Rows = await run.tool(
        "query_sales", {"sql": sql, "parameters": parameters}, query_sales, purpose=purpose
    )
    return rows


async def _compute(run: Run, expression: str, purpose: str) -> Any:
    return await run.tool("calculator", {"expression": expression}, calculate, purpose=purpose)


async def _sales(run: Run, plan: SalesPlan) -> str:
    rows = await _query(run, plan, _intent(plan))
    where = describe_filter(plan)
    match plan.kind:
        case "list":
            names = join([label(plan, row) for row in rows])
            return f"The database knows {len(rows)} {plan.dimension}s: {names}."
        case "total":
            row = rows[0]
            return (
                f"{where} the shop sold {number(row['units'])} units for {money(row['revenue'])}."
            )
        case "average":
            mean = say_value(plan.metric, rows[0]["mean"])
            groups = f"over {rows[0]['groups']} {plan.dimension}s"
            return f"{where} the average per {plan.dimension} was {mean} ({groups})."
        case "ranking":
            return _ranking(plan, rows, where)
        case "breakdown":
            lines = "\n".join(f"- {label(plan, row)}: {amount(plan, row)}" for row in rows)
            return f"{where} {plan.metric} by {plan.dimension}:\n{lines}"
        case "compare":
            return await _comparison(run, plan, rows, where)
        case "share":
            return await _share(run, plan, rows, where)
        case "growth":
            return await _growth(run, plan, rows, where)


def _ranking(plan: SalesPlan, rows: Rows, where: str) -> str:
    asked = rows[: plan.limit]
    if plan.limit > 1:
        lines = "\n".join(
            f"{place}. {label(plan, row)}: {amount(plan, row)}"
            for place, row in enumerate(asked, 1)
        )
        which = "top" if plan.descending else "bottom"
        return f"{where} the {which} {len(asked)} {plan.dimension}s by {plan.metric}:\n{lines}"
    first = rows[0]
    most = "most" if plan.descending else "least"
    subject = label(plan, first)
    happened = f"{subject} was the {plan.dimension} that sold the {most}"
    text = f"{where} {happened}: {amount(plan, first)}"
    if len(rows) > 1:
        second = rows[1]
        text += (
            f", {'ahead of' if plan.descending else 'behind'} "
            f"{label(plan, second)} with {amount(plan, second)}"
        )
    return f"{text}."


async def _comparison(run: Run, plan: SalesPlan, rows: Rows, where: str) -> str:
    parts = [f"{label(plan, row)} sold {amount(plan, row)}" for row in rows]
    text = f"{where} {join(parts)}."
    if len(rows) == 2:
        more, less = rows
        gap = await _compute(run, f"{more['value']} - {less['value']}", "the difference")
        text += f" {label(plan, more)} is ahead by {say_value(plan.metric, gap)}."
    return text


async def _share(run: Run, plan: SalesPlan, rows: Rows, where: str) -> str:
    everything = await _query(run, plan, f"all {plan.metric}, to compare with", whole=True)
    total = everything[0][plan.metric]
    shares = []
    for row in rows:
        share = await _compute(run, f"round(100 * {row['value']} / {total}, 1)", "the percentage")
        shares.append(f"{label(plan, row)} had {share}%")
    return f"{where} {join(shares)} of all {plan.metric} ({say_value(plan.metric, total)})."


async def _growth(run: Run, plan: SalesPlan, rows: Rows, where: str) -> str:
    first, last = rows[0], rows[-1]
    change = await _compute(
        run,
        f"round(100 * ({last['value']} - {first['value']}) / {first['value']}, 1)",
        "the change in percent",
    )
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed the same"
    by = f" by {abs(change)}%" if change else ""
    return (
        f"{where} {plan.metric} {verb}{by} from {label(plan, first)} "
        f"({amount(plan, first)}) to {label(plan, last)} "
        f"({amount(plan, last)})."
    )


async def _calculation(run: Run, plan: CalculationPlan) -> str:
    try:
        value = await _compute(run, plan.expression, "the result")
    except CalculationError as error:
        return f"I can't compute {plan.expression}: {error}."
    return f"{plan.expression} = {value}"


async def _clock(run: Run, plan: ClockPlan) -> str:
    today = ""
    if plan.kind in ("time", "date") or not plan.start:
        moment = await run.tool("clock", {}, clock.now, purpose="date and time now")
        if plan.kind == "time":
            return f"It is {moment['time']} UTC on {moment['weekday']}, {moment['date']}."
        if plan.kind == "date":
            return f"Today is {moment['weekday']}, {moment['date']} (UTC)."
        today = moment["date"]
    elif plan.kind == "between" and not plan.end:
        moment = await run.tool("clock", {}, clock.now, purpose="the date today")
        today = moment["date"]
    start = plan.start or today
    if plan.kind == "between":
        end = plan.end or today
        days = await run.tool(
            "days_between", {"start": start, "end": end}, clock.days_between, purpose="the days"
        )
        return f"From {start} to {end} it is {number(days)} days."
    try:
        moved = await run.tool(
            "shift_date", {"start": start, "days": plan.days}, clock.shift, purpose="the date"
        )
    except OverflowError:
        return "That date is outside of the years 1 to 9999."
    if plan.kind == "weekday":
        return f"{moved['date']} is a {moved['weekday']}."
    direction = "after" if plan.days >= 0 else "before"
    return (
        f"{number(abs(plan.days))} days {direction} {start} is {moved['weekday']}, {moved['date']}."
    )


def _intent(plan: SalesPlan) -> str:
    if plan.kind == "list":
        return f"list the {plan.dimension}s"
    if plan.kind == "total":
        return f"total {plan.metric}"
    return f"{plan.kind} of {plan.metric} by {plan.dimension}"
