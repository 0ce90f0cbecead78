"""Draw `docs/concepts.png`: one rollout, its states, and the steps that AGRPO scores.

    python tools/draw_concepts.py docs/concepts.png

Tokens and entropies are invented; proposal, draws and step weights come from the package.
"""

import sys

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from agrpo_megatron.estimators.steps import step_weights
from agrpo_megatron.estimators.timesteps import invert, step_proposal

COMPLETION = ["(", "7", "+", "3", ")", "*", "2", "eos", "eos", "eos"]
UNMASK_STEP = [1, 0, 2, 0, 1, 3, 2, 3, 4, 4]
LIVE = 4  # step 4 fixes end-of-text only: not live under `live_steps: text`
ENTROPIES = [2.0, 1.2, 0.5, 0.3, 0.0]  # nats, summed over the tokens of each step
OFFSET, DRAWS = 0.6, 2  # systematic: one offset shifts a regular comb
SUPPORT = {"7": 0.52, "3": 0.30, "2": 0.18, "9": 0.0, "+": 0.0}  # after top-k 3
RAW = {"7": 0.44, "3": 0.25, "2": 0.15, "9": 0.09, "+": 0.07}

MASKED, KNOWN, SCORED, ACCENT = "#d9dde3", "#ffffff", "#f6c65b", "#2763a5"


def draw_states(axes: Axes, drawn: set[int]) -> None:
    """Draw the state before each denoising step, and mark the tokens that the step fixes."""
    for step in range(5):
        y, text = 4 - step, "bold" if step in drawn else "normal"
        axes.text(-0.3, y + 0.4, f"$s_{step}$", ha="right", va="center", fontsize=13)
        for place, (token, fixed) in enumerate(zip(COMPLETION, UNMASK_STEP, strict=True)):
            colour = SCORED if fixed == step else MASKED if fixed > step else KNOWN
            axes.add_patch(Rectangle((place, y), 0.94, 0.8, facecolor=colour, edgecolor="#8a929c"))
            if fixed <= step:
                size = 9 if token == "eos" else 12
                axes.text(place + 0.47, y + 0.4, token, ha="center", va="center", fontsize=size)
        if step in drawn:
            axes.add_patch(
                Rectangle((-0.08, y - 0.07), 10.1, 0.94, fill=False, edgecolor=ACCENT, lw=2.4)
            )
        axes.text(-1.2, y + 0.4, f"step {step}", ha="right", va="center", weight=text)


def draw_table(axes: Axes, columns: dict[float, tuple[str, list[str]]], drawn: set[int]) -> None:
    """Write one column of text per quantity, a line for each step; drawn steps in bold."""
    for x, (title, values) in columns.items():
        axes.text(x, 5.15, title, ha="center", va="bottom", fontsize=9.5, color="#333333")
        for step, value in enumerate(values):
            bold = "bold" if step in drawn else "normal"
            colour = "#999999" if step >= LIVE else "#000000"
            axes.text(x, 4.4 - step, value, ha="center", va="center", weight=bold, color=colour)


def draw_legend(axes: Axes) -> None:
    """Name the colours below the states."""
    items = [(MASKED, "mask token", -1.4), (KNOWN, "fixed at an earlier step", 1.4)]
    items.append((SCORED, "fixed at this step: scored if drawn", 6.4))
    for colour, text, x in items:
        axes.add_patch(Rectangle((x, -0.75), 0.45, 0.4, facecolor=colour, edgecolor="#8a929c"))
        axes.text(x + 0.6, -0.55, text, va="center", fontsize=9.5)
    axes.add_patch(Rectangle((13.2, -0.75), 0.45, 0.4, fill=False, edgecolor=ACCENT, lw=2.4))
    axes.text(13.8, -0.55, "drawn: one row of the update", va="center", fontsize=9.5)


def draw_support(axes: Axes) -> None:
    """Draw one position's distribution before and after truncation to its support."""
    places = range(len(RAW))
    axes.bar([p - 0.2 for p in places], list(RAW.values()), 0.38, color=MASKED, edgecolor="#8a929c")
    axes.bar([p + 0.2 for p in places], list(SUPPORT.values()), 0.38, color=SCORED)
    axes.set_xticks(list(places), list(RAW), fontsize=11)
    axes.set_ylim(0, 0.62)
    axes.set_yticks([0, 0.3, 0.6])
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvspan(-0.5, 2.5, color=ACCENT, alpha=0.08, lw=0)
    axes.text(1.0, 0.59, "support (top-k 3)", ha="center", va="top", color=ACCENT, fontsize=9.5)
    axes.text(3.5, 0.3, "cut", ha="center", color="#777777", fontsize=9.5)
    axes.set_ylabel("probability")
    axes.set_title("One position of step 0: grey, the model; yellow, the policy", fontsize=10)


def draw_comb(axes: Axes, cdf: list[float], points: list[float]) -> None:
    """Draw the proposal laid end to end on [0, 1], and the draws that fall into it."""
    for step, (left, right) in enumerate(zip([0.0, *cdf], cdf, strict=False)):
        colour = "#e8eef6" if step % 2 else "#cfdcec"
        axes.add_patch(Rectangle((left, 0), right - left, 1, facecolor=colour, edgecolor="white"))
        axes.text((left + right) / 2, 0.5, str(step), ha="center", va="center", fontsize=11)
    for number, point in enumerate(points):
        axes.annotate(
            f"draw {number + 1}",
            (point, 1.0),
            (point, 1.7),
            ha="center",
            color=ACCENT,
            fontsize=9.5,
            arrowprops={"arrowstyle": "-|>", "color": ACCENT, "lw": 1.8},
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 2.6)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Two systematic draws: each step is as wide as its $q(t)$", fontsize=10)


def main(path: str) -> None:
    """Compute the example with the package's functions, and draw it."""
    live, entropies = torch.tensor([LIVE]), torch.tensor([ENTROPIES], dtype=torch.float64)
    proposal = step_proposal(live, entropies, proposal="entropy", uniform_mix=0.1)
    points = (torch.arange(DRAWS)[None].double() + OFFSET) / DRAWS
    steps = invert(proposal, points)
    drawn = set(steps[0].tolist())
    weights = step_weights(proposal, live, torch.arange(LIVE)[None])[0].tolist()
    figure = plt.figure(figsize=(11, 6.2), dpi=110)
    grid = figure.add_gridspec(2, 2, height_ratios=[2.5, 1], hspace=0.24, wspace=0.14)
    states = figure.add_subplot(grid[0, :])
    draw_states(states, drawn)
    columns = {
        11.6: ("entropy\n(nats)", [f"{e:.1f}" for e in ENTROPIES]),
        13.7: ("proposal\n$q(t)$", [f"{q:.3f}" for q in proposal[0, :LIVE].tolist()] + ["0"]),
        16.0: ("step weight\n(1/4) / $q(t)$", [f"{w:.2f}" for w in weights] + ["not live"]),
        18.4: ("draws", [str(steps[0].tolist().count(step) or "-") for step in range(5)]),
    }
    draw_table(states, columns, drawn)
    draw_legend(states)
    states.text(4.97, 5.15, "state before each step", ha="center", va="bottom", fontsize=9.5)
    states.set_xlim(-2.6, 19.4)
    states.set_ylim(-0.9, 5.9)
    states.axis("off")
    draw_support(figure.add_subplot(grid[1, 0]))
    draw_comb(
        figure.add_subplot(grid[1, 1]), proposal[0, :LIVE].cumsum(0).tolist(), points[0].tolist()
    )
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1])
