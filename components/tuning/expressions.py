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
        ArithmeticError, ValueError: a division by 0, a logarithm of 0.
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
        raise ConfigError(f"Condition is not understood ({condition}). Expected one comparison with <, <=, > or >=.")
    return node


def _sides(condition: str) -> tuple[ast.expr, ast.expr]:
    node = _comparison(condition)
    return node.left, node.comparators[0]


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise _not_understood(expression) from None


def _compiled(node: ast.expr, whole: str) -> tuple[list[str], Callable[[Known], Any]]:
    """(the names in it, what computes it)."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return [], lambda known: number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            used, of = _compiled(inner, whole)
            return used, lambda known: -of(known)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            parts, combine = [_compiled(side, whole) for side in (left, right)], _OPERATORS[type(op)]
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as given, keywords=[]) if name in _FUNCTIONS and (
            len(given) > 1
        ) == (name in _OF_SEVERAL):
            parts, combine = [_compiled(inner, whole) for inner in given], _FUNCTIONS[name]
        case ast.Name() | ast.Attribute() if dotted := _dotted(node):
            return [dotted], lambda known: known[dotted]
        case _:
            raise _not_understood(whole)
    return [name for used, _ in parts for name in used], lambda known: combine(*(of(known) for _, of in parts))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


def _not_understood(expression: str) -> ConfigError:
    return ConfigError(
        f"Expression is not understood ({expression}). Expected numbers and names with + - * /, "
        f"{', '.join(_FUNCTIONS)}, such as abs(forget_truth_ratio - retain_only.forget_truth_ratio)."
    )
