"""Filters over records: a `where` is compiled and checked once, then evaluated per record in bounded time and memory.

The language is a subset of Python's expressions: columns by name or as `row["a name"]`, texts, numbers, `true`,
`false`, `null`, lists, comparisons, `in`, `and`, `or`, `not`, `x if y else z`, + - * / // %, entries and slices
(`meta.lang`, `meta["lang"]`, `tags[0]`, `question[:7]`), `len()`, `lower()`, `number()` of a text, `get()` of an
object, and those string methods that only read (`_METHODS`).

No expression can change a record, and types are never converted: comparing text with a number, or using text as a
truth value, is an error. Only null may be compared with any type, with == and !=.
"""

import ast
import functools
import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Filter = Callable[[Mapping[str, Any]], bool]
"""Return whether a record passes; raises ValueError with the reason where that cannot be decided."""

TEXT, NUMBER, TRUTH, NULL, LIST, OBJECT = "text", "a number", "a truth value", "null", "a list", "an object"

_DEPTH = 64  # parts within parts
_WORK = 1 << 26  # characters and items that one record may cost: a second at most
_BITS = 1 << 14  # of a whole number: a little more than JSON may write
_CONSTANTS = {"true": True, "false": False, "null": None}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDER: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_METHODS = {
    **dict.fromkeys(("lower", "upper", "casefold", "title", "capitalize"), TEXT),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "removeprefix", "removesuffix"), TEXT),
    **dict.fromkeys(("startswith", "endswith"), TRUTH),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "islower", "isspace", "isupper"), TRUTH),
    **dict.fromkeys(("count", "find"), NUMBER),
    **dict.fromkeys(("split", "splitlines"), LIST),
}
"""Allowed string methods and the type of their results. Left out are those that can make a long text from a short one
(`zfill`, `center`, `replace`, `join`, `format`) and those that can take quadratic time (`rfind`)."""
_MAY_TAKE = {"strip": 1, "lstrip": 1, "rstrip": 1, "split": 1}
_MUST_TAKE = dict.fromkeys(("removeprefix", "removesuffix", "startswith", "endswith", "count", "find"), 1)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NUMBER_LENGTH = 400  # characters
_HINTS = {
    (TEXT, NUMBER): "compare it with a text, or write number(…) around it",
    (TEXT, TRUTH): 'compare it with a text, such as == "false"',
    (TEXT, NULL): 'an empty field is ""',
    (NUMBER, TRUTH): "compare it with a number, such as != 0",
    (NULL, TRUTH): "compare it, as in == true or == null",
    (LIST, TRUTH): "compare its length, as in len(…) > 0",
}
"""Advice, by the type found and the type expected."""


@dataclass(slots=True)
class _Row:
    fields: Mapping[str, Any]
    work: int = _WORK

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise ValueError(f"it takes more than {_WORK:,} steps")


class _Part(NamedTuple):
    """A part of an expression."""

    of: Callable[[_Row], Any]
    kind: str | None
    """Its type for every record; None where that depends on the record."""
    name: str
    inside: str | None = None
    """The type of every item of a list or entry of an object, if known."""
    items: "tuple[_Part, ...] | None" = None
    """The items of a list literal."""
    value: Any = ...
    """The value of a constant, or of a list of constants; `...` for anything else."""


@functools.lru_cache(maxsize=64)
def compiled(expression: str, columns: str | None = None) -> Filter:
    """Compile an expression; `columns` is `TEXT` for records whose columns are all text, as in CSV.

    Raises:
        ValueError: with the reason, when it is no filter or no record could decide it.
    """
    try:
        part = _part(_parsed(expression), columns, 0)
    except RecursionError:
        raise _too_deep() from None
    holds = _being(part, TRUTH)

    def decide(fields: Mapping[str, Any]) -> bool:
        try:
            return holds(_Row(fields))
        except ArithmeticError as error:
            raise ValueError(f"it cannot be computed: {error}") from None
        except RecursionError:
            raise ValueError("a value is nested too deeply") from None

    return decide


