"""The demo agent's answers, compared with this file's own SQL over the same rows."""

import ast
import datetime
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import agent_service.agents
from agent_service.agents.demo import demo
from agent_service.agents.sales import query_sales

pytestmark = pytest.mark.asyncio

Serve = Callable[..., Any]


@pytest.fixture(scope="module")
def sql() -> Callable[[str], list[tuple[Any, ...]]]:
    script = Path(agent_service.agents.__file__ or "").with_name("sales.sql").read_text()
    connection = sqlite3.connect(":memory:")
    connection.executescript(script)
    return lambda statement: connection.execute(statement).fetchall()


def _money(value: float) -> str:
    return f"${value:,.2f}".removesuffix(".00")


async def test_which_region_sold_the_most(serve: Serve, sql: Any) -> None:
    async with serve(demo) as host:
        run = await host.run("Which region sold the most?")
    first, second = sql(
        "SELECT region, SUM(revenue) FROM sales GROUP BY region ORDER BY 2 DESC LIMIT 2"
    )
    response = run.end["response"]
    assert response == (
        f"In 2025, {first[0]} was the region that sold the most: {_money(first[1])}, "
        f"ahead of {second[0]} with {_money(second[1])}."
    )
    # It thinks, uses a tool, and streams the answer in pieces.
    assert run.types[:4] == ["agent_thinking"] * 2 + ["tool_executing", "tool_completed"]
    assert run.types[4] == "agent_thinking" and set(run.types[5:]) == {"agent_text"}
    assert len(run.data("agent_text")) > 3
    assert "".join(data["delta"] for data in run.data("agent_text")) == response
    call = run.data("tool_executing")[0]
    assert call["tool_name"] == "query_sales" and "SELECT" in call["arguments"]["sql"]
    assert run.data("tool_completed")[0]["result"][0]["label"] == first[0]


@pytest.mark.parametrize(
    ("question", "statement", "template"),
    [
        (
            "Which product sold the fewest units?",
            "SELECT product, SUM(units) FROM sales GROUP BY product ORDER BY 2 LIMIT 1",
            "{0} was the product that sold the least: {1:,} units",
        ),
        (
            "What was the best month for tents in the South?",
            "SELECT CASE month WHEN '2025-07' THEN 'July' ELSE month END, SUM(revenue) FROM sales "
            "WHERE product = 'Tent' AND region = 'South' GROUP BY month ORDER BY 2 DESC LIMIT 1",
            "{0} was the month that sold the most: ${1:,}",
        ),
        (
            "total revenue in March",
            "SELECT SUM(units), SUM(revenue) FROM sales WHERE month = '2025-03'",
            "In March 2025, the shop sold {0:,} units for ${1:,}.",
        ),
        (
            "How much did South sell in the first half?",
            "SELECT SUM(units), SUM(revenue) FROM sales WHERE region = 'South' "
            "AND month <= '2025-06'",
            "From January to June 2025, for South, the shop sold {0:,} units for ${1:,}.",
        ),
        (
            "How many kettles were sold in May?",
            "SELECT SUM(units), SUM(revenue) FROM sales WHERE product = 'Kettle' "
            "AND month = '2025-05'",
            "the shop sold {0:,} units for ${1:,}",
        ),
        (
            "Average revenue per month",
            "SELECT AVG(r) FROM (SELECT SUM(revenue) r FROM sales GROUP BY month)",
            "the average per month was ${0:,.2f}",
        ),
        (
            "What is the average number of units per product in July?",
            "SELECT ROUND(AVG(u), 1) FROM (SELECT SUM(units) u FROM sales WHERE month = '2025-07' "
            "GROUP BY product)",
            "In July 2025, the average per product was {0} units",
        ),
        (
            "Did West or East sell more in August?",
            "SELECT (SELECT SUM(revenue) FROM sales WHERE region='West' AND month='2025-08') - "
            "(SELECT SUM(revenue) FROM sales WHERE region='East' AND month='2025-08')",
            "West is ahead by ${0:,}.",
        ),
        (
            "Compare North and South in Q1",
            "SELECT SUM(revenue) FROM sales WHERE region='South' AND month <= '2025-03'",
            "South sold ${0:,} and North sold",
        ),
        (
            "What percentage of tent sales came from the West?",
            "SELECT ROUND(100.0 * SUM(CASE region WHEN 'West' THEN revenue END) / SUM(revenue), 1) "
            "FROM sales WHERE product = 'Tent'",
            "for Tent, West had {0}% of all revenue",
        ),
        (
            "How did revenue change from January to December?",
            "SELECT ROUND(100.0 * (SELECT SUM(revenue) FROM sales WHERE month = '2025-12') / "
            "(SELECT SUM(revenue) FROM sales WHERE month = '2025-01') - 100, 1)",
            "revenue rose by {0}% from January",
        ),
        (
            "units by region",
            "SELECT SUM(units) FROM sales WHERE region = 'East'",
            "- East: {0:,} units",
        ),
        ("How many regions are there?", "SELECT COUNT(DISTINCT region) FROM sales", "{0} regions"),
    ],
)
async def test_answers_are_those_of_the_data(
    serve: Serve, sql: Any, question: str, statement: str, template: str
) -> None:
    async with serve(demo) as host:
        run = await host.run(question)
    assert run.end["outcome"] == "success", run.end
    assert template.format(*sql(statement)[0]) in run.end["response"]


