"""What a client may ask for: the body of a request, and the request that a pipeline is asked to draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import RequestError

Size = Annotated[int, Field(ge=1, le=1 << 16)]


class Body(BaseModel):
    """The JSON of a request. What is left out is the pipeline's own default; a seed, drawn at random."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    prompt: str | None = Field(None, max_length=8000, description="What to draw, for a base that reads text.")
    label: int | str | None = Field(None, alias="class", description="What to draw, for a base of classes.")
    negative_prompt: str | None = Field(None, max_length=8000, description="What not to draw.")
    adapters: dict[str, float] = Field(default_factory=dict, description="Weight of each adapter.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Seed of the noise.")
    steps: int | None = Field(None, ge=1, description="Sampling steps.")
    guidance: float | None = Field(None, ge=0, le=100, description="Guidance scale; 1 or less turns guidance off.")
    size: Size | list[Size] | None = Field(None, description="Pixels of a side, or [height, width].")
    output: Literal["png", "base64"] = Field("png", description="A PNG, or JSON with the PNG as base64.")
    stream: bool = Field(False, description="Answer with server-sent events: progress, then the image as base64.")
    timeout: float | None = Field(None, gt=0, description="Seconds to wait at most; the server may allow less.")
    id: str | None = Field(None, pattern=r"^[\w-]{1,64}$", description="Name to cancel the request by.")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for at most.

    Args:
        steps: Sampling steps.
        side: Pixels of a side.
        adapters: Adapters.
    """

    steps: int = 150
    side: int = 2048
    adapters: int = 8


LIMITS = Limits()


@dataclass(frozen=True)
class Request:
    """One image to draw, checked and complete: the same request gives the same image.

    Args:
        condition: Prompt or id of a class.
        seed: Seed of the noise.
        steps: Sampling steps.
        guidance: Guidance scale, or None for a pipeline that takes none.
        size: (height, width) in pixels, or None for the pipeline's own.
        negative: Negative prompt.
        adapters: Weight w_i of each adapter.
    """

    condition: str | int
    seed: int
    steps: int
    guidance: float | None
    size: tuple[int, int] | None = None
    negative: str = ""
    adapters: tuple[tuple[str, float], ...] = ()

    def described(self) -> dict[str, Any]:
        """What is written beside the image."""
        what = {"prompt" if isinstance(self.condition, str) else "class": self.condition}
        what |= {"negative_prompt": self.negative} if self.negative else {}
        return what | {
            "seed": self.seed,
            "steps": self.steps,
            "guidance": self.guidance,
            "size": None if self.size is None else list(self.size),
            "adapters": dict(self.adapters),
        }


def sentence(errors: list[Any]) -> str:
    """One sentence of what a validation of a `Body` found first."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return f"The body is not JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}."
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        allowed = [field.alias or name for name, field in Body.model_fields.items()]
        return f"{where!r} is not a field of a request; these are: {', '.join(allowed)}."
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:77]}..."
    return f"{where or 'The body'}: {first['msg'][:1].lower()}{first['msg'][1:]}; got {given}."


def chosen_adapters(adapters: dict[str, float], limits: Limits) -> tuple[tuple[str, float], ...]:
    """The adapters that have an effect, in an order that does not depend on the client's."""
    chosen = tuple(sorted((name, weight) for name, weight in adapters.items() if weight))
    if len(chosen) > limits.adapters:
        raise RequestError(f"A request may use {limits.adapters} adapters at most; got {len(chosen)}.")
    return chosen
