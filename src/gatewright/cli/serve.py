"""What ``gatewright serve`` does: a local page to try a trained model on."""

import signal
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.cli.predict import experts_asked
from gatewright.report.server import Server
from gatewright.tasks import LanguageModel, generate
from gatewright.train import Trained, load_run

NUM_BYTES, TEMPERATURE = 200, 0.7
"""How a language model writes on."""


@dataclass(frozen=True)
class ServeArguments:
    """Serve a local page to try a run's model on: an image or a text in, the answer and the experts asked out.

    Args:
        run: The run's folder, or an exported file.
        host: Address to listen on. Others than this machine reach the page only where this is not a loopback address,
            and nothing keeps them out then.
        port: Port to listen on; 0 takes one that is free.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    host: str = "127.0.0.1"
    port: int = 8000


def serve_command(words: list[str]) -> None:
    """Serve the page until Ctrl-C."""
    refuse_unknown_flags(words, ["--host", "--port"])
    arguments = parse(ServeArguments, words, prog="gatewright serve")
    if not 0 <= arguments.port < 65536:
        raise ValueError(f"--port is a number from 0 to 65535; got {arguments.port}.")
    trained = load_run(arguments.run)
    title = f"{trained.config.recipe}: {arguments.run}"

    def answer(upload: bytes) -> Mapping[str, Any]:
        return answered(trained, upload)

    host, port = arguments.host, arguments.port
    for stop in (signal.SIGINT, signal.SIGTERM):  # A shell has programs in the background ignore the first one.
        signal.signal(stop, signal.default_int_handler)
    with Server(answer, title=title, item=trained.task.item, host=host, port=port) as server:
        try:
            print(f"Serving {arguments.run} at {server.address} until Ctrl-C.", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("Stopped.")


@torch.inference_mode()
def answered(trained: Trained, upload: bytes) -> dict[str, Any]:
    """Return what a model makes of an upload, and which experts it asked.

    Raises:
        ValueError: If it is nothing that the model can read.
    """
    if isinstance(trained.task, LanguageModel):
        context = trained.fingerprint["context"]
        written = generate(trained.model, upload, NUM_BYTES, context=context, temperature=TEMPERATURE)
        found: dict[str, Any] = {"text": (upload + b"".join(written)).decode(errors="replace")}
    else:
        found = _predicted(trained, upload)
    return {**found, "experts": experts_asked(trained.model)}


def _predicted(trained: Trained, upload: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "upload"
        file.write_bytes(upload)
        try:
            return trained.task.predict(trained.model, file, trained.fingerprint, top=5)
        except ValueError as error:
            raise ValueError(
                f"This file of {len(upload):,} bytes cannot be read as an {trained.task.item}. Choose another, such as "
                "a PNG or JPEG file."
            ) from error
