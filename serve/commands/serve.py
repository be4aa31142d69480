"""`bespoke serve`: the gateway and its engines, until interrupted."""

from contextlib import ExitStack
from typing import Annotated

import typer

from serve.commands.common import HomeOption, ProfileOption, console, interrupted, settings_of
from serve.settings import Settings

app = typer.Typer()


@app.command()
def serve(
    home: HomeOption = None,
    config: ProfileOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; the default is loopback.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    base: Annotated[list[str] | None, typer.Option(help="A base to serve; may be repeated.")] = None,
) -> None:
    """Serve the models of the home folder. Ready means that a chat request works. Ctrl-C stops all of it."""
    run(settings_of(home, config, host=host, port=port, bases=base or None))


def run(settings: Settings) -> None:
    from serve.deployment.local import LocalService

    with ExitStack() as running:
        with console.status(f"starting vLLM with {', '.join(settings.bases)} (about a minute) …"):
            service = running.enter_context(LocalService(settings))
        stop = interrupted()  # after the start: ray.init puts a SIGTERM handler of its own in place
        console.print(f"Ready: [bold]{service.url}/v1[/]  (Ctrl-C stops it)")
        stop.wait()
        console.print("Stopping …")
