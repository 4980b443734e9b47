"""What ``gatewright generate`` does: have a language model write on."""

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.tasks import LanguageModel, generate
from gatewright.train import load_run


@dataclass(frozen=True)
class GenerateArguments:
    """Have the language model of a run write on from a prompt.

    Args:
        run: The run's folder.
        prompt: The beginning of the text.
        length: Number of bytes to write.
        temperature: Number that logits are divided by; below 1 likelier bytes are taken more often, and 0 takes the
            likeliest always.
        seed: Seed of the draws; another one draws other bytes.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    prompt: str = ""
    length: int = 400
    temperature: float = 0.7
    seed: int = 0


def generate_command(words: list[str]) -> None:
    """Print the prompt, and byte by byte what the model makes of it."""
    refuse_unknown_flags(words, ["--prompt", "--length", "--temperature", "--seed"])
    arguments = parse(GenerateArguments, words, prog="gatewright generate")
    if arguments.length < 0 or not arguments.temperature >= 0:  # which refuses nan, too
        raise ValueError(
            f"length and temperature are not negative; got {arguments.length} and {arguments.temperature}."
        )
    trained = load_run(arguments.run)
    if not isinstance(trained.task, LanguageModel):
        raise ValueError(f"generate takes the run of a language model; got one of the task {trained.config.task}.")
    print(arguments.prompt, end="")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for byte in generate(
        trained.model,
        arguments.prompt.encode(),
        arguments.length,
        context=trained.fingerprint["context"],
        temperature=arguments.temperature,
        seed=arguments.seed,
    ):
        print(decoder.decode(byte), end="", flush=True)
    print(decoder.decode(b"", final=True))
