"""What a client asked for, and who keeps what comes of it."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import sqlalchemy as sa

from serve.engine.base import Prompt, Sampling, Texts, Toolbox

if TYPE_CHECKING:
    from serve.generation import Generation


class Keeper(Protocol):
    """Whoever keeps a request's outcome does so in the very transactions that open and close its hold."""

    def claim(self, connection: sa.Connection, at: datetime) -> None:
        """With the hold. What it raises refuses the request, and nothing is held."""

    def keep(self, connection: sa.Connection, generation: "Generation") -> None:
        """With the settlement: `generation.answer` is complete, and paid for."""

    def release(self, connection: sa.Connection) -> None:
        """With the void, and with the settlement of what was cut short or could not be kept."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a client asked for, validated and bounded, in the gateway's own terms.

    With `whole` the answer is gathered (`Generation.answer`), which a `keeper` needs. A `persistent` one goes
    on when its client leaves, who will come back for the answer. `tier` is default or batch: at which of the
    plan's prices.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: Sampling
    length_param: str
    toolbox: Toolbox | None = None
    reasoning_effort: str | None = None
    whole: bool = False
    keeper: Keeper | None = None
    persistent: bool = False
    tier: str = "default"

    @property
    def choices(self) -> int:
        prompts = len(self.prompt.prompts) if isinstance(self.prompt, Texts) else 1
        return prompts * self.sampling.n
