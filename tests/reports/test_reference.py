"""The pages that are written by `agrpo config` are what it writes."""

from pathlib import Path

import pytest

from agrpo_megatron.reports.reference import metrics_page, settings_page

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("name", "page", "options"),
    [
        ("settings.md", settings_page, "--markdown"),
        ("metrics.md", metrics_page, "--metrics --markdown"),
    ],
)
def test_a_page_is_up_to_date(name, page, options):
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == page(), f"stale: agrpo config {options} > docs/{name}"


def test_the_page_of_settings_has_ranges_choices_and_the_options_of_tasks():
    page = settings_page()
    assert "| `run.seed` | `0` |  | an integer; from 0; to 9223372036854775807 |" in page
    assert "| `fp8.recipe` | `null` |  | `blockwise`, `tensorwise`, `delayed`, `mxfp8` |" in page
    assert "- [`sft.optimizer`](#sftoptimizer): optimizer of this phase; 13 settings" in page
    assert "### countdown\n" in page and "`task.options.numbers`" in page
