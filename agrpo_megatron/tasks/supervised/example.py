"""An example of a supervised phase: rows of tokens, of which a visit trains one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from agrpo_megatron.text.replies import TokenRow


@dataclass(frozen=True, eq=False)
class Example:
    """An example that is visited once per epoch."""

    name: str  # of its row, for messages
    # A visit trains one of them, drawn at random; of a pair, the chosen against the rejected one.
    rows: Sequence[TokenRow]
    talk: bytes  # a hash of its whole conversation; equal rows of a file have the same

    @property
    def digests(self) -> set[bytes]:
        """Return hashes of its text and of its conversation."""
        return {row_digest(self.rows[-1]), self.talk}


def row_digest(row: TokenRow) -> bytes:
    """Return a hash of the tokens of a row."""
    return hashlib.sha256(row.ids.tobytes()).digest()
