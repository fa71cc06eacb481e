"""Everything that is wrong with a definition file, in one message a person can act on.

Each line reads ``FILE:LINE:COL: key.path: what was expected; what came (did you mean ...?)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, Tag, TypeAdapter, ValidationError

from recon.errors import InputError
from recon.workflows.source import KeyPath, Source, dotted

_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
}


def validated(kind: Any, source: Source) -> Any:  # noqa: ANN401  (an instance of ``kind``, a type of sections)
    """``source`` as a ``kind``.  Raises InputError listing every key and value that does not fit, with its place."""
    try:
        return TypeAdapter(kind).validate_python(source.data)
    except ValidationError as error:
        problems = [_line(kind, source, e) for e in error.errors(include_url=False)]
        raise InputError("\n".join(dict.fromkeys(problems))) from error


def suggestion(wrong: Any, known: Iterable[Any]) -> str:  # noqa: ANN401
    """`` (did you mean 'views'?)`` when one of ``known`` is close to ``wrong``, else nothing."""
    by_lower = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(str(wrong).lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _line(model: Any, source: Source, error: Any) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    path: KeyPath = tuple(p for p in error["loc"] if not _is_tag(p))
    of = "value"
    if kind == "extra_forbidden":
        of = "key"
        known = _keys(model, error["loc"][:-1])
        text = f"unknown key{suggestion(path[-1], known)}; expected one of {', '.join(known)}"
    elif kind == "missing":
        text = "this key is missing"
    elif kind == "union_tag_invalid":
        path, text = _choice(path, given, context)
    elif kind in ("value_error", "assertion_error"):
        text = str(context.get("error", error["msg"]))
    else:
        text = f"expected {_expected(kind, context, error)}; got {shown(given)}{_close(kind, given, context)}"
    return f"{source.where(path, of)}: {dotted(path, 'top level')}: {text}"


def _choice(path: KeyPath, given: Any, context: Any) -> tuple[KeyPath, str]:  # noqa: ANN401
    """Path and text when no alternative of a union was meant; see ``fields`` for what pydantic carries here."""
    key = context["discriminator"].removesuffix("()")
    known = [tag.strip("'<>") for tag in context["expected_tags"].split(", ")]
    if known == ["name", "definition"]:
        return path, f"expected a name (see `recon list {key}`), a path or a definition; got {shown(given)}"
    options = ", ".join(known)
    if not isinstance(given, dict):
        return path, f"expected a section with {key}: one of {options}; got {shown(given)}"
    if key not in given:
        return (*path, key), f"this key is missing; expected one of {options}"
    return (*path, key), f"expected one of {options}; got {shown(given[key])}{suggestion(given[key], known)}"


def _expected(kind: str, context: Any, error: Any) -> str:  # noqa: ANN401
    if kind in _BOUNDS:
        key, sign = _BOUNDS[kind]
        return f"a number {sign} {context[key]:g}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}"
    if kind == "model_type":
        return "a section with keys of its own"
    if kind == "too_short":
        return f"at least {context['min_length']} items"
    if kind in _TYPES:
        return _TYPES[kind]
    return error["msg"].removeprefix("expected ").removeprefix("Input should be ")


def _close(kind: str, given: Any, context: Any) -> str:  # noqa: ANN401
    if kind != "literal_error":
        return ""
    return suggestion(given, [word.strip(" '") for word in context["expected"].replace(" or ", ",").split(",")])


def shown(value: Any) -> str:  # noqa: ANN401
    """A value as a user wrote it, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = "a section" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def _keys(annotation: Any, location: Sequence[str | int]) -> list[str]:  # noqa: ANN401
    """The keys that the section at ``location`` may have."""
    for part in location:
        members = _members(annotation)
        if isinstance(part, int):
            annotation = get_args(members[0][1])[0]
        elif _is_tag(part):
            annotation = next(m for tag, m in members if tag == part)
        else:
            section = next(m for _, m in members if isinstance(m, type) and issubclass(m, BaseModel))
            annotation = section.model_fields[part].annotation
    sections = [m for _, m in _members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
    return list(sections[0].model_fields) if sections else []


def _members(annotation: Any, tag: str | None = None) -> list[tuple[str | None, Any]]:  # noqa: ANN401
    """The alternatives of a type with their tags."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        tags = [e.tag for e in extra if isinstance(e, Tag)]
        return [(tags[0], inner)] if tags else _members(inner, tag)
    if (origin is not None and type(None) in get_args(annotation)) or origin is Union:
        return [m for a in get_args(annotation) if a is not type(None) for m in _members(a, tag)]
    return [(tag, annotation)]
