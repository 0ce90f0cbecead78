"""Write the built-in character tokenizer, `agrpo_megatron/text/characters.model`.

    python tools/make_tokenizer.py [path]

A sentencepiece character model, assembled piece by piece: training would order the ids by
frequency and fold white space. Needs the `protobuf` package; using the model does not.
"""

import string
import sys
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

proto: Any = sentencepiece_model_pb2  # its names exist only at run time
PATH = Path(__file__).parent.parent / "agrpo_megatron" / "text" / "characters.model"
SPACE = "\u2581"  # a space in sentencepiece
CHARACTERS = string.digits + "+-*/=():.," + SPACE + "\n" + string.ascii_letters
CONTROLS = ("<eos>", "<mask>")
VOCABULARY = 80  # a multiple of 16, so that it divides over tensor-parallel ranks


def build_model() -> bytes:
    """Return the model: unknown, controls, characters, and unused pieces up to the size."""
    Piece = proto.ModelProto.SentencePiece
    pieces = [("<unk>", Piece.UNKNOWN)]
    pieces += [(piece, Piece.CONTROL) for piece in CONTROLS]
    pieces += [(character, Piece.NORMAL) for character in CHARACTERS]
    spare = VOCABULARY - len(pieces)
    pieces += [(f"<unused{i}>", Piece.UNUSED) for i in range(spare)]
    model = proto.ModelProto()
    for piece, kind in pieces:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.CHAR
    model.trainer_spec.vocab_size = VOCABULARY
    model.trainer_spec.unk_id, model.trainer_spec.eos_id = 0, 1
    model.trainer_spec.bos_id = model.trainer_spec.pad_id = -1
    model.trainer_spec.eos_piece = CONTROLS[0]
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString(deterministic=True)


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PATH
    path.write_bytes(build_model())
