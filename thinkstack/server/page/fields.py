"""Fields of the page's requests: text that every database can hold, and ids."""

from typing import Annotated

from fastapi import Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr


class Body(BaseModel):
    """A body without other fields."""

    model_config = ConfigDict(extra="forbid")


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("contains a NUL character, so it is not text; remove it, or attach a text file")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("contains half a surrogate pair") from error
    return text


Text = Annotated[StrictStr, AfterValidator(_check_text)]
"""Text that PostgreSQL and UTF-8 can hold."""
Name = Annotated[Text, Field(max_length=255)]
Secret = Annotated[Text, Field(max_length=2048)]
"""A password, key or invitation."""
PathId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""An id or token in the path."""
Id = Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
