"""The input of a rule: values in the run file, defaults, positions, and facts of the model and the
data if they are available.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from toolkit.config import parallel
from toolkit.config.finding import Edit, Fix, rename
from toolkit.config.resolved import DeviceFacts, Engine, Situation, engine_of
from toolkit.config.schemas import find_schema
from toolkit.config.wording import show, spell

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.model_facts import ModelFacts
    from toolkit.config.source import KeyPath


__all__ = ["DeviceFacts", "Run", "Situation", "Unjudged", "default", "parts_of"]


class Unjudged(Exception):
    """Raised if a value that a rule needs is invalid and already reported. The rule then reports
    nothing.
    """


@cache
def default(path: str) -> Any:
    """The schema's default of a dotted key."""
    schema = find_schema("run")
    for part in path.split("."):
        schema = schema["properties"][part]
    return schema.get("default")


@cache
def parts_of(path: str) -> KeyPath:
    """A dotted key such as ``lora.rank`` as a key path."""
    return tuple(path.split("."))


class Run:
    """A document in the form that rules use. Keys are dotted: ``grpo.num_generations``."""

    def __init__(self, document: Document, bad: set[KeyPath], situation: Situation) -> None:
        self.document = document
        self.bad = bad
        self.situation = situation
        self._nodes: dict[str, Node | None] = {}

    @property
    def processes(self) -> int:
        """The number of processes of the run."""
        return self.situation.world_size

    @property
    def world_size(self) -> int:
        """The number of processes, or of process groups that share one model, that have rows of
        their own.
        """
        size = self.ask(parallel.KEY)
        return parallel.replicas(self.processes, size if self.engine != "transformers" else 1)

    def node(self, path: str) -> Node | None:
        """The node of a key; None if the run file does not set the key."""
        if path not in self._nodes:
            self._nodes[path] = self.document.node(parts_of(path))
        return self._nodes[path]

    def written(self, path: str) -> bool:
        """Whether the run file sets a key to a value that rules can use."""
        parts = parts_of(path)
        if self.bad and any(parts[:depth] in self.bad for depth in range(1, len(parts) + 1)):
            raise Unjudged
        return self.node(path) is not None

    def value(self, path: str) -> Any:
        """The value of a key as plain data. If the run file does not set the key: the value of the
        adapter that the run starts from, else the default.
        """
        if not self.written(path):
            name = path.removeprefix("lora.")
            return self.adapter[name] if path != name and name in self.adapter else default(path)
        node = self.node(path)
        assert node is not None
        if isinstance(node.value, list):
            parts = parts_of(path)
            if any(bad[: len(parts)] == parts for bad in self.bad):
                raise Unjudged
            return node.to_plain()
        return node.value

    def mapping(self, path: str) -> dict[str, Any]:
        """The value of a key that is a mapping, as plain data; {} if it is not a mapping."""
        self.value(path)
        parts = parts_of(path)
        if any(bad[: len(parts)] == parts for bad in self.bad):
            raise Unjudged
        node = self.node(path)
        value = self.value(path) if node is None else node.to_plain()
        return dict(value) if isinstance(value, dict) else {}

    def ask(self, path: str) -> Any:
        """Like ``value``, but returns the default if the value in the run file is invalid by
        itself. A rule with several independent parts uses this function, so that one invalid value
        does not disable the other parts.
        """
        try:
            return self.value(path)
        except Unjudged:
            return default(path)

    def operand(self, path: str) -> str:
        """A key with its value and line, ``num_generations 8 (line 12)``, for the arithmetic of a
        finding.
        """
        name, node = path.rpartition(".")[2], self.node(path)
        return f"{name} {show(self.ask(path))} ({self.origin(node)})"

    def origin(self, node: Node | None) -> str:
        """Where a value comes from, as text: a line, another file's line, an override, or the
        default.
        """
        if node is None:
            return "default"
        if node.source.is_override:
            return "--set"
        line = f"line {node.mark.line}"
        return line if node.source is self.document.source else f"{node.source.name} {line}"

    def to(self, path: str, value: Any) -> Fix:
        """The fix that sets ``path`` to ``value``. --fix can apply it if the run file sets
        the key.
        """
        name, node = path.rpartition(".")[2], self.node(path)
        if node is None or node.source.is_override or isinstance(node.value, (dict, list)):
            return Fix(f"{name if node else path}: {spell(value, 'yaml')}")
        fix = self.replace(node, value)
        return Fix(f"{name}: {fix.text}", fix.edits)

    def replace(self, node: Node, value: Any) -> Fix:
        """The fix that replaces a scalar by ``value``."""
        if value is None and node.source.format == "toml":
            return Fix("remove it")  # TOML has no null
        spelling = spell(value, node.source.format)
        return Fix(spelling, (Edit(node.source, node.mark.start, node.mark.end, spelling),))

    def rename(self, node: Node, name: str) -> Fix:
        """The fix that renames the key of ``node``."""
        if node.key is None or node.source.is_override:
            return Fix(f"rename it to {name}")
        return Fix(f"rename it to {name}", (rename(node.source, node.key, name),))

    @cached_property
    def engine(self) -> Engine:
        """The engine that generates, as ``config.resolved`` decides."""
        engine, fast = self.ask("runtime.engine"), self.ask("model.fast_inference")
        return engine_of(engine, fast, self.situation)

    @cached_property
    def adapter(self) -> dict[str, Any]:
        """The facts of the adapter of ``lora.adapter_path``; empty if there is none."""
        from toolkit.config.adapter_facts import inherited  # noqa: PLC0415 - only when a rule asks

        node = self.node("lora.adapter_path")
        return {} if node is None else inherited(node)

    @cached_property
    def model(self) -> ModelFacts | None:
        """The facts of the model's own config, if it is available."""
        from toolkit.config.model_facts import read_model  # noqa: PLC0415 - only when a rule asks

        node = self.node("model.model_name")
        if node is None or not isinstance(node.value, str):
            return None
        revision = self.value("model.revision")
        return read_model(node, revision if isinstance(revision, str) else None)

    @cached_property
    def chat_template(self) -> bool | None:
        """Whether the model's tokenizer has a chat template; None if the tokenizer is not
        available.
        """
        from toolkit.config.chat_format import template_in  # noqa: PLC0415 - only when a rule asks

        return None if self.model is None else template_in(self.model.folder)
