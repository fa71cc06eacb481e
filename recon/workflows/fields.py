"""What the sections of a definition file are made of.

A section is frozen, refuses keys it does not know, and takes values as they are: a number is never made from text or from
true/false; only a whole number written as ``1e3`` counts as one.  Where a section can be of several kinds, one key says which
(``type``, ``reader``, ``method``, ``kind``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    """A mapping in a definition file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _whole(value: Any) -> Any:  # noqa: ANN401
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _items(value: Any) -> Any:  # noqa: ANN401
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, BeforeValidator(_whole)]
Items = BeforeValidator(_items)
Positive = Annotated[float, Field(gt=0)]


def one_of(key: str, models: Mapping[str, type[BaseModel]], shorthand: bool = False) -> Any:  # noqa: ANN401
    """The type of a section whose ``key`` says which of ``models`` it is.

    shorthand: a bare name stands for ``{key: name}``.
    """

    def spelt_out(value: Any) -> Any:  # noqa: ANN401
        return {key: value} if shorthand and isinstance(value, str) else value

    def tag(value: Any) -> str:  # noqa: ANN401
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        return f"<{name if isinstance(name, str) else ''}>"

    tag.__name__ = key  # an error of the union carries this name and the tags, nothing else
    members = tuple(Annotated[model, Tag(f"<{name}>")] for name, model in models.items())
    if len(members) == 1:
        return Annotated[next(iter(models.values())), BeforeValidator(spelt_out)]
    return Annotated[Union[members], Discriminator(tag), BeforeValidator(spelt_out)]  # noqa: UP007  (made from a tuple)


def reference(definition: Any, group: str) -> Any:  # noqa: ANN401
    """The type of a value that is a name or path in ``group`` (text), or the definition itself (a section)."""

    def tag(value: Any) -> str:  # noqa: ANN401
        return "<name>" if isinstance(value, str) else "<definition>" if isinstance(value, dict | BaseModel) else "<>"

    tag.__name__ = group
    return Annotated[Union[Annotated[str, Tag("<name>")], Annotated[definition, Tag("<definition>")]], Discriminator(tag)]  # noqa: UP007
