"""OmegaConf's configurations as plain data: a DictConfig becomes the dict of its values, a ListConfig the list.
Interpolations (`${a.b}`) and missing values (`???`) stay the text that they are."""

from __future__ import annotations

from functools import partial

from registry.formats.pickles.context import Context, described
from registry.formats.pickles.known import Known, words
from registry.formats.pickles.values import Opaque, ToBuild, Unbuilt

Arguments = tuple[object, ...]


def _field(context: Context, state: object, name: str) -> object:
    if not isinstance(state, dict) or name not in state:
        raise context.invalid(f"the state of an OmegaConf value with {name}", described(state))
    return state[name]


def _node(name: str, context: Context, arguments: Arguments) -> ToBuild:
    target = Unbuilt("OmegaConf value")

    def build(state: object) -> object:
        target.value, target.is_built = _field(context, state, name), True
        return target.value

    return ToBuild(target, build)


def _config(kind: type[dict[object, object]] | type[list[object]], context: Context, arguments: Arguments) -> ToBuild:
    target: dict[object, object] | list[object] = kind()

    def build(state: object) -> object:
        content = _field(context, state, "_content")
        if content is None or isinstance(content, str):
            return content
        if type(content) is not kind:
            raise context.invalid(f"the content of a configuration as a {kind.__name__}", described(content))
        # Nodes point to the configuration above them, so one may be filled before what stands in it is built.
        context.fillings.append(partial(fill, content))
        return target

    def fill(content: dict[object, object] | list[object]) -> None:
        context.budget.spend_items(len(content))
        if isinstance(target, dict) and isinstance(content, dict):
            target.update({key: _value(node) for key, node in content.items()})
        elif isinstance(target, list) and isinstance(content, list):
            target.extend([_value(node) for node in content])

    return ToBuild(target, build)


def _value(node: object) -> object:
    return node.value if isinstance(node, Unbuilt) and node.is_built else node


def _metadata(name: str, context: Context, arguments: Arguments) -> Opaque:
    return Opaque(f"omegaconf.base.{name}")


_NODES = words("AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode EnumNode")

OMEGACONF: dict[tuple[str, str], Known] = {
    ("omegaconf.dictconfig", "DictConfig"): Known(partial(_config, dict), is_class=True),
    ("omegaconf.listconfig", "ListConfig"): Known(partial(_config, list), is_class=True),
    **{("omegaconf.nodes", name): Known(partial(_node, "_val"), is_class=True) for name in _NODES},
    ("omegaconf.base", "UnionNode"): Known(partial(_node, "_content"), is_class=True),
    ("omegaconf.base", "Metadata"): Known(partial(_metadata, "Metadata"), is_class=True),
    ("omegaconf.base", "ContainerMetadata"): Known(partial(_metadata, "ContainerMetadata"), is_class=True),
}
