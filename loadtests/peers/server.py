"""Describes a running server that the bench measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """Names a server that answers OpenAI's chat completions on loopback.

    `root_pid` and its descendants are the server's processes; for a proxy they leave out the server behind
    it. `leaves_out` says in one sentence what ours does for each request and this one does not. `adapters`
    are model names in the order in which they were given.
    """

    name: str
    url: str  # without /v1
    key: str
    model: str  # the base without an adapter
    root_pid: int
    leaves_out: str
    adapters: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *self.adapters)
