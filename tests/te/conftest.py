"""These tests want an interpreter that has Transformer Engine; elsewhere none is collected.

`tests/test_te.py` runs them with the one that `make te` makes.
"""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformer_engine") else ["test_*.py"]
