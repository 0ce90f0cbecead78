"""Called by the job scripts of a sweep: a member's arguments, or the table of all members.

python -m agrpo_megatron.launch DIR I         the arguments of `agrpo train` for member I:
                                              FILE and KEY=VALUE ..., each ended by a NUL;
                                              the last is run.dir=DIR/NN
python -m agrpo_megatron.launch DIR --table   writes DIR/summary.md and summary.json, and
                                              prints the table
"""

import argparse
import os
import sys
from pathlib import Path

from agrpo_megatron.launch.sweep import read_sweep


def main(argv: list[str] | None = None) -> int:
    """Print a member's arguments, or write and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m agrpo_megatron.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="directory of a sweep")
    parser.add_argument("member", metavar="I", type=int, nargs="?", help="number of a member")
    parser.add_argument("--table", action="store_true", help="write and print the table")
    arguments = parser.parse_args(argv)
    if arguments.table == (arguments.member is not None):
        parser.error("give either I or --table")
    directory = arguments.directory.absolute()
    try:
        if arguments.table:
            from agrpo_megatron.launch.table import show_table  # a member's job does not need it

            show_table(directory)
            return 0
        sweep = read_sweep(directory)
        names = list(sweep.members)
        if not 0 <= arguments.member < len(names):
            raise ValueError(f"{directory} has members 0 to {len(names) - 1}")
        words = sweep.arguments(directory, names[arguments.member])
    except ValueError as error:
        print(f"agrpo: error: {error}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
