"""Find the values of constants in a Python file from its syntax tree. Nothing is executed."""

from __future__ import annotations

import ast
import operator
import warnings
from collections import Counter
from typing import Any

from toolkit.config.importers.foreign import Computed

MAX_TEXT_LENGTH = 100_000
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
}
_MAX_OPERAND = 1e15


class _NotConstant(Exception):
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


class ConstantNames:
    """The constant values of the names in a Python file. A name has a value only if the file sets
    it exactly once, and not inside a branch or a loop.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.counts: Counter[str] = Counter()
        self.assignments: dict[str, ast.expr] = {}
        # the assignments of the form name.attribute = value
        self.attribute_assignments: list[tuple[str, str, ast.expr, int]] = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                self.counts[node.id] += 1
            elif isinstance(node, ast.arg):
                self.counts[node.arg] += 1
            elif isinstance(node, ast.alias):
                self.counts[(node.asname or node.name).partition(".")[0]] += 1
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self.counts[node.name] += 1
            if isinstance(node, (ast.Module, ast.FunctionDef)) or _is_main_block(node):
                self._record_assignments(node.body)  # type: ignore[attr-defined]  # all three have one

    def _record_assignments(self, body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target, value = statement.targets[0], statement.value
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                target, value = statement.target, statement.value
            else:
                continue
            if isinstance(target, ast.Name):
                self.assignments[target.id] = value
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                self.attribute_assignments.append(
                    (target.value.id, target.attr, value, statement.lineno)
                )

    def lookup(self, name: str) -> ast.expr | None:
        """Return the expression that was assigned to a name; None if the name is not set exactly
        once.
        """
        return self.assignments.get(name) if self.counts[name] == 1 else None

    def value(self, node: ast.expr) -> Any:
        """Return the value of a constant expression. Return a ``Computed`` if the expression is not
        constant.
        """
        try:
            return self._evaluate(node, 0)
        except _NotConstant as reason:
            return Computed(short_source(node), str(reason))
        except (ArithmeticError, TypeError, ValueError):
            return Computed(short_source(node))

    def _evaluate(self, node: ast.expr, depth: int) -> Any:
        if depth > 50:
            raise _NotConstant("the expression is nested too deeply")
        if isinstance(node, ast.Constant) and not isinstance(node.value, (bytes, complex)):
            return node.value
        if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            return [self._evaluate(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.Dict) and all(node.keys):
            pairs = zip(node.keys, node.values, strict=True)
            return {
                self._evaluate(key, depth + 1): self._evaluate(value, depth + 1)
                for key, value in pairs
                if key is not None
            }
        if isinstance(node, ast.Name):
            return self._evaluate_name(node, depth)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                return node.attr
            raise _NotConstant(
                f"the value of this attribute of {node.value.id} is known only when the script runs"
            )
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd, ast.Not)):
            value = self._evaluate(node.operand, depth + 1)
            return (not value) if isinstance(node.op, ast.Not) else _apply_sign(node.op, value)
        if isinstance(node, ast.BinOp):
            return self._evaluate_operation(node, depth)
        raise _NotConstant("the value is computed when the script runs")

    def _evaluate_name(self, node: ast.Name, depth: int) -> Any:
        expression = self.lookup(node.id)
        if expression is not None:
            return self._evaluate(expression, depth + 1)
        if self.counts[node.id] > 1:
            raise _NotConstant(f"{node.id} is set more than once")
        raise _NotConstant(f"{node.id} is not a constant of this file")

    def _evaluate_operation(self, node: ast.BinOp, depth: int) -> Any:
        left, right = self._evaluate(node.left, depth + 1), self._evaluate(node.right, depth + 1)
        kind = type(node.op)
        if isinstance(left, str) and isinstance(right, str) and kind is ast.Add:
            if len(left) + len(right) > MAX_TEXT_LENGTH:
                raise _NotConstant("the text is too long")
            return left + right
        numbers = all(
            isinstance(one, (int, float)) and abs(one) < _MAX_OPERAND for one in (left, right)
        )
        if not numbers or kind not in _OPERATORS:
            raise _NotConstant("the value is computed when the script runs")
        return _OPERATORS[kind](left, right)


def _apply_sign(sign: ast.unaryop, value: object) -> Any:
    if not isinstance(value, (int, float)):
        raise _NotConstant("the operand of a sign must be a number")
    return -value if isinstance(sign, ast.USub) else value


def _is_main_block(node: ast.AST) -> bool:
    """Whether a statement is ``if __name__ == "__main__":``. The body of such a statement is
    treated as code at the top level of the module.
    """
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def short_source(node: ast.expr) -> str:
    """Return the source text of an expression as one short line."""
    try:
        text = " ".join(ast.unparse(node).split())
    except RecursionError:
        return "..."
    return text if len(text) <= 60 else f"{text[:57]}..."


def called_name(node: ast.expr) -> str:
    """Return the last part of the name of the called function. For ``trl.GRPOConfig``, this is
    ``GRPOConfig``.
    """
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def owner_name(node: ast.expr) -> str:
    """Return the name before the last dot in the name of the called function. For
    ``FastLanguageModel.from_pretrained``, this is ``FastLanguageModel``.
    """
    return called_name(node.value) if isinstance(node, ast.Attribute) else ""
