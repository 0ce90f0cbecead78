"""`agrpo convert verify` computes logits on the network's device: see `tests.devices`."""

from dataclasses import replace
from pathlib import Path

from agrpo_megatron.checkpoint import verify
from tests.devices import DEVICE, OtherDevice, move
from tests.ranks import run_ranks

LLADA = Path(__file__).parent.parent / "fixtures" / "llada_tiny" / "hf"


def _compare_elsewhere():
    build = verify.build_network

    def build_elsewhere(settings, ranks):
        network, there = build(settings, ranks), replace(ranks, device=DEVICE)
        for chunk in network.chunks:
            move(chunk)
            chunk.ranks = there
        return replace(network, ranks=there)

    verify.build_network = build_elsewhere
    with OtherDevice():
        return verify.compare_logits(LLADA, LLADA)


def test_logits_are_compared_on_the_networks_device():
    (found,) = run_ranks(1, _compare_elsewhere)
    assert found.name == "logits" and found.largest == 0
