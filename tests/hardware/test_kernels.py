"""The choice of kernels for settings and machine, and the messages of refusals."""

from dataclasses import replace

import pytest
from megatron.core.transformer.enums import AttnBackend

from agrpo_megatron.config.rules.precision import validate_precision
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings
from agrpo_megatron.hardware import kernels
from agrpo_megatron.hardware.kernels import Kernels, choose, in_one_line, kernels_for
from agrpo_megatron.hardware.machine import MISSING, Machine
from agrpo_megatron.megatron.precision import kernel_values
from tests.hardware.test_machine import HOPPER, gpu

CPU = Machine()
BARE = replace(HOPPER, te=None, te_problem=MISSING)
BROKEN = replace(HOPPER, te_problem="it is broken: OSError: libnccl.so.2: cannot open")
AMPERE, ADA = gpu("A100", 8, 0), gpu("L40S", 8, 9)
BLACKWELL, WORKSTATION = gpu("B200", 10, 0), gpu("RTX PRO", 12, 0)
EVERYTHING = replace(HOPPER, apex_adam=True, apex_gradient=True, flash_attention=(2, 3))


def settings_of(*overrides):
    """Return checked settings."""
    settings = load(Settings, None, overrides)
    validate_precision(settings)
    return settings


def chosen(here, *overrides, phases=("rl",)):
    """Return the chosen kernels without the notes."""
    found = choose(settings_of(*overrides), here, phases=phases)
    return (
        found.layer_spec,
        found.recipe,
        found.fuse_layer_gradients,
        found.fuse_head_gradient,
        found.flash_attention,
        found.optimizer,
    )


BF16, FP8 = "precision=bf16", "precision=fp8"
INVARIANT = "kernels.batch_invariant=true"


@pytest.mark.parametrize(
    ("here", "overrides", "expected"),
    [
        (CPU, (), ("local", None, False, False, None, "torch")),
        (CPU, (BF16,), ("local", None, False, False, None, "torch")),
        # Installed on a machine without a GPU, a package with kernels changes nothing.
        (
            Machine(te="2.20.2", te_problem="there is no GPU for it", apex_adam=True),
            (BF16,),
            ("local", None, False, False, None, "torch"),
        ),
        (HOPPER, (), ("local", None, False, False, None, "te")),
        (HOPPER, (BF16,), ("te", None, True, False, None, "te")),
        (
            HOPPER,
            (BF16, "kernels.layer_spec=local"),
            ("local", None, False, False, None, "te"),
        ),
        (AMPERE, (BF16,), ("te", None, True, False, None, "te")),
        (gpu("V100", 7, 0), (BF16,), ("local", None, False, False, None, "te")),
        (BARE, (BF16,), ("local", None, False, False, None, "torch")),
        (BROKEN, (BF16,), ("local", None, False, False, None, "torch")),
        (replace(BARE, apex_adam=True), (BF16,), ("local", None, False, False, None, "apex")),
        (
            replace(BARE, apex_adam=True, apex_gradient=True),
            (BF16,),
            ("local", None, True, True, None, "apex"),
        ),
        (EVERYTHING, (), ("local", None, True, True, None, "te")),
        (EVERYTHING, (BF16,), ("te", None, True, True, None, "te")),
        # Batch-invariant products are for forwards: gradients of layers stay fused.
        (EVERYTHING, (BF16, INVARIANT), ("te", None, True, True, 3, "te")),
        (
            replace(BLACKWELL, flash_attention=(2, 3, 4)),
            (BF16, INVARIANT),
            ("te", None, True, False, 4, "te"),
        ),
        (HOPPER, (FP8,), ("te", "blockwise", True, False, None, "te")),
        (BLACKWELL, (FP8,), ("te", "mxfp8", True, False, None, "te")),
        (WORKSTATION, (FP8,), ("te", "tensorwise", True, False, None, "te")),
        (
            BLACKWELL,
            (FP8, "fp8.recipe=blockwise"),
            ("te", "blockwise", True, False, None, "te"),
        ),
        (
            ADA,
            (FP8, "fp8.recipe=tensorwise"),
            ("te", "tensorwise", True, False, None, "te"),
        ),
        (
            HOPPER,
            (FP8, "fp8.recipe=delayed", "train.iterations=0"),
            ("te", "delayed", True, False, None, "te"),
        ),
        (
            HOPPER,
            (BF16, "optimizer.moments=fp8", "optimizer.distributed=true"),
            ("te", None, True, False, None, "te"),
        ),
        # torch's AdamW updates the offloaded states.
        (
            BARE,
            (
                BF16,
                "optimizer.main_gradients=bf16",
                "optimizer.offload=1",
                "optimizer.distributed=true",
            ),
            ("local", None, False, False, None, "torch"),
        ),
    ],
)
def test_what_is_chosen(here, overrides, expected):
    assert chosen(here, *overrides) == expected


