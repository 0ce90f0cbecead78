"""What loads an exported directory, as its card says it: only what would work."""

import json

import pytest

from agrpo_megatron.checkpoint.card import _loading, loader_of

OWN = "the model's own files, made with 4.46"
FILE, HUB = "modeling_x.X", "org/X--modeling_x.X"


@pytest.mark.parametrize(
    ("auto_map", "loads", "said"),
    [
        ({"AutoModel": FILE}, "AutoModel", f"AutoModel with trust_remote_code=True: {OWN}"),
        ({"AutoModelForCausalLM": FILE}, "AutoModelForCausalLM", OWN),
        ({"AutoModel": HUB}, "AutoModel", "the files of org/X, made with 4.46"),
        ({"AutoModel": FILE, "AutoTokenizer": ["a.B", None]}, "AutoModel", OWN),
        ({"AutoModel": [None, FILE]}, "AutoModel", OWN),
        ({"AutoModel": "other.X"}, None, "no modelling files, and transformers has no x"),
        ({"AutoConfig": FILE}, None, "no modelling files"),
        ({"AutoModel": None}, None, "no modelling files"),
        (None, None, "no modelling files"),
    ],
)
def test_what_loads_a_directory_is_shown_and_nothing_else(auto_map, loads, said, tmp_path):
    config = {"model_type": "x", "auto_map": auto_map, "transformers_version": "4.46"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_x.py").touch()
    assert said in loader_of(tmp_path)
    text = _loading(tmp_path)
    assert ("```" in text) == ("agrpo_megatron.diffusion.sample" in text) == (loads is not None)
    if loads is not None:
        assert f"\nfrom transformers import {loads}\nmodel = {loads}.from_pretrained(" in text
    assert "AutoTokenizer" not in text


def test_a_tokenizer_is_loaded_where_there_is_one(tmp_path):
    config = {"model_type": "x", "auto_map": {"AutoModel": FILE}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_x.py").touch()
    (tmp_path / "tokenizer.model").touch()
    assert "AutoTokenizer" not in _loading(tmp_path)
    (tmp_path / "tokenizer.json").touch()
    assert 'AutoTokenizer.from_pretrained("FOLDER")\n' in _loading(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["a.B", null]}}'
    )
    assert 'AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)' in _loading(tmp_path)
