"""These tests need an interpreter with Transformer Engine; without it none is collected.

`tests/test_te.py` runs them with the interpreter of `make te`.
"""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("transformer_engine") else ["test_*.py"]