DISTRIBUTED = "optimizer.distributed=true"


@pytest.mark.parametrize(
    ("here", "overrides", "message"),
    [
        (
            CPU,
            (FP8,),
            "precision=fp8 needs a GPU, and torch sees none; run where there is one, or use "
            "precision=bf16",
        ),
        (
            CPU,
            (BF16, "optimizer.offload=0.5", DISTRIBUTED),
            "optimizer.offload=0.5 needs a GPU to move states from, and torch sees none; run where "
            "there is one, or use optimizer.offload=0",
        ),
        (
            AMPERE,
            (FP8,),
            "precision=fp8 needs a Hopper GPU or newer, and A100 has compute capability 8.0; run "
            "on a newer one, or use precision=bf16",
        ),
        (
            AMPERE,
            (FP8, "fp8.recipe=tensorwise"),
            "precision=fp8 needs a Hopper GPU or newer, and A100 has compute capability 8.0; run "
            "on a newer one, or use precision=bf16",
        ),
        (
            BARE,
            (FP8,),
            "precision=fp8 needs Transformer Engine, and it is not installed; install it as "
            "docs/install.md says, or use precision=bf16",
        ),
        (
            BROKEN,
            (FP8,),
            "precision=fp8 needs Transformer Engine, and it is broken: OSError: libnccl.so.2: "
            "cannot open; install it as docs/install.md says, or use precision=bf16",
        ),
        (
            replace(HOPPER, te="2.2.0"),
            (FP8,),
            "precision=fp8 needs Transformer Engine 2.10 or newer, and it is 2.2.0; install it as "
            "docs/install.md says, or use precision=bf16",
        ),
        (
            ADA,
            (FP8,),
            "fp8.recipe=null, here blockwise, needs a Hopper GPU or newer, and L40S has compute "
            "capability 8.9; use fp8.recipe=tensorwise",
        ),
        (
            replace(HOPPER, cuda=(12, 8)),
            (FP8, "fp8.recipe=blockwise"),
            "fp8.recipe=blockwise needs CUDA 12.9 or newer, and torch was built for 12.8; install "
            "a torch for CUDA 13, or use fp8.recipe=tensorwise",
        ),
        (
            HOPPER,
            (FP8, "fp8.recipe=mxfp8"),
            "fp8.recipe=mxfp8 needs a Blackwell GPU (10.x), and H100 has compute capability 9.0; "
            "use fp8.recipe=blockwise",
        ),
        (
            WORKSTATION,
            (FP8, "fp8.recipe=mxfp8"),
            "fp8.recipe=mxfp8 needs a Blackwell GPU (10.x), and RTX PRO has compute capability "
            "12.0; use fp8.recipe=blockwise",
        ),
        (
            BLACKWELL,
            (FP8, "model.ffn_hidden_size=400"),
            "precision=fp8 needs widths divisible by 32, and model.ffn_hidden_size=400 is 400; use "
            "a smaller tensor-parallel size, other widths, or precision=bf16",
        ),
        (
            CPU,
            (BF16, "kernels.layer_spec=te"),
            "kernels.layer_spec=te needs a GPU, and torch sees none; run where there is one, or "
            "use kernels.layer_spec=auto",
        ),
        (
            BARE,
            (BF16, "kernels.layer_spec=te"),
            "kernels.layer_spec=te needs Transformer Engine, and it is not installed; install it "
            "as docs/install.md says, or use kernels.layer_spec=auto",
        ),
        (
            CPU,
            (BF16, "kernels.cuda_graphs=true"),
            "kernels.cuda_graphs=true needs a GPU, and torch sees none; run where there is one, or "
            "use kernels.cuda_graphs=false",
        ),
        (
            CPU,
            (BF16, INVARIANT),
            "kernels.batch_invariant=true needs a GPU, and torch sees none; run where there is "
            "one, or use kernels.batch_invariant=false",
        ),
        (
            AMPERE,
            (BF16, INVARIANT),
            "kernels.batch_invariant=true needs a Hopper GPU or newer, and A100 has compute "
            "capability 8.0; run on a newer one, or use kernels.batch_invariant=false",
        ),
        (
            HOPPER,
            (BF16, INVARIANT),
            "kernels.batch_invariant=true needs flash-attn-3 or flash-attn-4, and it is not "
            "installed; install it as docs/install.md says, or use kernels.batch_invariant=false",
        ),
        (
            CPU,
            (BF16, "optimizer.moments=bf16", DISTRIBUTED),
            "optimizer.moments=bf16 needs a GPU, and torch sees none; run where there is one, or "
            "use optimizer.moments=fp32",
        ),
        (
            replace(BARE, apex_adam=True),
            (BF16, "optimizer.main_gradients=bf16", DISTRIBUTED),
            "optimizer.main_gradients=bf16 needs Transformer Engine, and it is not installed; "
            "install it as docs/install.md says, or use optimizer.main_gradients=fp32",
        ),
    ],
)
def test_what_a_machine_cannot_do_is_refused_with_the_fix(here, overrides, message):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        chosen(here, *overrides)
    assert str(refusal.value) == message


