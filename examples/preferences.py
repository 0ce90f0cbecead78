"""Write preference pairs for examples/preferences.yaml: two right answers, one of which is liked.

    python examples/preferences.py runs/pairs          writes train.jsonl and eval.jsonl

The problems are those of examples/tiny.yaml, six sums at once. Chosen answers have the smaller
number of each sum first. Rejected ones are right as well, but mix the orders.
"""

import json
import random
import sys
from pathlib import Path

from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.tasks import build_task
from agrpo_megatron.tasks.base import SPLITS

COUNT = {"train": 4000, "eval": 256}


def ordered(sum_: str, *, is_swapped: bool) -> str:
    """Return a sum with the smaller number first, or swapped; a difference has one order."""
    a, sign, b = sum_
    if sign == "-":
        return sum_
    first, second = sorted((a, b), reverse=is_swapped)
    return f"{first}+{second}"


def main(folder: Path) -> None:
    """Write both files."""
    task = build_task(load(Settings, Path(__file__).with_name("tiny.yaml")).task)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    for split in SPLITS:
        rows = []
        for problem in task.problems(split):
            sums = problem.solution.split(" ")
            chosen = " ".join(ordered(s, is_swapped=False) for s in sums)
            rejected = " ".join(ordered(s, is_swapped=rng.random() < 0.5) for s in sums)
            if rejected != chosen:
                prompt = task.prompt(problem)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        lines = [json.dumps(row) + "\n" for row in rows[: COUNT[split]]]
        (folder / f"{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
