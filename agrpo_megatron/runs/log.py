"""The files of a run: metrics, samples, resolved settings; and wandb."""

import json
import netrc
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agrpo_megatron.config.schema import to_yaml
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.files import check_folder, write_whole

METRICS, SAMPLES, NOTES = "metrics.jsonl", "samples.jsonl", "notes.txt"
KEY_LENGTH = 40  # characters of wandb's shortest key
SECONDS = "totals/seconds"  # a metric of every line
SENT = "wandb_steps"  # holds how many lines of metrics wandb has, as attempts that ended know it


def check_log(settings: Settings) -> None:
    """Check, before any rank starts, that a run can write its folder and log in to wandb.

    Raises:
        ValueError: it cannot.
    """
    check_folder(Path(settings.run.dir), key="run.dir")
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


class RunLog:
    """Append-only logs of a run, written by the main rank; calls on other ranks do nothing.

    A checkpoint records the lengths of the files. A resumed run truncates the files to them, so
    no iteration is logged twice.

    Args:
        started: when this attempt began, by `time.monotonic`; None: now.
        check: called before anything is written; raises if this attempt must not write.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: Settings,
        is_main: bool,
        wandb_id: str | None = None,
        started: float | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.directory, self.check = directory, check
        self._files: dict[str, Any] = {}
        self._wandb: Any = None
        self._lines = self._sent = 0  # of metrics: in the file, and of those in wandb
        self._started = time.monotonic() if started is None else started
        if not is_main:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # Before the file is cut back: iterations that are lost took time as well.
        self._started -= (_last_line(directory / METRICS) or {}).get(SECONDS, 0.0)
        for name in (METRICS, SAMPLES):
            self._files[name] = (directory / name).open("a", encoding="utf-8")
        write_whole(directory / "config.yaml", to_yaml(settings))
        self._wandb = _start_wandb(directory, settings, known=wandb_id)
        if (directory / SENT).exists():
            self._sent = int((directory / SENT).read_text(encoding="utf-8"))

    def metrics(self, record: dict[str, Any]) -> None:
        """Write one line of metrics and send it to wandb, under its phase's name.

        The seconds of this attempt and of earlier ones up to their last line are added.
        """
        record = {**record, SECONDS: time.monotonic() - self._started}
        self._append(METRICS, record)
        self._lines += 1
        self._send(record)

    def first_values(self, phase: str, key: str, *, iterations: int) -> dict[int, float]:
        """Return a metric of a phase's first iterations, as logged; empty on other ranks."""
        found: dict[int, float] = {}
        if not self._files or not iterations:
            return found
        with (self.directory / METRICS).open(encoding="utf-8") as file:
            for record in map(json.loads, file):
                if record["phase"] == phase and record["iteration"] <= iterations:
                    found[record["iteration"]] = record[key]
        return found

    def last(self, phase: str) -> dict[str, Any]:
        """Return the last line of metrics of a phase; empty without one, and on other ranks."""
        return (_last_line(self.directory / METRICS, phase) if self._files else None) or {}

    def samples(self, records: list[dict[str, Any]], **common: Any) -> None:
        """Write completion samples, one line each."""
        for record in records:
            self._append(SAMPLES, {**common, **record})

    def notes(self, lines: Sequence[str]) -> None:
        """Write notes on the run's problems; each attempt replaces the file."""
        if self._files and lines:
            (self.directory / NOTES).write_text("\n".join([*lines, ""]), encoding="utf-8")

    def alert(self, title: str, text: str) -> None:
        """Send an alert through wandb."""
        if self._wandb is not None:
            self._wandb.alert(title=title, text=text, level="WARN")

    @property
    def wandb_id(self) -> str | None:
        """Return the wandb run's id; None if wandb is off, and on other ranks."""
        return self._wandb.id if self._wandb is not None else None

    def offsets(self) -> dict[str, int]:
        """Return the length of each file, in bytes."""
        return {name: file.tell() for name, file in self._files.items()}

    def cut_back(self, offsets: dict[str, int]) -> None:
        """Truncate the files to their lengths at a checkpoint."""
        for name, file in self._files.items():
            file.truncate(min(offsets.get(name, 0), file.seek(0, os.SEEK_END)))
            file.seek(0, os.SEEK_END)
        if self._wandb is not None:
            kept = (self.directory / METRICS).read_text(encoding="utf-8").splitlines()
            self._lines = 0
            for line in kept:
                self._lines += 1
                self._send(json.loads(line))  # what a killed attempt may not have written

    def close(self) -> None:
        """Close the files and wandb."""
        for file in self._files.values():
            file.close()
        if self._wandb is not None:
            self._wandb.finish()
            write_whole(self.directory / SENT, str(self._sent))

    def _send(self, record: dict[str, Any]) -> None:
        """Send the newest line to wandb, unless wandb has it; a step is the index of a line."""
        if self._wandb is None or self._lines <= self._sent:
            return
        phase, self._sent = record["phase"], self._lines
        named = {f"{phase}/{key}": value for key, value in scalars(record).items()}
        self._wandb.log(named, step=self._lines - 1, commit=True)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if name in self._files:
            self.check()
            self._files[name].write(json.dumps(record) + "\n")
            self._files[name].flush()


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of metrics without its phase, each list as `NAME/0`, `NAME/1`, ...

    A missing value of a list is left out.
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, list):
            found |= {f"{key}/{n}": part for n, part in enumerate(value) if part is not None}
        elif key != "phase":
            found[key] = value
    return found


def _last_line(path: Path, phase: str | None = None) -> dict[str, Any] | None:
    """Return the last whole line of metrics, of one phase if it is given; None without one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in reversed(lines):
        with suppress(ValueError):  # truncated by a kill
            record = json.loads(line)
            if phase in (None, record["phase"]):
                return record
    return None


def _start_wandb(directory: Path, settings: Settings, *, known: str | None) -> Any:
    """Start wandb, under the id of an earlier attempt if there was one."""
    logging = settings.logging
    if logging.wandb == "disabled":
        return None
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