def test_an_optimizer_is_looked_at_where_its_phase_is_trained():
    low = ("sft.optimizer.moments=bf16", "sft.optimizer.distributed=true", "sft.iterations=9", BF16)
    with pytest.raises(ValueError, match=r"^sft\.optimizer\.moments=bf16 needs Transformer Engine"):
        chosen(BARE, *low, phases=("sft", "rl"))
    for phases in ((), ("rl",)):
        assert chosen(BARE, *low, phases=phases)[-1] == "torch"


def test_every_kernel_has_a_note_and_a_reason():
    parts = [
        "layers",
        "attention",
        "norms and products",
        "precision",
        "gradients of layers",
        "gradient of the head",
        "optimizer",
        "batch-invariant",
        "deterministic",
        "CUDA graphs",
    ]
    for here in (CPU, BARE, AMPERE, ADA, HOPPER, BLACKWELL, WORKSTATION, EVERYTHING):
        for precision in ("precision=fp32", BF16):
            notes = choose(settings_of(precision), here).notes
            assert [note.part for note in notes] == parts
            assert all(note.chosen and note.why for note in notes)


def _notes(here, *overrides):
    return {note.part: note for note in choose(settings_of(*overrides), here).notes}


def test_notes_say_why_a_better_kernel_was_not_chosen():
    assert (
        _notes(BROKEN, BF16)["layers"].why
        == f"te needs Transformer Engine, and {BROKEN.te_problem}"
    )
    assert _notes(HOPPER)["layers"].why == "te has no attention for precision=fp32"
    assert (
        _notes(AMPERE, BF16)["precision"].why == "precision=bf16; fp8 needs a Hopper GPU or newer"
    )
    assert _notes(HOPPER, BF16)["precision"].why == "precision=bf16; fp8 would be blockwise"
    emulated = _notes(BLACKWELL, FP8, "fp8.recipe=blockwise")["precision"].why
    assert emulated.endswith("emulated on Blackwell, where mxfp8 is native")
    for here, attention in ((HOPPER, "cuDNN fused"), (AMPERE, "cuDNN fused"), (CPU, "torch SDPA")):
        assert _notes(here, BF16)["attention"].chosen == attention
    flash = replace(AMPERE, flash_attention=(2,))
    assert _notes(flash, BF16)["attention"].chosen == "flash attention"


