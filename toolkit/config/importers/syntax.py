"""Find the values of constants in a Python file from its syntax tree. Nothing is executed."""

from __future__ import annotations

import ast
import operator
import warnings
from collections import Counter
from typing import Any

from toolkit.config.importers.foreign import Computed

MAX_TEXT = 100_000
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}
_LARGEST = 1e15


class _Unfolded(Exception):
    """Raised for an expression that is not a constant. The text of the exception is the reason."""


def parse(text: str) -> ast.Module:
    """Return the syntax tree of a Python text. Raises ValueError with the reason if the text is not
    Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"{error.msg} (line {error.lineno})") from None
    except (RecursionError, MemoryError):
        raise ValueError("the code is nested too deeply") from None


class Names:
    """The constant values of the names in a Python file. A name has a value only if the file sets
    it exactly once, and not inside a branch or a loop.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.assigned: dict[str, ast.expr] = {}
        # the assignments of the form name.attribute = value
        self.settings: list[tuple[str, str, ast.expr, int]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                self.counts[node.id] += 1
            elif isinstance(node, ast.arg):
                self.counts[node.arg] += 1
            elif isinstance(node, ast.alias):
                self.counts[(node.asname or node.name).partition(".")[0]] += 1
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self.counts[node.name] += 1
            if isinstance(node, (ast.Module, ast.FunctionDef)) or _is_main(node):
                self._body(node.body)  # type: ignore[attr-defined]  # all three have one

    def _body(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target, value = statement.targets[0], statement.value
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                target, value = statement.target, statement.value
            else:
                continue
            if isinstance(target, ast.Name):
                self.assigned[target.id] = value
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                self.settings.append((target.value.id, target.attr, value, statement.lineno))

    def lookup(self, name: str) -> ast.expr | None:
        """Return the expression that was assigned to a name; None if the name is not set exactly
        once.
        """
        return self.assigned.get(name) if self.counts[name] == 1 else None

    def value(self, node: ast.expr) -> Any:
        """Return the value of a constant expression. Return a ``Computed`` if the expression is not
        constant.
        """
        try:
            return self._fold(node, 0)
        except _Unfolded as reason:
            return Computed(shown(node), str(reason))
        except (ArithmeticError, TypeError, ValueError):
            return Computed(shown(node))

    def _fold(self, node: ast.expr, depth: int) -> Any:
        if depth > 50:
            raise _Unfolded("the expression is nested too deeply")
        if isinstance(node, ast.Constant) and not isinstance(node.value, (bytes, complex)):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return [self._fold(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.Dict) and all(node.keys):
            pairs = zip(node.keys, node.values, strict=True)
            return {
                self._fold(key, depth + 1): self._fold(value, depth + 1)
                for key, value in pairs
                if key is not None
            }
        if isinstance(node, ast.Name):
            return self._name(node, depth)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                return node.attr
            raise _Unfolded(
                f"the value of this attribute of {node.value.id} is known only when the script runs"
            )
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
            value = self._fold(node.operand, depth + 1)
            return (not value) if isinstance(node.op, ast.Not) else _sign(node.op, value)
        if isinstance(node, ast.BinOp):
            return self._sum(node, depth)
        raise _Unfolded("the value is computed when the script runs")

    def _name(self, node: ast.Name, depth: int) -> Any:
        found = self.lookup(node.id)
        if found is not None:
            return self._fold(found, depth + 1)
        if self.counts[node.id] > 1:
            raise _Unfolded(f"{node.id} is set more than once")
        raise _Unfolded(f"{node.id} is not a constant of this file")

    def _sum(self, node: ast.BinOp, depth: int) -> Any:
        left, right = self._fold(node.left, depth + 1), self._fold(node.right, depth + 1)
        kind = type(node.op)
        if isinstance(left, str) and isinstance(right, str) and kind is ast.Add:
            if len(left) + len(right) > MAX_TEXT:
                raise _Unfolded("the text is too long")
            return left + right
        numbers = all(
            isinstance(one, (int, float)) and abs(one) < _LARGEST for one in (left, right)
        )
        if not numbers or kind not in _OPERATORS:
            raise _Unfolded("the value is computed when the script runs")
        return _OPERATORS[kind](left, right)


def _sign(sign: ast.unaryop, value: Any) -> Any:
    if not isinstance(value, (int, float)):
        raise _Unfolded("the operand of a sign must be a number")
    return -value if isinstance(sign, ast.USub) else value


def _is_main(node: ast.AST) -> bool:
    """Whether a statement is ``if __name__ == "__main__":``. The body of such a statement is
    treated as code at the top level of the module.
    """
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def shown(node: ast.expr) -> str:
    """Return the source text of an expression as one short line."""
    try:
        text = " ".join(ast.unparse(node).split())
    except RecursionError:
        return "..."
    return text if len(text) <= 60 else f"{text[:57]}..."


def called(node: ast.expr) -> str:
    """Return the last part of the name of the called function. For ``trl.GRPOConfig``, this is
    ``GRPOConfig``.
    """
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def owner(node: ast.expr) -> str:
    """Return the name before the last dot in the name of the called function. For
    ``FastLanguageModel.from_pretrained``, this is ``FastLanguageModel``.
    """
    return called(node.value) if isinstance(node, ast.Attribute) else ""
