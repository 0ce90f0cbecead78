"""The completions of the HTML report: every token a cell, coloured by its denoising step."""

from collections.abc import Sequence
from html import escape

from agrpo_megatron.reports.read import Row, Run
from agrpo_megatron.reports.text import compact, number, tail_start, visible

PROMPTS_SHOWN = 8
REPLAY_SECONDS = 5.0


def completions(run: Run) -> str:
    """Return completions of the first and the last sampled iteration, by prompt; may be empty."""
    phase = "eval" if any(sample["phase"] == "eval" for sample in run.samples) else "rl"
    chosen = [sample for sample in run.samples if sample["phase"] == phase]
    if not chosen:
        return ""
    ends = {min(s["iteration"] for s in chosen): None, max(s["iteration"] for s in chosen): None}
    pairs = _by_prompt([[s for s in chosen if s["iteration"] == i] for i in reversed(ends)])
    blocks = [_pair(prompt, pair, i) for i, (prompt, pair) in enumerate(pairs)]
    return f"""<h2>Completions</h2>
<p class="quiet">Each cell is a token; its colour and small number are the denoising step at which
it was unmasked. Dashed cells were filled in after the last step.</p>
<p>{_ramp()}</p>
{"".join(blocks)}"""


def safe(text: object) -> str:
    """Return text escaped for HTML, without control, escape or direction-changing characters."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(text))
    return escape(shown, quote=True)


def _by_prompt(newest_first: Sequence[Sequence[Row]]) -> list[tuple[str, list[Row]]]:
    """Return up to PROMPTS_SHOWN prompts, each with its first sample per iteration, oldest first.

    Prompts sampled at both ends come first.
    """
    prompts: dict[str, list[Row]] = {}
    for samples in newest_first:
        for prompt, sample in {str(s.get("prompt")): s for s in reversed(samples)}.items():
            prompts.setdefault(prompt, []).insert(0, sample)
    ordered = sorted(prompts.items(), key=lambda item: -len(item[1]))
    return ordered[:PROMPTS_SHOWN]


def _pair(prompt: str, samples: Sequence[Row], index: int) -> str:
    cards = [_card(sample, f"r{index}-{place}") for place, sample in enumerate(samples)]
    solution = samples[-1].get("solution")
    answer = f'<p class="quiet">Solution: <code>{safe(solution)}</code></p>' if solution else ""
    return f"""<section><div class="asked"><pre class="prompt">{safe(prompt)}</pre></div>{answer}
<div class="pair">{"".join(cards)}</div></section>"""


def _card(sample: Row, key: str) -> str:
    iteration, steps = sample["iteration"], _num_steps(sample)
    is_before = iteration == 0 and sample["phase"] == "eval"
    title = "Before RL" if is_before else f"Iteration {iteration}"
    mark = ""
    if sample.get("correct") is not None:
        word, symbol = (
            ("right", "&#10003; correct") if sample["correct"] else ("wrong", "&#10007; wrong")
        )
        mark = f'<span class="mark {word}">{symbol}</span>'
    reward = number(sample, "reward")
    facts = [f"reward {compact(reward)}"] if reward is not None else []
    facts.append(f"{steps} denoising steps")
    delay = f"{REPLAY_SECONDS / max(1, steps):.3f}s"
    return f"""<article class="card"><div class="head"><h3>{title}</h3>{mark}
<span class="quiet">{", ".join(facts)}</span></div>
<input class="replay" type="checkbox" id="{key}"><label for="{key}">replay the unmasking</label>
<div class="cells" style="--d:{delay}">{_cells(sample, steps)}</div></article>"""


def _num_steps(sample: Row) -> int:
    steps = number(sample, "num_steps")
    return int(steps) if steps else max(map(int, sample["unmask_step"]), default=0) + 1


def _cells(sample: Row, num_steps: int) -> str:
    """Return a cell per token; the run of equal tokens at the end is folded into one."""
    pieces = [str(piece) for piece in sample["pieces"]]
    steps = [int(step) for step in sample["unmask_step"]]
    tail = tail_start(pieces)
    cells = []
    for piece, step in zip(pieces[:tail], steps[:tail], strict=True):
        breaks = "<br>" * piece.count("\n")
        cells.append(_cell(safe(visible(piece)), step, str(step), num_steps) + breaks)
    if tail < len(pieces):
        first, last = min(steps[tail:]), min(max(steps[tail:]), num_steps - 1)
        label = f"{first} to {last}" if first < last else str(first)
        text = f"{safe(visible(pieces[-1]))} &#215; {len(pieces) - tail}"
        cells.append(_cell(text, first, label, num_steps))
    return "".join(cells)


def _cell(text: str, step: int, label: str, num_steps: int) -> str:
    if step >= num_steps:
        return f'<span class="t filled" style="--s:{num_steps}"><b>{text}</b><i>&#160;</i></span>'
    share = step / max(1, num_steps - 1)
    return f'<span class="t" style="--u:{share:.3f};--s:{step}"><b>{text}</b><i>{label}</i></span>'


def _ramp() -> str:
    cells = "".join(f'<span class="t" style="--u:{i / 15:.3f}"></span>' for i in range(16))
    return f'<span class="ramp">first step <span>{cells}</span> last step</span>'
