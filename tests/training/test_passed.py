"""What is passed to Megatron by name is checked before any rank starts."""

import pytest

from agrpo_megatron.cli.main import main
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.training.passed import check_passed

REFUSED = {
    "model.megatron.recompute_granularity=ful": "Megatron wants full or selective or null",
    "model.megatron.recompute_granularites=full": "did you mean model.megatron.recompute_granular",
    "model.megatron.recompute_num_layers=two": "Megatron wants an integer or null",
    "model.megatron.apply_rope_fusion=1": "Megatron wants true or false",
    "model.megatron.attention_backend=flash": "Megatron wants AttnBackend",
    "model.megatron.xyz=1": "TransformerConfig has no field of this name; leave it out",
    "optimizer.megatron.adam_epsilon=1e-6": "did you mean optimizer.megatron.adam_eps?",
    "optimizer.megatron.adam_eps=small": "Megatron wants a number",
    "sft.optimizer.megatron.adam_epsilon=1e-6": "did you mean sft.optimizer.megatron.adam_eps?",
    "ddp.overlap_grad_reduces=true": "did you mean ddp.overlap_grad_reduce?",
    "ddp.bucket_size=1.5": "Megatron wants an integer or null",
}
PASSED = (
    "model.megatron={recompute_granularity: full, recompute_method: uniform}",
    "model.megatron.recompute_num_layers=1",
    "optimizer.megatron={adam_eps: 1e-6}",
    "ddp={overlap_grad_reduce: true, bucket_size: 40000}",
)
# A login node has no GPU: what the settings ask of one is left out.
ELSEWHERE = ("precision=fp8", "kernels.layer_spec=te", "optimizer.moments=bf16")


@pytest.mark.parametrize("there", [(), ELSEWHERE], ids=["here", "for another machine"])
@pytest.mark.parametrize("given", REFUSED)
def test_what_megatron_would_refuse_is_refused_with_key_value_rule_and_fix(given, there):
    with pytest.raises(ValueError, match=r"^(sft\.)?(model|optimizer|ddp)\.") as caught:
        check_passed(load(Settings, None, [given, *there]))
    said = str(caught.value)
    assert said.startswith(given.partition("=")[0]) and REFUSED[given] in said


@pytest.mark.parametrize("there", [(), ELSEWHERE], ids=["here", "for another machine"])
def test_what_megatron_takes_is_accepted(there):
    check_passed(load(Settings, None, [*PASSED, *there]))


@pytest.mark.parametrize("command", [["config"], ["launch", "--nodes=1", "--dry-run"], ["train"]])
def test_every_command_refuses_it_before_a_rank_starts(command, tmp_path, capsys):
    run = [f"run.dir={tmp_path / 'run'}", "launch.gpus_per_node=0", "ddp.nothing=1"]
    assert main([*command, "examples/tiny.yaml", *run]) == 2
    assert "error: ddp.nothing=1: Megatron's DistributedData" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
