"""From a sales plan to SQL. Names come from the plan's fixed vocabulary, values are parameters."""

from agent_service.agents.planner import SalesPlan

Statement = tuple[str, list[str]]


def statement(plan: SalesPlan, *, whole: bool = False) -> Statement:
    """The SELECT of a plan and its parameters.

    `whole` leaves out the restriction of the plan's own dimension and sums everything up: what a
    share is a share of.
    """
    parameters: list[str] = []
    conditions: list[str] = []
    for dimension, values in plan.only:
        if whole and dimension == plan.dimension:
            continue
        conditions.append(f"{dimension} IN ({', '.join('?' * len(values))})")
        parameters.extend(values)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    name, metric = plan.dimension, plan.metric
    if whole or plan.kind == "total":
        return f"SELECT SUM(revenue) AS revenue, SUM(units) AS units FROM sales{where}", parameters
    if plan.kind == "list":
        return f"SELECT DISTINCT {name} AS label FROM sales ORDER BY label", []
    grouped = f"SELECT {name} AS label, SUM({metric}) AS value FROM sales{where} GROUP BY {name}"
    if plan.kind == "average":
        return f"SELECT AVG(value) AS mean, COUNT(*) AS groups FROM ({grouped})", parameters
    if plan.kind == "growth" or (plan.kind == "breakdown" and name == "month"):
        return f"{grouped} ORDER BY label", parameters
    order = "DESC" if plan.descending else "ASC"
    # One more than was asked for, to say what the winner is ahead of.
    limit = max(plan.limit, 2) if plan.kind == "ranking" else 50
    return f"{grouped} ORDER BY value {order}, label LIMIT {limit}", parameters
