"""The input of a rule: the values in the run file with their positions, and the defaults. If the
model is on this machine, the input also contains the model's facts. The same is true for the
adapter.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from toolkit.config import parallel
from toolkit.config.finding import Edit, Fix, rename_key
from toolkit.config.message_text import show_value, spell_value
from toolkit.config.resolved import DeviceFacts, Engine, Situation, resolve_engine
from toolkit.config.schemas import find_schema

if TYPE_CHECKING:
    from toolkit.config.document import Document, Node
    from toolkit.config.model_facts import ModelFacts
    from toolkit.config.source import KeyPath


__all__ = ["DeviceFacts", "Run", "Situation", "SkipRule", "default_value", "key_path"]


class SkipRule(Exception):
    """Raised if a value that a rule needs is invalid and already reported. The rule then yields no
    violation.
    """


@cache
def default_value(path: str) -> Any:
    """The default of a dotted key in the schema; None if it has no default."""
    schema = find_schema("run")
    for name in path.split("."):
        schema = schema["properties"][name]
    return schema.get("default")


@cache
def key_path(path: str) -> KeyPath:
    """The key path of a dotted key: ``("lora", "r")`` for ``lora.r``."""
    return tuple(path.split("."))


class Run:
    """A run file in the form that rules use. Keys are dotted: ``grpo.num_generations``."""

    def __init__(
        self, document: Document, invalid_paths: set[KeyPath], situation: Situation
    ) -> None:
        self.document = document
        self.invalid_paths = invalid_paths
        self.situation = situation
        self._nodes: dict[str, Node | None] = {}

    @property
    def world_size(self) -> int:
        """The number of processes of the run."""
        return self.situation.world_size

    @property
    def replicas(self) -> int:
        """The number of processes that train on different rows. Processes that share one model
        (tensor_parallel_size above 1) train on the same rows and count as one.
        """
        size = self.get(parallel.TENSOR_PARALLEL_KEY)
        return parallel.count_replicas(
            self.world_size, size if self.engine != "transformers" else 1
        )

    def node(self, path: str) -> Node | None:
        """The document node at a key; None if the run file does not set the key."""
        if path not in self._nodes:
            self._nodes[path] = self.document.find_node(key_path(path))
        return self._nodes[path]

    def is_set(self, path: str) -> bool:
        """Whether the run file sets a key. Raises SkipRule if its value is invalid."""
        parts = key_path(path)
        if self.invalid_paths and any(
            parts[:depth] in self.invalid_paths for depth in range(1, len(parts) + 1)
        ):
            raise SkipRule
        return self.node(path) is not None

    def value(self, path: str) -> Any:
        """The value of a key as plain data. Raises SkipRule if the value is invalid.

        If the run file does not set the key, the result is the key's default, with one exception:
        if the run starts from an adapter and the key is a lora key, the result is the adapter's
        value.
        """
        if not self.is_set(path):
            name = path.removeprefix("lora.")
            return (
                self.adapter_settings[name]
                if path != name and name in self.adapter_settings
                else default_value(path)
            )
        node = self.node(path)
        assert node is not None
        if isinstance(node.value, list):
            parts = key_path(path)
            if any(invalid[: len(parts)] == parts for invalid in self.invalid_paths):
                raise SkipRule
            return node.to_plain()
        return node.value

    def mapping(self, path: str) -> dict[str, Any]:
        """The value of a key that is a mapping, as plain data; {} if the value is not a mapping.
        Raises SkipRule if any part of the value is invalid.
        """
        self.value(path)
        parts = key_path(path)
        if any(invalid[: len(parts)] == parts for invalid in self.invalid_paths):
            raise SkipRule
        node = self.node(path)
        value = self.value(path) if node is None else node.to_plain()
        return dict(value) if isinstance(value, dict) else {}

    def get(self, path: str) -> Any:
        """Like ``value``, but returns the default instead of raising SkipRule. A rule with several
        independent parts uses this function, so that one invalid value does not disable the other
        parts.
        """
        try:
            return self.value(path)
        except SkipRule:
            return default_value(path)

    def describe(self, path: str) -> str:
        """A text with the name of a key, the key's value and the line of the value, such as
        ``num_generations 8 (line 12)``. Findings explain their arithmetic with such texts.
        """
        name, node = path.rpartition(".")[2], self.node(path)
        return f"{name} {show_value(self.get(path))} ({self.origin(node)})"

    def origin(self, node: Node | None) -> str:
        """Where a value comes from, as text: a line of the run file, a line of another file, --set,
        or the default.
        """
        if node is None:
            return "default"
        if node.source.is_override:
            return "--set"
        line = f"line {node.position.line}"
        return line if node.source is self.document.source else f"{node.source.name} {line}"

    def set_fix(self, path: str, value: object) -> Fix:
        """The fix that sets ``path`` to ``value``. --fix can apply this fix only if the run file
        sets the key.
        """
        name, node = path.rpartition(".")[2], self.node(path)
        if node is None or node.source.is_override or isinstance(node.value, (dict, list)):
            return Fix(f"{name if node else path}: {spell_value(value, 'yaml')}")
        edits = self.replace_fix(node, value).edits
        if not edits:
            return Fix(f"remove {name}")
        return Fix(f"{name}: {spell_value(value, node.source.format)}", edits)

    def replace_fix(self, node: Node, value: object) -> Fix:
        """The fix that replaces a scalar by ``value``. The fix has no edits if the file format has
        no way to write ``value``.
        """
        if value is None and node.source.format == "toml":
            return Fix("remove the key")  # TOML has no null
        spelling = spell_value(value, node.source.format)
        text = f"write {spelling}"
        return Fix(text, (Edit(node.source, node.position.start, node.position.end, spelling),))

    def rename_fix(self, node: Node, name: str) -> Fix:
        """The fix that renames the key of ``node``."""
        if node.key_position is None or node.source.is_override:
            return Fix(f"rename the key to {name}")
        return Fix(f"rename the key to {name}", (rename_key(node.source, node.key_position, name),))

    @cached_property
    def engine(self) -> Engine:
        """The engine that generates: ``vllm``, ``transformers`` or ``maybe``. ``maybe`` means vLLM
        where it is installed, else transformers.
        """
        engine, fast_inference = self.get("runtime.engine"), self.get("model.fast_inference")
        return resolve_engine(engine, fast_inference, self.situation)

    @cached_property
    def adapter_settings(self) -> dict[str, Any]:
        """The lora settings of the adapter at ``lora.adapter_path``; {} if this key is not set."""
        from toolkit.config.adapter_facts import inherited_settings  # noqa: PLC0415 - only if a rule needs it

        node = self.node("lora.adapter_path")
        return {} if node is None else inherited_settings(node)

    @cached_property
    def model(self) -> ModelFacts | None:
        """Facts about the model, read from its config.json; None if the model is not on this
        machine.
        """
        from toolkit.config.model_facts import read_model  # noqa: PLC0415 - only if a rule needs it

        node = self.node("model.model_name")
        if node is None or not isinstance(node.value, str):
            return None
        revision = self.value("model.revision")
        return read_model(node, revision if isinstance(revision, str) else None)

    @cached_property
    def has_chat_template(self) -> bool | None:
        """Whether the model's tokenizer has a chat template; None if the tokenizer is not on this
        machine.
        """
        from toolkit.config.chat_format import folder_has_template  # noqa: PLC0415 - only if a rule needs it

        return None if self.model is None else folder_has_template(self.model.folder)