def kind(value: Any) -> str:
    """The type of a JSON value, as messages name it. NaN counts as null, which pandas writes so."""
    if isinstance(value, str):
        return TEXT
    if isinstance(value, bool):
        return TRUTH
    if isinstance(value, int | float):
        return NUMBER if value == value else NULL
    return NULL if value is None else LIST if isinstance(value, list | tuple) else OBJECT


def read_number(text: str) -> int | float | None:
    """The number that a text spells in decimal digits, or None."""
    text = text.strip()
    if len(text) > _NUMBER_LENGTH or not (found := _NUMBER.fullmatch(text)):
        return None
    return float(text) if found[2] or found[3] or text.startswith((".", "+.", "-.")) else int(text)


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except (RecursionError, MemoryError):  # as Python's parser says it
        raise _too_deep() from None
    except (SyntaxError, ValueError) as error:
        told = getattr(error, "msg", "not valid Unicode")
        raise ValueError(f"is not an expression ({told}); write such as: is_safe == false") from None


def _too_deep() -> ValueError:
    return ValueError(f"is nested too deeply; expected at most {_DEPTH} levels")


def _part(node: ast.expr, columns: str | None, depth: int) -> _Part:
    if depth > _DEPTH:
        raise _too_deep()

    def inner(child: ast.expr) -> _Part:
        return _part(child, columns, depth + 1)

    match node:
        case ast.Constant(value=None | str() | int() | float() as value):  # of which bool is an int
            return _constant(value, json.dumps(value)[:40])
        case ast.Name(id=name) if name in _CONSTANTS:
            return _constant(_CONSTANTS[name], name)
        case ast.Name(id="row"):
            return _Part(lambda row: row.fields, OBJECT, "row", columns)
        case ast.Name(id=name):
            return _entry(_Part(lambda row: row.fields, OBJECT, "row", columns), _constant(name, name))
        case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
            return _list(tuple(inner(element) for element in elements))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            denied = _being(inner(operand), TRUTH)
            return _Part(lambda row: not denied(row), TRUTH, "not …")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            turned, sign = _being(inner(operand), NUMBER), -1 if isinstance(op, ast.USub) else 1
            return _Part(lambda row: sign * turned(row), NUMBER, "a sign")
        case ast.BoolOp(op=op, values=values):
            sides, among = [_being(inner(value), TRUTH) for value in values], all if isinstance(op, ast.And) else any
            return _Part(lambda row: among(side(row) for side in sides), TRUTH, "and" if among is all else "or")
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _either(_being(inner(test), TRUTH), inner(body), inner(orelse))
        case ast.Compare(left=left, ops=ops, comparators=others):
            return _chain([inner(side) for side in (left, *others)], ops)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _arithmetic(op, inner(left), inner(right))
        case ast.Attribute(value=owner, attr=name) if not name.startswith("_"):
            return _entry(inner(owner), _constant(name, name))
        case ast.Subscript(value=owner, slice=ast.Slice(lower=lower, upper=upper, step=None)):
            return _slice(inner(owner), *(inner(end) if end else None for end in (lower, upper)))
        case ast.Subscript(value=owner, slice=key) if not isinstance(key, ast.Slice):
            return _entry(inner(owner), inner(key))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            takes, gives, function = _FUNCTIONS[name]
            return _applied(f"{name}()", takes, gives, function, inner(argument))
        case ast.Call(func=ast.Attribute(value=owner, attr="get"), args=[key, *default], keywords=[]) if (
            len(default) < 2
        ):
            return _entry(inner(owner), inner(key), inner(default[0]) if default else _constant(None, "null"))
        case ast.Call(func=ast.Attribute(value=owner, attr=name), args=given, keywords=[]) if name in _METHODS and (
            _MUST_TAKE.get(name, 0) <= len(given) <= _MUST_TAKE.get(name, 0) + _MAY_TAKE.get(name, 0)
        ):
            return _method(name, inner(owner), [inner(argument) for argument in given])
    raise ValueError(f"uses {_shown(node)}, which filters do not allow; components/data/filters.py lists what they do")


