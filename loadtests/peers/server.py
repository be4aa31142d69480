"""What the bench knows of a server that it measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """One running server that answers OpenAI's chat completions on loopback."""

    name: str
    url: str  # without /v1
    key: str
    model: str  # the bare base
    root_pid: (
        int  # it and its descendants are the server's processes; a proxy's do not include what is behind it
    )
    leaves_out: str  # one sentence: what ours does for each request and this one does not
    adapters: tuple[str, ...] = ()  # model names of the adapters, in the order in which they were given

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model, *self.adapters)
