"""Float32 main weights from bf16 weights and the halves that they lack, and back."""

import torch

from agrpo_megatron.checkpoint.distributed_state import lower_halves, whole_weights


def _float(bits):
    return torch.tensor(bits).to(torch.int32).view(torch.float32)


def test_halves_are_written_out():
    #  1 + 2^-7, its neighbours by one unit of float32, and a number under zero
    whole = _float([0x3F810000, 0x3F810001, 0x3F80FFFF, 0xC0490FDB - 2**32])
    weights = whole.to(torch.bfloat16)
    assert weights.view(torch.int16).tolist() == [0x3F81, 0x3F81, 0x3F81, 0xC049 - 2**16]
    lower = lower_halves(weights, whole)
    assert lower.dtype == torch.int16 and lower.tolist() == [0, 1, -1, 0x0FDB]
    assert torch.equal(whole_weights(weights, lower), whole)


def test_any_weights_come_back_bit_for_bit():
    whole = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 0.02
    weights = whole.to(torch.bfloat16)
    lower = lower_halves(weights, whole)
    assert (lower < 0).any() and (lower > 0).any()
    halfway = whole.view(torch.int32) & 0xFFFF == 0x8000
    assert halfway.sum() < 10
    assert torch.equal(whole_weights(weights, lower)[~halfway], whole[~halfway])


def test_a_number_halfway_moves_by_one_unit_where_the_weight_nearer_to_zero_was_taken():
    # Torch rounds such numbers to the even weight: here the one nearer to zero, and the other.
    whole = _float([0x3F808000, 0x3F818000])
    weights = whole.to(torch.bfloat16)
    assert weights.view(torch.int16).tolist() == [0x3F80, 0x3F82]
    back = whole_weights(weights, lower_halves(weights, whole))
    assert back.view(torch.int32).tolist() == [0x3F807FFF, 0x3F818000]