def _shown(node: ast.expr) -> str:
    try:
        return f"`{ast.unparse(node):.60}`"
    except RecursionError:
        raise _too_deep() from None


# --- what a part must be ---------------------------------------------------------------------------------------------


def _being(part: _Part, *kinds: str) -> Callable[[_Row], Any]:
    """Raise unless `part` is one of `kinds`: at once where its type is known, else for each record."""
    if part.kind is not None:
        if part.kind not in kinds:
            raise _is_not(part, part.kind, kinds)
        return part.of

    def of(row: _Row) -> Any:
        value = part.of(row)
        if (found := kind(value)) not in kinds:
            raise _is_not(part, found, kinds)
        return value

    return of


def _is_not(part: _Part, found: str, kinds: Sequence[str]) -> ValueError:
    hint = _HINTS.get((found, kinds[0]))
    return ValueError(f"{part.name} is {found} where {' or '.join(kinds)} is expected" + (f"; {hint}" if hint else ""))


def _unlike(left: _Part, right: _Part | None, found: str, other: str) -> ValueError:
    """`left` compared with `right`, or with the items of a list; the message is about what is no constant."""
    if right and (left.value is not ... or (other == TEXT and right.value is ...)):
        left, right, found, other = right, left, other, found
    with_what = f"{right.name}, {other}" if right and right.value is ... else other
    hint = _HINTS.get((found, other))
    return ValueError(f"{left.name} is {found}, compared with {with_what}" + (f"; {hint}" if hint else ""))


# --- parts -----------------------------------------------------------------------------------------------------------


def _constant(value: Any, name: str) -> _Part:
    return _Part(lambda row: value, kind(value), name, value=value)


def _list(items: tuple[_Part, ...]) -> _Part:
    if all(item.value is not ... and item.kind != LIST for item in items):
        values = [item.value for item in items]
        return _Part(lambda row: values, LIST, "a list", items=items, value=values)
    return _Part(lambda row: [item.of(row) for item in items], LIST, "a list", items=items)


def _either(test: Callable[[_Row], Any], body: _Part, other: _Part) -> _Part:
    known = body.kind if body.kind == other.kind else None
    return _Part(lambda row: body.of(row) if test(row) else other.of(row), known, "if … else …")


def _entry(owner: _Part, key: _Part, default: _Part | None = None) -> _Part:
    """A column of the record, entry of an object, item of a list or character of a text."""
    whole = _being(owner, OBJECT) if default else _being(owner, OBJECT, LIST, TEXT)
    what = "column" if owner.name == "row" else f"entry of {owner.name}:"
    name = f"{what} {key.value!r}" if key.value is not ... else f"{what} {key.name}"

    def of(row: _Row) -> Any:
        value, place = whole(row), key.of(row)
        if isinstance(value, Mapping) == isinstance(place, str):
            if isinstance(place, str):
                found = value.get(place, ...)
            elif isinstance(place, int) and not isinstance(place, bool):
                found = value[place] if -len(value) <= place < len(value) else ...
            else:
                raise ValueError(f"{key.name} is {kind(place)} where a whole number is expected")
            if found is ... and default is None:
                raise ValueError(f"there is no {name}")
            found = default.of(row) if found is ... and default else found
            return None if kind(found) == NULL else found
        raise ValueError(f"{owner.name} is {kind(value)}, which has no entry {key.name}")

    known = TEXT if owner.kind == TEXT else owner.inside
    return _Part(of, known if default is None or default.value is None or default.kind == known else None, name)


