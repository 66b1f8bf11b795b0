"""``eopd show`` prints training responses that a run has kept."""

from typing import Annotated, Literal

import typer

from eopd.cli.commands import RunPath
from eopd.config import ConfigError


def show(
    run: RunPath,
    step: Annotated[
        int | None, typer.Option(min=1, help="Of which step; else the newest there are any of.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="ID", help="Those to this prompt alone.")
    ] = None,
    by: Annotated[
        Literal["entropy", "kl"],
        typer.Option(help="What the colours show: the teacher's entropy, or log p - log q."),
    ] = "entropy",
) -> None:
    """Print training responses with their rewards, coloured as in the report; telemetry.responses
    says which are kept.
    """
    from eopd.config.loss import HardGate
    from eopd.run.directory import RunDirectory
    from eopd.run.reading import read_rows
    from eopd.telemetry.responses import print_responses, responses_of

    directory = RunDirectory(run)
    config = directory.config()
    if not directory.responses.exists():
        if (kept := config.telemetry.responses) is not None:
            every = f"it keeps those of every {kept.every}th step"
            raise ConfigError(f"{run} has kept no responses yet; {every}")

        setting = "telemetry.responses: {every: 10}"
        raise ConfigError(f"{run} keeps no responses; set {setting}, also with --resume")

    rows = responses_of(read_rows(directory.responses), step=step, prompt=prompt)
    gate = config.loss.gate
    threshold = gate.tau if isinstance(gate, HardGate) else None
    print_responses(rows, threshold=threshold, shade=by)