async def test_a_ranking_has_the_order_of_the_data(serve: Serve, sql: Any) -> None:
    async with serve(demo) as host:
        response = (await host.run("Top 3 products in June")).end["response"]
    rows = sql(
        "SELECT product, SUM(revenue) FROM sales WHERE month = '2025-06' "
        "GROUP BY product ORDER BY 2 DESC LIMIT 3"
    )
    lines = [f"{n}. {name}: {_money(value)}" for n, (name, value) in enumerate(rows, 1)]
    assert response.splitlines()[1:] == lines


@pytest.mark.parametrize(
    ("question", "value"),
    [
        ("What is 17 * (3 + 4)?", 119),
        ("what's 15% of 240", 36),
        ("12 divided by 5", 2.4),
        ("square root of 144", 12),
        ("How much is 1,200 plus 34?", 1234),
        ("2 to the power of 10", 1024),
    ],
)
async def test_arithmetic_goes_to_the_calculator(serve: Serve, question: str, value: float) -> None:
    async with serve(demo) as host:
        run = await host.run(question)
    assert [data["tool_name"] for data in run.data("tool_executing")] == ["calculator"]
    assert ast.literal_eval(run.end["response"].split(" = ")[1]) == value


async def test_what_has_no_value_is_a_failed_call_and_an_honest_answer(serve: Serve) -> None:
    async with serve(demo) as host:
        run = await host.run("1/0")
    assert run.data("tool_completed")[0]["success"] is False
    assert run.end["outcome"] == "success" and "division by zero" in run.end["response"]


async def test_time_goes_to_the_clock(serve: Serve) -> None:
    async with serve(demo) as host:
        before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        run = await host.run("What time is it?")
        after = datetime.datetime.now(datetime.UTC)
        weekday = (await host.run("What weekday was 2025-05-01?")).end["response"]
        between = (await host.run("How many days between 2024-02-01 and 2024-03-01?")).end
        until = (await host.run("How many days until 2040-01-01?")).end["response"]
        later = (await host.run("What date is it 3 weeks after 2025-12-24?")).end["response"]
    assert [data["tool_name"] for data in run.data("tool_executing")] == ["clock"]
    match = re.search(r"(\d\d:\d\d:\d\d) UTC on \w+, (\d{4}-\d\d-\d\d)", run.end["response"])
    assert match is not None
    told = datetime.datetime.fromisoformat(f"{match[2]}T{match[1]}+00:00")
    assert before <= told <= after
    assert weekday == "2025-05-01 is a Thursday."
    assert "29 days" in between["response"]
    days = (datetime.date(2040, 1, 1) - before.date()).days
    assert f"{days:,} days" in until
    assert "Wednesday, 2026-01-14" in later


@pytest.mark.parametrize(
    ("question", "why"),
    [
        ("Write me a poem about the sales team", "'poem'"),
        ("What's the weather in Paris?", "'weather'"),
        ("Which salesperson sold the most?", "'salesperson'"),
        ("Delete all sales", "'delete'"),
        ("Which region was second best?", "'second'"),
        ("Which regions sold more than 20 units?", "'20'"),
        ("What were sales in 2019?", "2025 only"),
        ("revenue this year", "2025 only"),
        ("Compare Q1 and Q2", "not quarters"),
        ("How many days until 2026-02-31?", "does not exist"),
        ("Which region did not sell tents?", "'not'"),
        ("", "no question"),
        ("x" * 10_000, "longer"),
    ],
)
async def test_what_it_can_not_do_it_says_and_lists_what_it_can(
    serve: Serve, question: str, why: str
) -> None:
    async with serve(demo) as host:
        run = await host.run(question)
    assert run.end["outcome"] == "success"
    assert run.data("tool_executing") == []
    response = run.end["response"]
    assert why in response
    assert "scripted" in response and "Which region sold the most?" in response


async def test_the_sales_database_can_only_be_read() -> None:
    for statement in (
        "DELETE FROM sales",
        "INSERT INTO sales VALUES ('2025-01', 'x', 'x', 1, 1)",
        "ATTACH 'other.db' AS other",
        "PRAGMA writable_schema = 1",
        "CREATE TABLE t (x)",
        "SELECT load_extension('x')",
    ):
        with pytest.raises(sqlite3.Error):
            query_sales(statement)
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT SUM(x) FROM c"
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        query_sales(endless)
    assert query_sales("SELECT COUNT(*) AS n FROM sales") == [{"n": 240}]
