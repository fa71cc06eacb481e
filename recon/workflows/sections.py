"""Sections of a workflow file made from dataclasses, so that a sampler's fields are its section.

``MMPS(steps=100, grid=Karras(rho=7))`` reads ``{method: mmps, steps: 100, grid: {kind: Karras, rho: 7}}``: the method is the
class name in lower case; a field that holds one of a family of dataclasses (subclasses in the family's module, or where there
are none, those of other modules) names its ``kind``, or is that name alone when nothing else is set; a field that holds a
dataclass without a family is a plain section.
What a section leaves out is as in the sampler's own default: with ``MMPS``, ``cg: {iterations: 9}`` keeps the tolerance.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, create_model, model_validator

from recon.workflows.fields import Items, Section, Whole, one_of


class Made(Section):
    """A section that stands for a dataclass."""

    makes: ClassVar[type]

    def build(self) -> Any:  # noqa: ANN401  (an instance of ``makes``)
        """The dataclass instance.  Raises InputError when it refuses its values."""
        names = [f.name for f in dataclasses.fields(self.makes)]
        return self.makes(**{name: _built(getattr(self, name)) for name in names})

    @model_validator(mode="after")
    def _accepted(self) -> Made:
        self.build()
        return self


@cache
def sampler_model(cls: type) -> type[Made]:
    """The section of a sampler class: ``method`` and one key per field.

    Raises TypeError for a field whose type has no form in a file.
    """
    return _model(cls, {"method": cls.__name__.lower()})


def sampler_section(methods: Mapping[str, type]) -> Any:  # noqa: ANN401
    """The type of the ``sampler`` section, given the sampler classes by method name."""
    return one_of("method", {name: sampler_model(cls) for name, cls in methods.items()})


def _model(cls: type, marks: Mapping[str, str]) -> type[Made]:
    """A section with the fields of ``cls`` and, first, the keys that say which class it is."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, Any] = {name: (Literal[value], ...) for name, value in marks.items()}
    for field in dataclasses.fields(cls):
        annotation, default = _annotation(hints[field.name], f"{cls.__name__}.{field.name}"), _default(field)
        if isinstance(default, Made):
            annotation = Annotated[annotation, BeforeValidator(partial(_completed, default.model_dump()))]
        keys[field.name] = (annotation, default)
    made = create_model(cls.__name__, __base__=Made, __doc__=cls.__doc__, __module__=__name__, **keys)
    made.makes = cls
    return made


def _annotation(hint: Any, where: str) -> Any:  # noqa: ANN401
    """What a file may hold for a dataclass field of type ``hint``."""
    if hint is int:
        return Whole
    if hint in (float, bool, str) or get_origin(hint) is Literal:
        return hint
    if hint is type(None):
        return None
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_annotation(h, where) for h in get_args(hint))]  # noqa: UP007  (made from a tuple)
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return Annotated[tuple[_annotation(get_args(hint)[0], where), ...], Items]  # type: ignore[misc]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        family = _family(hint) or _leaves(hint)
        return one_of("kind", {c.__name__: _part(c) for c in family}, shorthand=True) if family else _part(hint)
    raise TypeError(f"{where} has type {hint}, which a workflow file cannot hold; see recon/workflows/sections.py")


@cache
def _part(cls: type) -> type[Made]:
    base = next((b for b in cls.__mro__[1:] if dataclasses.is_dataclass(b)), None)
    return _model(cls, {"kind": cls.__name__} if base else {})


def _family(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    below = [c for child in children for c in (child, *_family(child))]
    return [c for c in below if c.__module__ == cls.__module__]


def _leaves(cls: type) -> list[type]:
    """Classes of recon below ``cls`` that nothing is derived from, by name: the family of a contract kept in many files."""
    children: list[type] = cls.__subclasses__()
    found = {c for child in children for c in (_leaves(child) or [child]) if c.__module__.startswith("recon.")}
    return sorted(found, key=lambda c: c.__name__)


def _default(field: dataclasses.Field[Any]) -> Any:  # noqa: ANN401
    if field.default is not dataclasses.MISSING:
        return _stated(field.default)
    return ... if field.default_factory is dataclasses.MISSING else _stated(field.default_factory())


def _completed(default: dict[str, Any], given: Any) -> Any:  # noqa: ANN401
    """A section with what it leaves out taken from ``default``, when it is of the same kind."""
    same = isinstance(given, dict) and given.get("kind", default.get("kind")) == default.get("kind")
    return {**default, **given} if same else given


def _stated(value: Any) -> Any:  # noqa: ANN401
    """A dataclass instance as its section; anything else as it is."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    model = _part(type(value))
    values: dict[str, Any] = {"kind": type(value).__name__} if "kind" in model.model_fields else {}
    values |= {f.name: _stated(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return model.model_construct(None, **values)


def _built(value: Any) -> Any:  # noqa: ANN401
    return value.build() if isinstance(value, Made) else value
