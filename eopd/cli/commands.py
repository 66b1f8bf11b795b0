"""Commands of the program as lines for the shell, and what several of them share."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from eopd.config import RunConfig

EXIT_FAILED: Final = 1
EXIT_MISTAKEN: Final = 2  # by a mistake of the user
EXIT_INTERRUPTED: Final = 130

SET_EPILOG: Final = (
    "--set takes section.key=value; the value is YAML, and an item of a list is named by "
    "its number: --set learner.lr=1e-5 --set loss.gate=always --set "
    "teachers.0.temperature=0.7 --set 'rollout.vllm={max_num_seqs: 64}'. Every key is "
    "described in docs/configuration-reference.md (`eopd config docs` prints it); `eopd config show "
    "CONFIG` prints them all with their values."
)

ConfigFile = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, e.g. configs/tiny.yaml; docs/configuration-reference.md describes its "
        "keys."
    ),
]
RunPath = Annotated[Path, typer.Argument(help="A run directory, e.g. runs/NAME.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key; may be given more than once. See the end of this help.",
    ),
]
JobServer = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="The job server of a Ray cluster, e.g. http://HEAD:8265: the run is a job there, and "
        "RUN its id.",
    ),
]


def train_command(
    config: Path | str, overrides: Sequence[str], options: Sequence[str], verb: str = "train"
) -> str:
    """Returns ``eopd train``, or another verb with the same options, as a line for the shell."""
    settings = [part for override in overrides for part in ("--set", override)]
    return shlex.join(["eopd", verb, str(config), *settings, *options])


def job_again(run: Path) -> str:
    """Returns what continues a run whose config is gone with its job. A run of a sweep goes on with the
    sweep, which has no ``--resume``.
    """
    is_swept = (run.resolve().parent / "sweep.json").exists()
    return "this job, submitted again" + ("" if is_swept else " with --resume auto")


def place_of_moved(directory: Path, run: RunConfig) -> list[str]:
    """Returns the overrides by which the config of a run names the directory that it lies in now; none
    where it does so already.
    """
    here = directory.resolve()
    if run.path.resolve() == here:
        return []

    return [f"run.directory={here.parent}", f"run.name={here.name}"]
