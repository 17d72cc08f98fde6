"""Numbers from names: what goals, constraints and schedulers compute.

An expression has numbers, dotted names, + - * /, abs, min, max and log10, and one comparison where a condition is
asked for: `abs(forget_truth_ratio - retain_only.forget_truth_ratio)`, `model_utility >= 0.95 * original.model_utility`.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from components.errors import ConfigError

Known = Mapping[str, Any]
"""What the names stand for."""

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max, "log10": math.log10}
_DEPTH = 64  # parts within parts
_OF_SEVERAL = ("min", "max")
_AT_MOST, _AT_LEAST = (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)


def names(expression: str, condition: bool = False) -> list[str]:
    """The dotted names in an expression, or in a condition, in their order.

    Raises:
        ConfigError: when it is none.
    """
    sides = _sides(expression) if condition else [_parsed(expression)]
    return list(dict.fromkeys(name for side in sides for name in _compiled(side, expression)[0]))


def value(expression: str, known: Known) -> float:
    """Of an expression, with what `known` has for its names.

    Raises:
        KeyError: for a name that is not known.
        ArithmeticError, ValueError: a division by 0, a logarithm of 0, a name that stands for no number.
    """
    return float(_compiled(_parsed(expression), expression)[1](known))


def excess(condition: str, known: Known) -> float:
    """By how much a condition is missed: at most 0 where it holds."""
    left, right = (_compiled(side, condition)[1](known) for side in _sides(condition))
    return float(left - right if isinstance(_comparison(condition).ops[0], _AT_MOST) else right - left)


def holds(condition: str, known: Mapping[str, Any]) -> bool:
    """Whether a condition does, < and > not being <= and >=."""
    missed = excess(condition, known)
    return missed < 0 if isinstance(_comparison(condition).ops[0], ast.Lt | ast.Gt) else missed <= 0


def _comparison(condition: str) -> ast.Compare:
    node = _parsed(condition)
    if not isinstance(node, ast.Compare) or len(node.ops) != 1 or not isinstance(node.ops[0], _AT_MOST + _AT_LEAST):
        raise ConfigError(
            f"Condition is not understood ({condition:.200}). Expected one comparison with <, <=, > or >=."
        )
    return node


def _sides(condition: str) -> tuple[ast.expr, ast.expr]:
    node = _comparison(condition)
    return node.left, node.comparators[0]


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply for Python
        raise _not_understood(expression) from None


def _compiled(node: ast.expr, whole: str, depth: int = 0) -> tuple[list[str], Callable[[Known], Any]]:
    """(the names in it, what computes it)."""
    if depth > _DEPTH:
        raise _not_understood(whole)

    def inner(child: ast.expr) -> tuple[list[str], Callable[[Known], Any]]:
        return _compiled(child, whole, depth + 1)

    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and _finite(number):
            return [], lambda known: float(number)  # no whole number, which could grow without end
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            used, of = inner(operand)
            return used, lambda known: -of(known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            parts, combine = [inner(side) for side in (left, right)], _OPERATORS[type(op)]
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as given, keywords=[]) if name in _FUNCTIONS and (
            len(given) > 1
        ) == (name in _OF_SEVERAL):
            parts, combine = [inner(argument) for argument in given], _FUNCTIONS[name]
        case ast.Name() | ast.Attribute() if dotted := _dotted(node):
            return [dotted], lambda known: _number(dotted, known)
        case _:
            raise _not_understood(whole)
    return [name for used, _ in parts for name in used], lambda known: combine(*(of(known) for _, of in parts))


def _finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _number(name: str, known: Known) -> float:
    """What a name stands for: a text times a number would be a longer text."""
    found = known[name]
    if not isinstance(found, int | float):
        raise ValueError(f"{name} is no number")
    return float(found)


def _dotted(node: ast.expr) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _not_understood(expression: str) -> ConfigError:
    return ConfigError(
        f"Expression is not understood ({expression:.200}). Expected numbers and names with + - * /, "
        f"{', '.join(_FUNCTIONS)}, such as abs(forget_truth_ratio - retain_only.forget_truth_ratio)."
    )
