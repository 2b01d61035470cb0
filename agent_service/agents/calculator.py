"""A calculator for expressions of people: exact where it can be, bounded always.

The expression is parsed by Python's own parser and only the listed nodes are computed;
nothing is ever evaluated as code. Length, nesting, and the size of every result are
bounded, so that `9**9**9` is an error within microseconds.
"""

import ast
import math
import operator
from collections.abc import Callable

Number = int | float

MAX_CHARS = 300
MAX_NODES = 200
MAX_BITS = 4096
"""Whole numbers beyond this many bits are refused."""

MAX_DIGITS = 15
EXACT = 2**53
"""Whole numbers from here on are given as text: JavaScript could not hold them."""

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "max": max,
    "min": min,
    "round": lambda value, digits=0: round(value, _digits(digits)),
    "sqrt": math.sqrt,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


class CalculationError(ValueError):
    """The expression can't be computed; the text says why."""


def calculate(expression: str) -> Number | str:
    """The value of an arithmetic expression. Raises CalculationError.

    `+ - * / // % **`, brackets, `abs max min round sqrt`, `pi` and `e`. Whole numbers are exact
    (those from 2**53 on are returned as text); a quotient that is whole is a whole number.
    """
    if len(expression) > MAX_CHARS:
        raise CalculationError(f"the expression is longer than {MAX_CHARS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CalculationError("that is not an arithmetic expression") from None
    if sum(1 for _ in ast.walk(tree)) > MAX_NODES:
        raise CalculationError("the expression has too many parts")
    try:
        value = _value(tree.body)
    except ZeroDivisionError:
        raise CalculationError("division by zero") from None
    except (OverflowError, TypeError, ValueError) as error:
        if isinstance(error, CalculationError):
            raise
        raise CalculationError("that has no value as a number") from None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < EXACT else value
    return value if abs(value) < EXACT else str(value)


def _value(node: ast.expr) -> Number:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _bounded(_power(_value(node.left), _value(node.right)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return _bounded(function(*[_value(argument) for argument in node.args]))
    raise CalculationError(
        f"only numbers, + - * / // % **, brackets, and {', '.join(_FUNCTIONS)} are allowed"
    )


def _digits(digits: Number) -> int:
    if not isinstance(digits, int) or not 0 <= digits <= MAX_DIGITS:
        raise CalculationError(f"round takes 0 to {MAX_DIGITS} digits")
    return digits


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        # Its size is known before it is computed.
        if exponent * base.bit_length() > MAX_BITS:
            raise CalculationError("the result is too large")
    result = base**exponent
    if isinstance(result, complex):
        raise CalculationError("the result is not a real number")
    return result


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise CalculationError("the result is too large")
    elif not math.isfinite(value):
        raise CalculationError("the result is too large")
    return value
