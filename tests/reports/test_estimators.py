"""Figures of a comparison of estimators: each panel shows its own member, and the baseline."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from agrpo_megatron.evaluation.statistics import t_interval
from agrpo_megatron.reports.plots.estimators import Finals, Look, curves_figure, write_finals
from agrpo_megatron.reports.plots.style import LIGHT

LOOK = Look("accuracy", "FLOPs")
X = np.array([0.0, 1e12, 3e12])
CURVES = {
    "first": [(X, np.array([0.1, 0.2, 0.5])), (X, np.array([0.1, 0.4, 0.7]))],
    "agrpo": [(X, np.array([0.1, 0.3, 0.84])), (X, np.array([0.2, 0.3, 0.86]))],
    "third": [(X, np.array([0.0, 0.1, 0.1])), (X * 0.5, np.array([0.0, 0.1, 0.3]))],
}


def test_a_panel_has_its_own_mean_and_band_in_front_and_the_baseline():
    with matplotlib.rc_context():
        figure = curves_figure(CURVES, LIGHT, "agrpo", LOOK)
    ends = {"first": 0.6, "agrpo": 0.85}
    for axes, name in zip(figure.axes, CURVES, strict=False):
        front = max(axes.lines, key=lambda line: line.get_zorder())
        colours = {to_hex(line.get_color()) for line in axes.lines}
        assert LIGHT.blue in colours
        assert to_hex(front.get_color()) == (LIGHT.blue if name == "agrpo" else LIGHT.orange)
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        if name in ends:
            assert front.get_ydata()[-1] == pytest.approx(ends[name])
            at_end = corners[corners[:, 0] == 3e12][:, 1]
            seeds = [y[-1] for _, y in CURVES[name]]
            low, high = t_interval(seeds)
            whole = (at_end.min(), at_end.max())
            assert whole == pytest.approx((max(0.0, low), min(1.0, high))), "shares have limits"


def test_seeds_are_averaged_where_all_have_values():
    """The third's second seed ends at half the FLOPs: there its first is between two values."""
    with matplotlib.rc_context():
        figure = curves_figure(CURVES, LIGHT, "agrpo", LOOK)
    front = max(figure.axes[2].lines, key=lambda line: line.get_zorder())
    assert front.get_xdata()[-1] == 1.5e12
    assert front.get_ydata()[-1] == pytest.approx((0.1 + 0.3) / 2)
    assert figure.axes[2].get_title() == "third  20.0%"


def test_final_accuracies_are_drawn(tmp_path):
    found = {
        "agrpo": Finals([0.5, 0.6], 0.55, (0.4, 0.7), None),
        "other": Finals([0.4, 0.5], 0.45, (0.3, 0.6), (-0.1, (-0.2, 0.0))),
    }
    path = write_finals(found, tmp_path / "new" / "finals.png", baseline="agrpo", start=0.3)
    assert path.read_bytes().startswith(b"\x89PNG")
