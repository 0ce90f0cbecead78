"""The notebook learns without Megatron, and the page on the library shows the same code."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE, PAGE = ROOT / "examples" / "notebook.py", ROOT / "docs" / "library.md"
# Runs the file, then the parts of the page, as a user would; prints what is known at the end.
RUN = """
import json, runpy, sys
names = runpy.run_path(sys.argv[1])
exec(sys.argv[2], names)
loaded = sorted({m.split(".")[0] for m in sys.modules} & {"megatron", "transformer_engine"})
known = sorted(names["states"].unique().tolist())
print(json.dumps([loaded, names["history"], float(names["loss"]), known]))
"""


def blocks():
    """Return the blocks of Python on the page."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def cells():
    """Return the code of each cell of the notebook."""
    _, *parts = re.split(r"(?m)^# %%", FILE.read_text(encoding="utf-8"))
    return [part.split("\n", 1)[1].strip("\n") for part in parts if "[markdown]" not in part[:12]]


def test_the_page_shows_the_file():
    assert "\n".join(block.strip("\n") for block in blocks()[:2]) == "\n".join(cells())


def test_the_method_has_at_most_30_lines():
    assert len(cells()[1].splitlines()) <= 30


def test_the_notebook_learns_without_megatron():
    """The reward of random digits is 1/5. The parts rebuild states with masks in them."""
    ran = subprocess.run(
        [sys.executable, "-c", RUN, str(FILE), blocks()[-1]],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    loaded, history, loss, ids = json.loads(ran.stdout.splitlines()[-1])
    rewards, errors = zip(*history, strict=True)
    assert loaded == []
    assert errors[0] == 0.0, "the policy ratio of the first update is 1 to the last bit"
    assert max(errors) < 1e-5
    assert rewards[0] < 0.4 < 0.7 < sum(rewards[-10:]) / 10
    assert abs(loss) < 100 and ids == [0, 1, 2, 3, 4, 5], "5 is the mask token"
