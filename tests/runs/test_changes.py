"""Every setting may change when a run resumes, or has a reason why it may not."""

from agrpo_megatron.config.schema import describe
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.runs.history.changes import FREE, FROZEN, LOGGED, OF_RL, OF_SFT, Change, reason

KEYS = [line.key for line in describe(Settings)]


def _is_below(key, names):
    return f"{key}.".startswith(tuple(f"{name}." for name in names))


def test_every_setting_may_change_or_has_a_reason():
    for key in KEYS:
        if not _is_below(key, (*FREE, *LOGGED)):
            assert reason(key), key


def test_every_name_is_a_setting_or_a_section_and_stands_in_one_table():
    """What the supervised phase alone uses, or does not use, is frozen once it is over."""
    of_tasks = ("task.options.train", "task.options.eval")
    for name in (*FREE, *LOGGED, *OF_SFT, *OF_RL, *FROZEN):
        assert name in of_tasks or any(_is_below(key, (name,)) for key in KEYS), name
    assert not set(FREE) & {*LOGGED, *OF_SFT, *OF_RL, *FROZEN}
    assert not set(LOGGED) & {*OF_SFT, *FROZEN}
    for key in KEYS:
        if _is_below(key, OF_SFT):
            assert reason(key) in (FROZEN["sft.iterations"], "the supervised phase is over")


def test_a_change_reads_as_the_user_writes_it():
    assert str(Change("train.flops", None, 1e15)) == "train.flops: null -> 1e+15"
    assert reason("optimizer.adam_beta1").startswith("Adam's states")
    assert reason("model.moe.experts") == FROZEN["model"]
