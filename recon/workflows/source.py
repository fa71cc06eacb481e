"""YAML with a memory for where things stand.

A definition file is a mapping of names to values.  This reader takes the part of YAML that means one thing only:

* numbers: ``100``, ``-3``, ``0.5``, ``1e5``, ``1e-3``, ``1.0E+5``, ``.inf``, ``.nan``;
* ``true``, ``false`` and ``null`` (also ``True``, ``TRUE``, ``~`` and nothing at all);
* everything else is text: ``no``, ``off``, ``y``, ``012``, ``0x10``, ``1_000``, ``12:30:00``, ``2026-03-02``, ``<<``.

A key given twice, a key that is not text, an anchor, a tag and a second document are errors, because a reader would see one
thing and the program another.  Every key path keeps its line and column (or the override that set it), so that whoever finds
a value wrong can say where it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from recon.errors import InputError

KeyPath = tuple[str | int, ...]

_LONGEST = 4 << 20  # bytes; a definition is a page of text, so anything longer is some other file


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows only the scalars of this module's first paragraph."""

    yaml_implicit_resolvers: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(
                None, None, f"tags such as {event.tag} are not read here", event.start_mark
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this module or any other YAML reader would take for something else; short sections take one line."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:  # noqa: ANN401
        simple = not any(isinstance(v, dict | list) for v in mapping.values())
        return super().represent_mapping(tag, mapping, simple and len(str(mapping)) < 80)

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401
        return True


_FLOAT = re.compile(
    r"^(?:[-+]?(?:0|[1-9][0-9]*|(?=\.[0-9]))(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:[tT]rue|TRUE|[fF]alse|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Place:
    """Where a key and its value stand: lines and columns counted from 1, or the override that set them."""

    key: tuple[int, int]
    value: tuple[int, int]
    override: str = ""


@dataclass(frozen=True)
class Source:
    """What a definition file says, and where.

    name: of the file, as the user gave it.  data: plain dicts, lists and scalars.  places: key path -> Place.
    """

    name: str
    data: dict[str, Any]
    places: Mapping[KeyPath, Place]

    def where(self, path: KeyPath, of: str = "value") -> str:
        """``FILE:LINE:COL`` of the key or value at ``path``, or of the closest section around it; or the override's text."""
        for n in range(len(path), -1, -1):
            place = self.places.get(tuple(path[:n]))
            if place is not None:
                line, column = place.key if of == "key" and n == len(path) else place.value
                return place.override or f"{self.name}:{line}:{column}"
        return self.name

    def overridden(self, overrides: Iterable[str]) -> Source:
        """The same with ``a.b=value`` set in turn, values read as YAML.  Raises InputError naming the override."""
        source = self
        for text in overrides:
            source = _override(source, text)
        return source


def read_source(path: Path) -> Source:
    """The definition in a YAML file.

    Raises InputError when there is no such file, it is not UTF-8 text, empty, not a mapping, or outside the part of YAML
    described above; the text carries line and column.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > _LONGEST:
            raise InputError(f"{path}: this is no definition file, it has {path.stat().st_size} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a YAML file, this is a folder") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text; byte {error.start} is not ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_source(text, str(path))


def parse_source(text: str, name: str) -> Source:
    """The definition in ``text``; ``name`` stands for the file in messages.  Raises InputError as ``read_source``."""
    node = _compose(text, name)
    if node is None:
        raise InputError(f"{name}: expected keys and values, the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{name}:{_at(node)}: expected keys and values, this is {_kind(node)}")
    places: dict[KeyPath, Place] = {(): Place(_pair(node), _pair(node))}
    data = _build(node, name, (), places)
    return Source(name, data, places)


def _compose(text: str, name: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{name}{at}: not readable as YAML: {what}") from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise InputError(f"{name}: not readable as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InputError(f"{name}: not readable as YAML: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def _build(node: yaml.Node, name: str, path: KeyPath, places: dict[KeyPath, Place]) -> Any:  # noqa: ANN401
    """Plain data of ``node``; the place of every key path below it goes into ``places``."""
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else _kind(key)
                raise InputError(f"{name}:{_at(key)}: {dotted(path, 'top level')}: a key must be a name; got {shown}")
            here = (*path, key.value)
            if key.value in built:
                first = places[here].key
                raise InputError(f"{name}:{_at(key)}: {dotted(here)}: this key was already given in line {first[0]}")
            places[here] = Place(_pair(key), _pair(value))
            built[key.value] = _build(value, name, here, places)
        return built
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            places[(*path, i)] = Place(_pair(item), _pair(item))
            items.append(_build(item, name, (*path, i), places))
        return items
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:  # noqa: ANN401
    kind = node.tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return node.value.lower() == "true"
    if kind == "int":
        return int(node.value) if len(node.value) < 4000 else float(node.value)
    if kind == "float":
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return node.value


def _override(source: Source, text: str) -> Source:
    keys, equals, value = text.partition("=")
    label = f"--set '{text}'"
    if not equals or not all(keys.strip().split(".")):
        raise InputError(f"{label}: expected KEY=VALUE with the key as in the file, e.g. sampler.steps=50")
    path: KeyPath = tuple(int(k) if k.isdigit() else k for k in keys.strip().split("."))
    below: dict[KeyPath, Place] = {}
    node = _compose(value, label)
    built = None if node is None else _build(node, label, path, below)
    data = _replaced(source.data, path, built, source, label)
    places = {old: place for old, place in source.places.items() if old[: len(path)] != path}
    places |= {here: Place((1, 1), (1, 1), label) for here in (path, *below)}
    for n in range(1, len(path)):
        places.setdefault(path[:n], Place((1, 1), (1, 1), label))
    return replace(source, data=data, places=places)


def _replaced(data: Any, path: KeyPath, value: Any, source: Source, label: str, done: KeyPath = ()) -> Any:  # noqa: ANN401
    """A copy of ``data`` with ``value`` at ``path``; sections that are missing on the way are made."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or head >= len(data):
            raise InputError(
                f"{label}: {dotted(done)} is a list of {len(data)} at {source.where(done)}; "
                f"expected a position from 0, got {head!r}"
            )
        return [_replaced(v, rest, value, source, label, (*done, head)) if i == head else v for i, v in enumerate(data)]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InputError(
            f"{label}: {dotted(done)} is {data!r} at {source.where(done)}, not a section that could hold {head!r}"
        )
    return {**data, str(head): _replaced(data.get(str(head)), rest, value, source, label, (*done, str(head)))}


def to_yaml(data: Mapping[str, Any]) -> str:
    """``data`` as YAML text, in its order, that ``parse_source`` reads back to the same values."""
    return yaml.dump(
        dict(data), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )


def dotted(path: KeyPath, empty: str = "") -> str:
    """``problem.noise.counts``; list positions in brackets."""
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".") or empty


def _pair(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _at(node: yaml.Node) -> str:
    line, column = _pair(node)
    return f"{line}:{column}"


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a section" if isinstance(node, yaml.MappingNode) else "a list"
    return f"the value {node.value!r}"
