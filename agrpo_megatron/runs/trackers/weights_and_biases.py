"""Metrics in wandb, online or offline."""

import netrc
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.files import write_whole
from agrpo_megatron.runs.trackers import named_scalars

KEY_LENGTH = 40  # characters of wandb's shortest key
SENT = "wandb_steps"  # holds how many lines of metrics wandb has, as attempts that ended know it


def check_wandb(settings: Settings) -> None:
    """Check that a run can log in to wandb, where it is online.

    Raises:
        ValueError: it cannot.
    """
    if settings.logging.wandb != "online":
        return
    import wandb

    problem = "there is no valid API key"
    try:
        known = wandb.setup().settings
        host, place = urlsplit(known.base_url).netloc, os.environ.get("NETRC", "~/.netrc")
        if len(known.api_key or "") >= KEY_LENGTH or known.identity_token_file:
            return
        hosts = [host, "api.wandb.ai"][: 1 + host.endswith("coreweave.com")]  # wandb's own, both
        if any(map(netrc.netrc(os.path.expanduser(place)).authenticators, hosts)):
            return
    except (wandb.Error, ValueError, OSError, netrc.NetrcParseError) as error:
        problem = f"{problem}: {' '.join(str(error).split())}"
    raise ValueError(
        f"logging.wandb=online cannot log in: {problem}; run `wandb login`, set WANDB_API_KEY, or "
        "use logging.wandb=offline"
    )


class Wandb:
    """One run of wandb over all attempts; the step of a line is its index in metrics.jsonl.

    Args:
        known: the id of the wandb run, from a checkpoint; None for a new run.
    """

    def __init__(self, directory: Path, settings: Settings, *, known: str | None):
        self._run = _start(directory, settings, known=known)
        self._file = directory / SENT
        sent = self._file.read_text(encoding="utf-8") if self._file.exists() else "0"
        self._sent = int(sent)
        for phase in ("sft", "rl", "eval"):  # the x-axis that charts begin with
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/iteration")

    @property
    def id(self) -> str:
        """Return the id of the wandb run."""
        return self._run.id

    def restart(self, kept: Sequence[dict[str, Any]]) -> None:
        """Send what a killed attempt may not have written of the lines that a resume keeps."""
        for index, record in enumerate(kept):
            self.send(index, record)

    def send(self, index: int, record: dict[str, Any]) -> None:
        """Send a line, unless wandb has it."""
        if index < self._sent:
            return
        self._sent = index + 1
        self._run.log(named_scalars(record), step=index, commit=True)

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._run.alert(title=title, text=text, level="WARN")

    def close(self) -> None:
        """Let wandb write its data."""
        self._run.finish()
        write_whole(self._file, str(self._sent))


def _start(directory: Path, settings: Settings, *, known: str | None) -> Any:
    """Start wandb, under the id of an earlier attempt if there was one."""
    logging = settings.logging
    import wandb

    id_file = directory / "wandb_id"
    if not id_file.exists():
        write_whole(id_file, known or secrets.token_hex(4))
    start: Callable[..., Any] = partial(
        wandb.init,
        project=logging.project,
        name=logging.name or directory.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(directory),
        config=asdict(settings),
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        return start(mode=logging.wandb)  # type: ignore[arg-type]
    except wandb.Error as error:
        if logging.wandb != "online":
            raise
        reason = " ".join(str(error).split())
        print(f"warning: wandb is offline in this attempt ({reason})", file=sys.stderr)
        return start(mode="offline")
