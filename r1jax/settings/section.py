"""The base of every section of a config, and the error of a setting that cannot be used."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class SettingError(ValueError):
    """A setting that cannot be used as the data or a model is.

    key: of the setting, dotted, in its section. problem: what is wrong, and the remedy.
    """

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key}: {problem}")


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    # A validator takes long to make. It is made when it is needed, together with those of the
    # sections inside; so defaults are made without one, by `model_construct`.
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), defer_build=True
    )

    FREE: ClassVar[frozenset[str]] = frozenset()
    """Settings that decide no result, and may change once a stage has begun."""
