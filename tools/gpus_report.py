"""The results of a check of several GPUs: layouts against bounds, a verdict, and a table."""

from collections.abc import Iterator

from gpu_record import Record, heading, shown
from gpu_verdict import verdict, verdict_lines

SCHEMA = 1
PRECISIONS = ("fp32", "bf16")
# Figure, by precision the bound that it must not exceed; None: it is only shown. In float32 only
# the order of sums differs; the bounds of bf16 are those of `tests/gpu`.
BOUNDS: dict[str, tuple[float, float | None]] = {
    "own ratio error, largest": (1e-3, 0.2),
    "ratio error on one GPU's rollouts, largest": (1e-3, 0.2),
    "tokens unlike one GPU's, share": (0.05, None),
    "gradient norm, relative to one GPU's": (1e-3, 0.05),
    "change of weights, relative to one GPU's": (1e-2, None),
}
# Of a checkpoint: the bytes are moved, not computed; then the next update as between layouts.
CHECKPOINT_BOUNDS = {"largest difference": 0.0, "next update": 1e-2}


def finish(record: Record) -> Record:
    """Add the verdict, which follows from what was measured."""
    rows, wrong, not_reached = record["rows"], [], []
    for name, row in rows.items():
        wrong += [f"{name}: {row['failed']}"] if "failed" in row else []
        wrong += [f"{name}: {said}" for said in exceeded(row)]
        lacking = row.get("cut") or row.get("refused")
        not_reached += [f"{name}: {lacking}"] if lacking else []
    not_reached += [f"{name}: not begun" for name in record["planned"] if name not in rows]
    return {**record, "verdict": verdict(wrong=wrong, not_reached=not_reached)}


def exceeded(row: Record) -> list[str]:
    """Return the figures of a row that exceed their bounds, as text; none is NaN."""
    found = []
    for column, precision in enumerate(PRECISIONS):
        for name, value in figures(row.get(precision, {})):
            bound = BOUNDS[name][column]
            if bound is not None and not value <= bound:
                found.append(f"{name} is {shown(value)} in {precision}, over {bound:g}")
    for name, bound in CHECKPOINT_BOUNDS.items():
        value = row.get("fp32", {}).get(name)
        if value is not None and not value <= bound:
            found.append(f"{name} is {shown(value)}, over {bound:g}")
    return found


def figures(found: Record) -> Iterator[tuple[str, float]]:
    """Yield the figures of a layout in one precision that have bounds, in the order of BOUNDS."""
    own, against = found.get("own"), found.get("against one")
    values = [own["largest"] if own else None]
    values += (
        [
            against["ratio error"]["largest"],
            1 - against["same tokens"],
            against["grad norm"],
            against["weights"],
        ]
        if against
        else [None] * 4
    )
    pairs = zip(BOUNDS, values, strict=True)
    yield from ((name, value) for name, value in pairs if value is not None)


def table(record: Record) -> str:
    """Return the record as Markdown."""
    rows = record["rows"]
    lines = [*heading(record, f"Check of {record['gpus']} GPUs"), ""]
    lines += [*verdict_lines(record["verdict"]), "", "## Layouts", ""]
    lines += [
        "A ratio error is a token's policy ratio in a first update, minus 1: the largest, and what "
        "99 % of the tokens stay within; of the layout's own rollouts, and of those of one GPU. "
        "The rest is against one GPU: the share of equal tokens, and relative differences of the "
        "gradient's norm and of the change of the weights in an update.",
        "",
        "| layout | GPUs | precision | own ratio error | 99 % | on one GPU's rollouts | 99 % | "
        "equal tokens | gradient norm | weights | rollout tokens/s | update tokens/s | peak GiB |",
        f"|{'---|' * 13}",
    ]
    ranks = record["ranks"]
    for name, row in rows.items():
        lines += [f"| {name} | {ranks[name]} | {cells} |" for cells in _cells(row)]
    lines += _checkpoints(rows) + _reshards(rows)
    return "\n".join(lines) + "\n"


def _cells(row: Record) -> Iterator[str]:
    """Yield the cells of each line of a layout after its name and GPUs."""
    for key in ("failed", "cut", "refused", "needs"):
        if key in row:
            yield f"{row[key]}{' |' * 10}"
    for precision in PRECISIONS:
        found = row.get(precision, {})
        if "own" not in found:
            continue
        own, against = found["own"], found.get("against one", {})
        there = against.get("ratio error", {})
        numbers = [own["largest"], own["99 %"], there.get("largest"), there.get("99 %")]
        numbers += [against.get(key) for key in ("same tokens", "grad norm", "weights")]
        speeds = [f"{found[f'{part} tokens/s']:,.0f}" for part in ("rollout", "update")]
        yield " | ".join([precision, *map(shown, numbers), *speeds, shown(found["peak GiB"])])


def _checkpoints(rows: Record) -> list[str]:
    kept = [(name, row["fp32"]) for name, row in rows.items() if "GB" in row.get("fp32", {})]
    lines = [
        f"| {name} | {shown(found['largest difference'])} | {shown(found['next update'])} | "
        f"{found['GB']:.3g} | {found['save seconds']:.2f} | {found['load seconds']:.2f} |"
        for name, found in kept
    ]
    head = [
        "",
        "## Checkpoints, in fp32",
        "",
        "| layouts | largest difference of a weight | next update | GB | save s | load s |",
        "|---|---|---|---|---|---|",
    ]
    return head + lines if lines else []


def _reshards(rows: Record) -> list[str]:
    lines = [
        f"| {name} | {precision} | {found['GB']:.3g} | {1e3 * found['seconds']:.1f} | "
        f"{found['GB/s']:.3g} |"
        for name, row in rows.items()
        for precision in PRECISIONS
        if (found := row.get(precision, {}).get("reshard"))
    ]
    head = [
        "",
        "## Resharding, from the training layout to that of rollouts",
        "",
        "| layout | precision | GB, all ranks | ms | GB/s |",
        "|---|---|---|---|---|",
    ]
    return head + lines if lines else []
