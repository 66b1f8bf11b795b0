"""The base of every config section."""

from pydantic import BaseModel, ConfigDict

JsonScalar = str | int | float | bool | None
NativeOptions = dict[str, object]


class Section(BaseModel):
    """Frozen; an unknown key is an error, never ignored; defaults are checked like values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
