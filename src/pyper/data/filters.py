"""Which documents to keep, as an expression: `chars > 200 and alpha_share > 0.6 and lang == 'en'`.

Expressions are Python's, parsed by Python and compiled here, node by node, into closures: what is
not in `_Compiler` cannot be said. There are no attributes, no powers, no text but what is written
down or read, and the few functions take time linear in what they are given. Nothing is ever handed
to `eval`. (`simpleeval` lists what is dangerous; here the list is of what is allowed.)
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyper.config.explain import nearest
from pyper.data.text_measures import MEASURES
from pyper.errors import DataError

MAX_CHARS = 2_000
_MAX_DEPTH = 50
_RECORDS_UNTIL_TYPO = 100
"""A name that so many records do not have is taken for a typing error."""

Names = Callable[[str], Any]
"""The value of a name in one document."""
_Part = Callable[[Names], Any]

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_NEVER_OF_NONE = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)


def _number(kind: type[int] | type[float]) -> Callable[[Any], Any]:
    """`int` and `float` of what may be no number: a column of a table is text."""

    def convert(value: Any) -> Any:
        try:
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            return None

    return convert


_FUNCTIONS: dict[str, tuple[Callable[..., Any], range]] = {
    "len": (lambda x: None if x is None else len(x), range(1, 2)),
    "abs": (abs, range(1, 2)),
    "min": (min, range(2, 9)),
    "max": (max, range(2, 9)),
    "int": (_number(int), range(1, 2)),
    "float": (_number(float), range(1, 2)),
    "lower": (lambda x: str(x).lower(), range(1, 2)),
    "count": (lambda x, part: str(x).count(part), range(2, 3)),
    "startswith": (lambda x, part: str(x).startswith(part), range(2, 3)),
    "endswith": (lambda x, part: str(x).endswith(part), range(2, 3)),
}


class Filter:
    """One expression. Raises DataError when it cannot be used."""

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_CHARS:
            raise _refusal(source[:40] + "…", f"it has more than {MAX_CHARS:,} characters")
        try:
            tree = ast.parse(source.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or str(error)
            raise _refusal(source, f"it is no expression: {reason}") from None
        compiler = _Compiler(source)
        self._keeps = compiler.compile(tree.body, 0)
        self.asks_for_all = compiler.asks_for_all
        self.fields = {name for name in compiler.names if name not in MEASURES}
        self._unseen = set(self.fields)
        self._records, self._known = 0, dict.fromkeys(MEASURES)

    def keeps(self, fields: Mapping[str, Any], text: str, where: str) -> bool:
        """Whether a document stays. Raises DataError where the expression makes no sense of it.

        fields: of its record; empty where the source has none. What is computed from the text comes
        first: a field of the same name is `fields['chars']`. A field that is missing is None, and
        None is neither more nor less than anything.
        """
        if self._unseen:
            self._look_for_names(fields)

        def value(name: str) -> Any:
            measure = MEASURES.get(name)
            if measure is not None:
                return measure(text)
            return fields if name == "fields" else fields.get(name)

        try:
            return bool(self._keeps(value))
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise DataError(
                f"{where}: the filter `{self.source}` fails: {error}",
                hint="columns of a table are text: compare e.g. `float(score) > 0.5`",
            ) from None

    def check_names(self, who: str = "no record", way_out: str = "") -> None:
        """Raises DataError for a name that no document had: call it when all were read."""
        for name in sorted(self._unseen):
            known = list(self._known)
            raise DataError(
                f"the filter `{self.source}` asks for `{name}`, which {who} has",
                hint=f"{nearest(name, known)}".replace("known: ", "there are: ") + way_out,
            )

    def _look_for_names(self, fields: Mapping[str, Any]) -> None:
        self._unseen -= fields.keys()
        self._known |= dict.fromkeys(list(fields)[:100])
        self._records += bool(fields)
        if self._records >= _RECORDS_UNTIL_TYPO:
            name = min(self._unseen, default="")
            self.check_names(
                f"none of the first {self._records:,} records",
                f"; `fields['{name}']` where only later ones have it",
            )


class _Compiler:
    """Expressions to closures."""

    def __init__(self, source: str) -> None:
        self.source, self.names, self.asks_for_all = source, set[str](), False

    def compile(self, node: ast.expr, depth: int) -> _Part:
        """The closure of a node. Raises DataError for what a filter may not say."""
        if depth > _MAX_DEPTH:
            raise _refusal(self.source, "it is nested too deeply")
        build = getattr(self, f"_{type(node).__name__.lower()}", None)
        if build is None:
            said = ast.get_source_segment(self.source.strip(), node) or type(node).__name__
            raise _refusal(self.source, f"`{said}` is nothing that a filter may say")
        part: _Part = build(node, depth + 1)
        return part

    def _constant(self, node: ast.Constant, depth: int) -> _Part:
        value = node.value
        if not isinstance(value, str | int | float | bool | None):
            raise _refusal(self.source, f"{value!r} is neither a number nor text")
        return lambda names: value

    def _name(self, node: ast.Name, depth: int) -> _Part:
        name = node.id
        if name == "fields":
            self.asks_for_all = True
        else:
            self.names.add(name)
        return lambda names: names(name)

    def _tuple(self, node: ast.Tuple | ast.List | ast.Set, depth: int) -> _Part:
        parts = [self.compile(item, depth) for item in node.elts]
        return lambda names: [part(names) for part in parts]

    _list = _set = _tuple

    def _boolop(self, node: ast.BoolOp, depth: int) -> _Part:
        parts = [self.compile(value, depth) for value in node.values]
        if isinstance(node.op, ast.And):
            return lambda names: all(part(names) for part in parts)
        return lambda names: any(part(names) for part in parts)

    def _unaryop(self, node: ast.UnaryOp, depth: int) -> _Part:
        inner = self.compile(node.operand, depth)
        if isinstance(node.op, ast.Not):
            return lambda names: not inner(names)
        if isinstance(node.op, ast.USub):
            return lambda names: None if (value := inner(names)) is None else -value
        raise _refusal(self.source, "of signs there are `-` and `not`")

    def _binop(self, node: ast.BinOp, depth: int) -> _Part:
        combine = _ARITHMETIC.get(type(node.op))
        if combine is None:
            raise _refusal(self.source, "it may calculate with + - * / // % only")
        left, right = self.compile(node.left, depth), self.compile(node.right, depth)

        def calculate(names: Names) -> Any:
            a, b = left(names), right(names)
            if a is None or b is None:
                return None
            if not isinstance(a, int | float) or not isinstance(b, int | float):
                raise TypeError("only numbers can be calculated with")
            return combine(a, b)

        return calculate

    def _compare(self, node: ast.Compare, depth: int) -> _Part:
        operands = [self.compile(n, depth) for n in (node.left, *node.comparators)]
        steps = [(type(op), _COMPARISONS[type(op)]) for op in node.ops]

        def compare(names: Names) -> bool:
            left = operands[0](names)
            for (kind, holds), operand in zip(steps, operands[1:], strict=True):
                right = operand(names)
                if kind in _NEVER_OF_NONE and (right is None or _unknown(kind, left)):
                    return False
                if not holds(left, right):
                    return False
                left = right
            return True

        return compare

    def _subscript(self, node: ast.Subscript, depth: int) -> _Part:
        value, key = self.compile(node.value, depth), node.slice
        if not isinstance(key, ast.Constant) or not isinstance(key.value, str | int):
            raise _refusal(self.source, "in [ ] there can be a name in quotes, or a number")
        found = key.value

        def look_up(names: Names) -> Any:
            inside = value(names)
            if isinstance(inside, Mapping):
                return inside.get(found)
            if isinstance(inside, Sequence) and isinstance(found, int):
                return inside[found] if found < len(inside) else None
            return None

        return look_up

    def _call(self, node: ast.Call, depth: int) -> _Part:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in _FUNCTIONS or node.keywords:
            raise _refusal(self.source, f"of functions it may call {', '.join(_FUNCTIONS)}")
        function, n_arguments = _FUNCTIONS[name]
        if len(node.args) not in n_arguments:
            raise _refusal(self.source, f"`{name}` takes another number of arguments")
        parts = [self.compile(argument, depth) for argument in node.args]
        return lambda names: function(*[part(names) for part in parts])


def _unknown(kind: type[ast.cmpop], value: Any) -> bool:
    return value is None and kind not in (ast.In, ast.NotIn)


def _refusal(source: str, reason: str) -> DataError:
    return DataError(
        f"the filter `{source}` cannot be used: {reason}",
        hint="for example `chars > 200 and alpha_share > 0.6 and lang == 'en'`",
    )
