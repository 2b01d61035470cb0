"""The demo agent's plans and statements: their numbers are those of the data, asked otherwise."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from typing import Any

import pytest

from agent_service.agents.planner import Refusal, SalesPlan, make_plan
from agent_service.agents.sales import query_sales
from agent_service.agents.statements import statement


@pytest.fixture(scope="module")
def sales() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:")) as connection:
        script = resources.files("agent_service.agents").joinpath("sales.sql")
        connection.executescript(script.read_text("utf-8"))
        yield connection


def asked(question: str, *, whole: bool = False) -> list[dict[str, Any]]:
    """The rows that the demo agent reads for a question."""
    plan = make_plan(question)
    assert isinstance(plan, SalesPlan), plan
    return query_sales(*statement(plan, whole=whole))


def value(sales: sqlite3.Connection, what: str, where: str = "1") -> Any:
    return sales.execute(f"SELECT {what} FROM sales WHERE {where}").fetchone()[0]


@pytest.mark.parametrize(
    ("question", "part", "whole"),
    [
        ("What share of revenue came from South?", "region = 'South'", "1"),
        (
            "What percentage of tents were sold in the South?",
            "product = 'Tent' AND region = 'South'",
            "product = 'Tent'",
        ),
        (
            "What share of South came from tents?",
            "product = 'Tent' AND region = 'South'",
            "region = 'South'",
        ),
        (
            "What share of revenue came from tents in the South?",
            "product = 'Tent' AND region = 'South'",
            "region = 'South'",
        ),
        (
            "What share of sales in June came from West?",
            "month = '2025-06' AND region = 'West'",
            "month = '2025-06'",
        ),
    ],
)
def test_a_share_is_of_what_the_question_names_as_the_whole(
    sales: sqlite3.Connection, question: str, part: str, whole: str
) -> None:
    (row,) = asked(question)
    assert row["value"] == value(sales, "SUM(revenue)", part)
    (everything,) = asked(question, whole=True)
    assert everything["revenue"] == value(sales, "SUM(revenue)", whole)


@pytest.mark.parametrize(
    ("question", "where"),
    [
        ("How many tents were sold in the North in Q2?", "region = 'North' AND product = 'Tent' "
         "AND month BETWEEN '2025-04' AND '2025-06'"),
        ("How many kettles did East sell in May?", "region = 'East' AND product = 'Kettle' "
         "AND month = '2025-05'"),
        ("total revenue", "1"),
    ],
)  # fmt: skip
def test_a_total_is_restricted_to_all_that_the_question_names(
    sales: sqlite3.Connection, question: str, where: str
) -> None:
    (row,) = asked(question)
    assert row["units"] == value(sales, "SUM(units)", where)
    assert row["revenue"] == value(sales, "SUM(revenue)", where)


@pytest.mark.parametrize(
    "question",
    [
        "Which customer sold the most?",
        "Which region sold the most in 2024?",
        "What is the weather?",
        "'; DROP TABLE sales; --",
        "Revenue of backpacks in Q1 vs Q2",
    ],
)
def test_a_question_beyond_the_data_is_refused_and_not_half_answered(question: str) -> None:
    assert isinstance(make_plan(question), Refusal)
