"""Check the estimators against golden numbers of their own public code.

    python tools/check_estimators.py DIR
    torchrun --nproc-per-node 2 tools/check_estimators.py DIR --parallel tp2

DIR holds a folder per method with `golden.json` (the model, the settings of each case, tolerances)
and `golden.safetensors` (masks, steps, older log-probs, results). Checked are the log-probs, the
advantages, the loss, every recorded gradient, and the norms of all gradients. One line per check;
exit status 1 when one fails, 2 for wrong arguments.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from agrpo_megatron.config.parallel import padded_vocab
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.diffusion.logprobs import LEAST
from agrpo_megatron.estimators.advantages import advantages
from agrpo_megatron.estimators.losses import bounds, in_units
from agrpo_megatron.estimators.objective import Tables, joint_inputs
from agrpo_megatron.megatron.engine import Engine
from agrpo_megatron.megatron.parallel import start_ranks, stop_ranks
from agrpo_megatron.training.scoring import score_tables
from agrpo_megatron.training.step import accumulate_gradients
from agrpo_megatron.training.update import Part, packed_part, with_loss, with_old_logprobs
from agrpo_megatron.types import TimestepBatch

sys.path.insert(0, str(Path(__file__).parent))
from checks import (  # noqa: E402 - of this folder
    Check,
    hf_gradients,
    open_engine,
    parse_arguments,
    report,
    settings_at,
)
from golden import below  # noqa: E402 - of this folder
from golden_estimators import METHODS, Case, Method, open_case  # noqa: E402 - of this folder
from golden_rows import Recorded  # noqa: E402 - of this folder

TOLERANCE = re.compile(
    r"log-probabilities (?P<logprob>[0-9.e-]+) .*losses (?P<relative>[0-9.e-]+) relative or "
    r"(?P<absolute>[0-9.e-]+) absolute, gradients (?P<gradient>[0-9.e-]+) of grad_norm"
)


@dataclass(frozen=True)
class Folder:
    """The record of one method."""

    name: str
    method: Method
    golden: dict[str, Any]
    tensors: dict[str, Tensor]
    model: Path
    limits: dict[str, float]

    def cases(self, device: torch.device) -> Iterator[tuple[str, Recorded]]:
        """Yield the name of each case, and what was recorded of it."""
        for number, case in enumerate(self.golden["cases"]):
            part = below(self.tensors, f"{number}.")
            there = {name: tensor.to(device) for name, tensor in part.items()}
            yield f"{self.name} {number}", Recorded(case, there)


def main() -> int:
    """Run all checks; returns the exit status."""
    arguments = parse_arguments(__doc__, directory="folder of recorded methods")
    try:
        folders = [_read(file) for file in sorted(arguments.directory.glob("*/golden.json"))]
        if not folders:
            raise ValueError(f"{arguments.directory}: no folder in it has a golden.json")
        settings = {
            folder.model: settings_at(folder.model, arguments.parallel, token_budget=2048)
            for folder in folders
        }
    except ValueError as error:
        return _refuse(error)
    first = settings[folders[0].model]
    ranks = start_ranks(first)
    engines = {model: open_engine(own, ranks, model) for model, own in settings.items()}
    checks = (
        check
        for folder in folders
        for check in check_folder(folder, engines[folder.model], settings[folder.model])
    )
    try:
        return report(checks, first, ranks, where=arguments.directory)
    except ValueError as error:
        return _refuse(error)
    finally:
        stop_ranks()


def check_folder(folder: Folder, engine: Engine, settings: Settings) -> Iterator[Check]:
    """Compare all cases of a method."""
    for name, recorded in folder.cases(engine.ranks.device):
        case = open_case(folder.method, recorded, folder.golden)
        own = replace(settings, algorithm=case.algorithm, sampling=case.sampling)
        part = packed_part(own, engine.ranks, case.rollout, case.rows)
        part = replace(part, old=_older(case, "old"), reference=_older(case, "ref"))
        is_first = part.old is None
        part = with_old_logprobs(engine.network, part, own, is_first=is_first)
        if "ref_all_logps" in recorded.tensors:
            part = replace(part, batches=_with_distributions(case, part, engine, own))
        for check in _check_scores(case, part, engine, own):
            yield replace(check, name=f"{name} {check.name}", limit=folder.limits["logprob"])
        part, loss = with_loss(engine, part, case.rollout, own, is_first=is_first)
        metrics = accumulate_gradients(
            engine, part.batches, loss=loss, examples=len(case.rollout.rewards)
        )
        expected = float(recorded.tensors["loss"])
        limit = max(folder.limits["relative"] * abs(expected), folder.limits["absolute"])
        detail = f"{expected:.6f}, {recorded.case['note']}"
        yield Check(f"{name} loss", abs(metrics["loss"] - expected), limit, detail)
        gradients = hf_gradients(engine, own.model)
        for check in _check_gradients(recorded, gradients, folder.golden["gradient_order"]):
            yield replace(check, name=f"{name} {check.name}", limit=folder.limits["gradient"])


def _check_scores(case: Case, part: Part, engine: Engine, settings: Settings) -> Iterator[Check]:
    """Compare log-prob estimates on the ranks that have them, and advantages."""
    tensors, rows, algorithm = case.recorded.tensors, case.rows, case.algorithm
    current, _ = score_tables(
        engine.network, part.batches, rows.scored.shape, settings.sampling, algorithm
    )
    inputs = joint_inputs(rows, Tables(current, current, None), case.rollout)
    key = "logps" if "logps" in tensors else "seq_logps"
    expected = _spread(case, tensors[key])[rows.scored].double()
    pairs = {key: (inputs, replace(inputs, logprobs=expected))}
    if case.is_combined:
        pairs = {key: tuple(in_units(side) for side in pairs[key])}
    values = {key: tuple(side.logprobs for side in sides) for key, sides in pairs.items()}
    if algorithm.filled.loss == "sandwich":
        first, ours = bounds(inputs, algorithm)
        values["seq_logps"] = ours, tensors["seq_logps"][inputs.rollout[first]]
    elif "logps" in values and "seq_logps" in tensors:
        values["seq_logps"] = _of_completions(case, current), tensors["seq_logps"]
    for name, (ours, theirs) in values.items():
        error = _error(ours, theirs) if engine.ranks.is_last_stage else 0.0
        yield Check(name, error, 0.0, f"{len(ours)} values")
    if case.advantages is not None:
        centred = advantages(case.rollout.rewards, replace(algorithm, softmax="none"))
        yield Check("advantages", _error(centred, case.advantages), 0.0, f"{len(centred)} values")


def _of_completions(case: Case, table: Tensor) -> Tensor:
    """Return the mean over the rows of each completion of their log-likelihoods, [B]."""
    rows, width = case.rows, case.recorded.width if case.is_combined else 1
    coefficient = width if rows.coefficient is None else width * rows.coefficient
    each = (table * coefficient).sum(1)
    sums = each.new_zeros(case.recorded.completions).index_add(0, rows.rollout, each)
    return sums / torch.bincount(rows.rollout, minlength=len(sums))


def _check_gradients(
    recorded: Recorded, gradients: dict[str, Tensor], order: list[str]
) -> Iterator[Check]:
    """Compare gradients and their norms, relative to the norm of the whole gradient."""
    stored, norms = below(recorded.tensors, "grad."), recorded.tensors["grad_norms"]
    scale = float(norms.norm()) or 1.0
    errors = {name: float((gradients[name] - g).norm()) for name, g in stored.items()}
    worst = max(errors, key=lambda name: errors[name])
    detail = f"{len(errors)} tensors, worst {worst}"
    yield Check("gradients", errors[worst] / scale, 0.0, detail)
    ours = torch.stack([gradients[name].norm() for name in order])
    error = float((ours - norms).abs().max())
    yield Check("grad_norms", error / scale, 0.0, f"{len(order)} tensors, norm {scale:.6f}")


def _older(case: Case, policy: str) -> Tensor | None:
    """Return the recorded log-probs of an older policy by scored token, if there are any."""
    tensors = case.recorded.tensors
    found = [tensors[key] for key in (f"{policy}_logps", f"{policy}_seq_logps") if key in tensors]
    return _spread(case, found[0]) if found else None


def _with_distributions(
    case: Case, part: Part, engine: Engine, settings: Settings
) -> list[TimestepBatch]:
    """Return micro-batches with this rank's shard of the reference's recorded distributions."""
    recorded, scored = case.recorded.tensors["ref_all_logps"], case.rows.scored
    columns = padded_vocab(settings)
    table = recorded.new_full((*scored.shape, columns), LEAST)
    # Recorded by step, completion, and token of the step.
    table[scored] = F.pad(
        recorded.transpose(0, 1).flatten(0, 2), (0, columns - recorded.shape[-1]), value=LEAST
    )
    start, tensor = engine.network.vocab.start, engine.ranks.tensor
    shard = table[..., start : start + columns // tensor.size]
    return [replace(b, reference_shard=shard[b.row, b.position]) for b in part.batches]


def _spread(case: Case, recorded: Tensor) -> Tensor:
    """Return log-probs [N, C] of tokens; their combination in a unit is the unit's recorded one."""
    rows, values = case.rows, case.values(recorded)
    if not case.is_combined:
        return values
    assert rows.unit is not None and rows.coefficient is not None
    sums = rows.coefficient.new_zeros(int(rows.unit.max()) + 1)
    sums.index_add_(0, rows.unit[rows.scored], rows.coefficient[rows.scored])
    return values / sums[rows.unit]


def _error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative where a value is above 1."""
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def _read(file: Path) -> Folder:
    """Read the record of a method.

    Raises:
        ValueError: it is not one, or of a method that this tool does not know.
    """
    folder = file.parent
    try:
        golden = json.loads(file.read_text(encoding="utf-8"))
        tensors = load_file(folder / "golden.safetensors")
        limits = TOLERANCE.search(golden["tolerance"])
        model = (folder / golden["model"]).resolve()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not the record of a method: {error}") from None
    names = [name for name in METHODS if folder.name.startswith(name)]
    if not names:
        raise ValueError(f"{folder}: a folder's name starts with its method: {', '.join(METHODS)}")
    if limits is None:
        raise ValueError(f"{file}: tolerance={golden['tolerance']!r} names no limits")
    numbers = {name: float(number) for name, number in limits.groupdict().items()}
    return Folder(folder.name, METHODS[max(names, key=len)], golden, tensors, model, numbers)


def _refuse(error: ValueError) -> int:
    """Print what is wrong with the arguments or the records; returns the exit status."""
    print(f"check_estimators: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