def _slice(owner: _Part, lower: _Part | None, upper: _Part | None) -> _Part:
    whole = _being(owner, TEXT, LIST)
    ends = [_being(end, NUMBER) if end else None for end in (lower, upper)]

    def of(row: _Row) -> Any:
        value, (first, last) = whole(row), (end and end(row) for end in ends)
        if isinstance(first, float) or isinstance(last, float):
            raise ValueError(f"a slice of {owner.name} has an end that is no whole number")
        row.spend(len(value))
        return value[first:last]

    return _Part(of, owner.kind, f"a slice of {owner.name}", owner.inside)


def _arithmetic(op: ast.operator, left: _Part, right: _Part) -> _Part:
    kinds = (NUMBER, TEXT) if isinstance(op, ast.Add) else (NUMBER,)
    first, second, compute = _being(left, *kinds), _being(right, *kinds), _ARITHMETIC[type(op)]
    if left.kind and right.kind and left.kind != right.kind:
        raise _is_not(right, right.kind, (left.kind,))

    def of(row: _Row) -> Any:
        a, b = first(row), second(row)
        if isinstance(a, str) != isinstance(b, str):
            raise _is_not(right, kind(b), (kind(a),))
        if isinstance(a, str):
            row.spend(len(a) + len(b))
            return a + b
        found = compute(a, b)
        if found != found or (isinstance(found, int) and found.bit_length() > _BITS):
            raise ValueError("a number gets too large")
        return found

    known = NUMBER if len(kinds) == 1 else left.kind or right.kind
    return _Part(of, known, "a sum" if len(kinds) > 1 else "a result")


def _applied(name: str, takes: tuple[str, ...], gives: str, function: Callable[[Any], Any], argument: _Part) -> _Part:
    given = _being(argument, *takes)

    def of(row: _Row) -> Any:
        value = given(row)
        if isinstance(value, str):
            row.spend(len(value))
        try:
            return function(value)
        except ValueError as error:
            raise ValueError(f"{argument.name} {error}") from None

    return _Part(of, gives, f"{name} of {argument.name}")


def _method(name: str, owner: _Part, given: list[_Part]) -> _Part:
    text = _being(owner, TEXT)
    several = name in ("startswith", "endswith")
    arguments = [_being(argument, *((TEXT, LIST) if several else (TEXT,))) for argument in given]
    method = getattr(str, name)

    def of(row: _Row) -> Any:
        value, others = text(row), [argument(row) for argument in arguments]
        if several and isinstance(others[0], list):
            if any(kind(start) != TEXT for start in others[0]):
                raise ValueError(f"{name}() takes a list of nothing but texts")
            others = [tuple(others[0])]
        # What splits makes an object of each piece; what strips looks through its argument for each character.
        factor = 32 if _METHODS[name] == LIST else len(others[0]) if others and name.endswith("strip") else 1
        row.spend(len(value) * factor + sum(map(len, others)))
        return method(value, *others)

    return _Part(of, _METHODS[name], f"{name}() of {owner.name}", TEXT if _METHODS[name] == LIST else None)


def _as_number(value: str | int | float) -> int | float:
    found = read_number(value) if isinstance(value, str) else value
    if found is None:
        raise ValueError("holds a text that is not a number")
    return found


_FUNCTIONS: dict[str, tuple[tuple[str, ...], str, Callable[[Any], Any]]] = {
    "len": ((TEXT, LIST, OBJECT), NUMBER, len),
    "lower": ((TEXT,), TEXT, str.lower),
    "number": ((TEXT, NUMBER), NUMBER, _as_number),
}
"""Name → (types it takes, type it returns, function)."""


# --- comparisons -----------------------------------------------------------------------------------------------------


def _chain(sides: list[_Part], ops: list[ast.cmpop]) -> _Part:
    """`a < b <= c`: each side is evaluated at most once, and only if needed."""
    pairs = [_comparison(op, left, right) for op, left, right in zip(ops, sides, sides[1:], strict=False)]

    def of(row: _Row) -> bool:
        left = sides[0].of(row)
        for compare, side in zip(pairs, sides[1:], strict=True):
            right = side.of(row)
            if not compare(row, left, right):
                return False
            left = right
        return True

    return _Part(of, TRUTH, "a comparison")


