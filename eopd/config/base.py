"""The base of every config section."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

NativeOptions = dict[str, object]

# Absolute from here on: actors may run in another working directory. ``~`` is the home directory.
AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]


class Section(BaseModel):
    """Frozen; an unknown key is an error, never ignored; defaults are checked like values."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
