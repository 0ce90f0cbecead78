"""Compare layouts on several GPUs of one machine with one GPU; write a JSON file and a table.

    tools/gpus_check.sh                                   run this: it installs what is missing
    python tools/gpus_check.py --gpus 4 --out DIR         the check alone
    python tools/gpus_check.py --rehearse                 tiny, on 2 CPU ranks over gloo

Each row runs in float32 at a small size, where only the order of sums may differ from one GPU, and
in bf16 with 4 of LLaDA-8B's layers. Rows with the same number of GPUs share their processes; one
that fails does not take the others along. Rows that do not fit into --seconds are cut, from the
end, and reported. DIR gets gpus_check.json, gpus_check.md and gpus_check.log; the first two are
rewritten after each row. Exit status: tools/gpus_check.sh --help.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_processes import append_result, run_tasks
from gpu_record import ROOT, Record, begin, write
from gpus_report import SCHEMA, finish, table
from gpus_rows import ALONE, ROWS, Row, by_ranks

NAME, LOG = "gpus_check.json", "gpus_check.log"


def main() -> int:
    """Measure as much as the time allows and record it; returns the exit status."""
    arguments = _arguments()
    if arguments.row:
        return _measure(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [
        row for row in ROWS if not arguments.only or row.name in (ROWS[0].name, *arguments.only)
    ]
    record = begin(
        schema=SCHEMA,
        is_rehearsal=arguments.rehearse,
        commit=arguments.commit,
        command=arguments.command,
    )
    record |= {
        "gpus": arguments.gpus,
        "ranks": {row.name: row.ranks for row in rows},
        "planned": [row.name for row in rows],
        "rows": {},
    }
    with tempfile.TemporaryDirectory(prefix="gpus-check-") as folder:
        for ranked in by_ranks(rows):
            record = _run(ranked, record, arguments, Path(folder))
    print((arguments.out / NAME).with_suffix(".md").read_text(), end="")
    return record["verdict"]["status"]


def _run(
    rows: tuple[Row, ...], record: Record, arguments: argparse.Namespace, folder: Path
) -> Record:
    """Run rows of one number of ranks, and return the record with their results."""
    ranks = rows[0].ranks

    def left() -> float:
        return arguments.seconds - (time.monotonic() - arguments.started)

    def start(names: list[str], results: Path) -> list[subprocess.Popen]:
        with (arguments.out / LOG).open("a") as log:
            print(f"\n== {ranks} ranks: {', '.join(names)}", file=log)
        port = _free_port()
        return [
            _start(names, (rank, ranks, port), results, arguments, folder) for rank in range(ranks)
        ]

    if ranks > arguments.gpus:
        found = ((row.name, {"needs": f"needs {ranks} GPUs"}) for row in rows)
    elif ranks > 1 and "fp32" not in record["rows"][ALONE]:
        why = f"cut: the row `{ALONE}` gave nothing to compare with"
        found = ((row.name, {"cut": why}) for row in rows)
    else:
        patience = 10 if arguments.rehearse else 1
        found = run_tasks(rows, start, left=left, log=LOG, patience=patience)
    for name, result in found:
        record["machine"].update(result.pop("machine", {}))
        record["rows"][name] = result
        record["seconds"] = round(time.monotonic() - arguments.started, 1)
        record = finish(record)
        write(record, arguments.out / NAME, table)
    return record


def _start(
    names: list[str],
    place: tuple[int, int, int],
    results: Path,
    arguments: argparse.Namespace,
    folder: Path,
) -> subprocess.Popen:
    """Start the process of one rank; `place` is its rank, their number, and their port."""
    rank, ranks, port = place
    command = [sys.executable, __file__, "--results", str(results), "--folder", str(folder)]
    command += [word for name in names for word in ("--row", name)]
    command += ["--rehearse"] if arguments.rehearse else []
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "PYTHONPATH": path, **{k: str(v) for k, v in variables.items()}}
    if arguments.rehearse:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with (arguments.out / LOG).open("a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _measure(arguments: argparse.Namespace) -> int:
    """Run as one rank of some rows: the first rank appends each result to a file as a line."""
    from gpus_measure import measure

    from agrpo_megatron.megatron.parallel import stop_ranks

    rows = {row.name: row for row in ROWS}
    for name in arguments.row:
        result = measure(rows[name], arguments.folder, is_rehearsal=arguments.rehearse)
        if os.environ["RANK"] == "0":
            append_result(arguments.results, name, result)
    stop_ranks()
    return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpus_check"), metavar="DIR")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="GPUs to use (2)")
    parser.add_argument("--seconds", type=float, default=460.0, help="time for all of it (460)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="these rows, and the one they need"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny, on CPU ranks; measures nothing"
    )
    parser.add_argument("--commit", help="the checked commit, without git")
    parser.add_argument("--command", help="the command that started this")
    # Of the process of a rank:
    parser.add_argument("--row", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(namespace=argparse.Namespace(started=time.monotonic()))


if __name__ == "__main__":
    sys.exit(main())