def _comparison(op: ast.cmpop, left: _Part, right: _Part) -> Callable[[_Row, Any, Any], bool]:
    if isinstance(op, ast.In | ast.NotIn):
        member = _membership(left, right)
        return member if isinstance(op, ast.In) else lambda row, a, b: not member(row, a, b)
    if left.kind and right.kind and left.kind != right.kind:
        raise _unlike(left, right, left.kind, right.kind)
    if type(op) in _ORDER:
        for side in (left, right):
            if side.kind not in (None, NUMBER, TEXT):
                raise _is_not(side, str(side.kind), (NUMBER, TEXT))
        return _order(_ORDER[type(op)], left, right)
    same = functools.partial(_same, left, right)
    return same if isinstance(op, ast.Eq | ast.Is) else lambda row, a, b: not same(row, a, b)


def _order(holds: Callable[[Any, Any], bool], left: _Part, right: _Part) -> Callable[[_Row, Any, Any], bool]:
    def compare(row: _Row, a: Any, b: Any) -> bool:
        if kind(a) != kind(b):
            raise _unlike(left, right, kind(a), kind(b))
        if kind(a) not in (TEXT, NUMBER):
            raise _is_not(left, kind(a), (NUMBER, TEXT))
        return holds(a, b)

    return compare


def _same(left: _Part, right: _Part, row: _Row, a: Any, b: Any) -> bool:
    """Equality of two values of one type; null equals only null."""
    found, other = kind(a), kind(b)
    if NULL in (found, other):
        return found == other
    if found != other:
        raise _unlike(left, right, found, other)
    if found == OBJECT:
        raise ValueError(f"{left.name} is an object; compare its entries")
    row.spend(1 if found in (NUMBER, TRUTH) or len(a) != len(b) else len(a))
    if found == LIST:
        return len(a) == len(b) and all(_same(left, right, row, x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _membership(left: _Part, right: _Part) -> Callable[[_Row, Any, Any], bool]:
    if right.kind not in (None, TEXT, LIST, OBJECT):
        raise _is_not(right, right.kind or "", (LIST, TEXT, OBJECT))
    if right.kind in (TEXT, OBJECT):
        _being(left, TEXT)
    among = [item.kind for item in right.items or ()]
    if left.kind and among and None not in among and left.kind not in among:
        raise _unlike(left, None, left.kind, str(among[0]))
    # Ids written out in a list may be thousands: they are looked up, not walked through.
    ids = {k: frozenset(v) for k, v in _by_kind(right.value).items()} if isinstance(right.value, list) else None

    def member(row: _Row, a: Any, b: Any) -> bool:
        found, container = kind(a), kind(b)
        if container == LIST:
            return _listed(left, row, a, b, ids)
        if container not in (TEXT, OBJECT):
            raise _is_not(right, container, (LIST, TEXT, OBJECT))
        if found != TEXT:
            raise _is_not(left, found, (TEXT,))
        row.spend(len(b))
        return a in b

    return member


def _listed(left: _Part, row: _Row, value: Any, items: Any, ids: Any) -> bool:
    """Whether a value is among items, at least one of which must be of its type; null may be looked for in any."""
    found = kind(value)
    if ids is None:
        row.spend(len(items))
    of_kind = _by_kind(items) if ids is None else ids
    if found == NULL:
        return NULL in of_kind
    if found in of_kind and ids:
        return value in of_kind[found]
    if found in of_kind:
        return any(_same(left, left, row, value, item) for item in of_kind[found])
    if others := sorted({*of_kind} - {NULL}):
        raise _unlike(left, None, found, others[0])
    return False


def _by_kind(items: Any) -> dict[str, list[Any]]:
    """Items grouped by type."""
    found: dict[str, list[Any]] = {}
    for item in items:
        found.setdefault(kind(item), []).append(item)
    return found