# As examples/llada_8b on one GPU: 32 heads, 8192 tokens of rows that have 256 and a prompt.
LARGE = (
    BF16,
    "kernels.deterministic=true",
    "model.hidden_size=4096",
    "model.num_attention_heads=32",
    "sampling.completion_length=256",
    "sampling.block_length=32",
    "sampling.denoising_steps=256",
    "train.token_budget=8192",
)


def test_deterministic_attention_is_flash_attention_where_cudnns_would_not_fit():
    """On Hopper cuDNN's reserves 128 GiB for these; a fourth of the tokens is within the limit."""
    for flash, pinned in (((2,), 2), ((2, 3, 4), 3)):
        here = replace(HOPPER, flash_attention=flash)
        found = choose(settings_of(*LARGE), here, phases=("rl",))
        notes = {note.part: note for note in found.notes}
        assert found.flash_attention == pinned and notes["attention"].chosen == "flash attention"
        assert notes["deterministic"].why == (
            f"kernels.deterministic=true, by flash attention {pinned}: cuDNN's attention would "
            "reserve 128 GiB for train.token_budget=8192"
        )
        settings = settings_of(*LARGE)
        values = kernel_values("bf16", settings.fp8, settings.kernels, found)
        assert values["attention_backend"] == AttnBackend.flash
        assert values["flash_attention_version"] == pinned and not values["batch_invariant_mode"]
        small = choose(settings_of(*LARGE, "train.token_budget=2048"), here, phases=("rl",))
        assert small.flash_attention is None
        values = kernel_values("bf16", settings.fp8, settings.kernels, small)
        assert "attention_backend" not in values


@pytest.mark.parametrize(
    ("more", "needed", "fix"),
    [
        ((), (128, 8192), "use train.token_budget=2048 or less, install"),
        (("parallel=tp2",), (64, 8192), "use train.token_budget=2048 or less, install"),
        # Four ranks hold 4096 tokens each, and keys of all.
        (("parallel=cp4", "train.token_budget=16384"), (256, 16384), "use train.token_budget=4096"),
        # The smallest bucket does not fit.
        (
            (
                "model.num_attention_heads=256",
                "train.token_budget=1000",
            ),
            (16, 1000),
            "is the most; install",
        ),
    ],
)
def test_deterministic_attention_that_does_not_fit_is_refused_with_a_budget(more, needed, fix):
    gib, budget = needed
    here = replace(HOPPER, flash_attention=(4,))  # whose backward pass is not known to repeat
    with pytest.raises(ValueError, match="8 GiB is the most") as refusal:
        choose(settings_of(*LARGE, *more), here, phases=("rl",))
    said = str(refusal.value)
    assert f"reserve {gib} GiB for train.token_budget={budget}, and" in said and fix in said
    assert said.endswith("or use kernels.deterministic=false")
    # An evaluation has no backward pass.
    notes = _notes(here, *LARGE, *more)
    assert notes["attention"].chosen == "cuDNN fused"
    assert "in training" in notes["deterministic"].why


def test_other_machines_and_layers_are_deterministic_at_any_size():
    plain = ("deterministic", "yes", "kernels.deterministic=true")
    for here in (BLACKWELL, AMPERE):
        assert _notes(here, *LARGE)["deterministic"] == plain
    assert _notes(HOPPER, *LARGE, "kernels.layer_spec=local")["deterministic"] == plain
    assert _notes(EVERYTHING, *LARGE, INVARIANT)["deterministic"] == plain
    assert _notes(CPU)["deterministic"].chosen == "yes"


def test_one_line_says_why_transformer_engine_is_not_used():
    line = "kernels: layers te, cuDNN fused, FP8 blockwise, TE fused Adam"
    assert in_one_line(choose(settings_of(FP8), HOPPER)) == line
    assert in_one_line(choose(settings_of(BF16), BARE)) == (
        "kernels: layers local (te needs Transformer Engine, and it is not installed), torch SDPA, "
        "bfloat16, torch AdamW"
    )


def test_the_choice_is_made_for_this_machine(monkeypatch):
    monkeypatch.setattr(kernels, "look", lambda: BLACKWELL)
    found = kernels_for(settings_of(FP8))
    assert isinstance(found, Kernels)
    assert found.recipe == "mxfp8"
