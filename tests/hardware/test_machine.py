"""What a machine offers, and what it lacks for kernels."""

import sys
from dataclasses import replace

import pytest
import torch

from agrpo_megatron.hardware import machine
from agrpo_megatron.hardware.machine import (
    MISSING,
    Machine,
    apex_problem,
    default_recipe,
    device_index,
    fp8_missing,
    import_problem,
    invariant_flash,
    look,
    recipe_missing,
    release,
    te_missing,
    version,
)

HOPPER = Machine(
    gpu="H100", capability=(9, 0), cuda=(13, 0), te="2.20.2", te_problem="", flash_attention=()
)


def gpu(name, *capability, **other):
    """Return a machine with another GPU and all else as `HOPPER`."""
    return replace(HOPPER, gpu=name, capability=capability, **other)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that puts a package of the given files first on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, **modules):
        folder = tmp_path / name
        folder.mkdir()
        for module, text in {"__init__": "", **modules}.items():
            path = folder.joinpath(*module.split("__DOT__")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)

    before = set(sys.modules)
    yield make
    for loaded in set(sys.modules) - before:
        origin = getattr(sys.modules[loaded], "__file__", None) or ""
        if origin.startswith(str(tmp_path)):
            del sys.modules[loaded]


@pytest.fixture
def looked():
    """Clear the cache of `look` before and after a test."""
    look.cache_clear()
    yield
    look.cache_clear()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", ""),
        (
            "raise OSError('libnccl.so.2: cannot open')",
            "it is broken: OSError: libnccl.so.2: cannot open",
        ),
        ("raise RuntimeError('first\\nsecond')", "it is broken: RuntimeError: first"),
        ("raise ValueError", "it is broken: ValueError"),
        (
            "import no_such_package",
            "it is broken: ModuleNotFoundError: No module named 'no_such_package'",
        ),
    ],
)
def test_a_broken_package_gives_a_one_line_reason(package, text, problem):
    package("transformer_engine", pytorch=text)
    assert import_problem("transformer_engine.pytorch") == problem


def test_an_absent_package_is_not_a_broken_one():
    assert import_problem("no_such_package.inner") == MISSING
    assert version("no-such-package") == ""


def test_the_registrys_apex_is_told_apart_from_nvidias(package):
    package("apex", __init__="from pyramid import config")
    assert apex_problem() == "it is another project named apex"


def test_apex_without_its_kernels_is_not_usable(package):
    package("apex", optimizers__DOT____init__="FusedAdam = object")
    assert apex_problem() == "it was built without its kernels"
    package("amp_C")
    assert apex_problem() == ""


def test_releases_are_compared_as_numbers():
    assert release("2.20.2+abc") == (2, 20) > release("2.3.0") > release("")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what holds without a GPU")
def test_a_machine_without_a_gpu_imports_no_kernels(looked, package):
    package("transformer_engine", pytorch="raise SystemExit('imported')")
    seen = look()
    assert seen.gpu is None
    assert seen.cuda == release(torch.version.cuda or "")
    assert not (seen.apex_adam or seen.apex_gradient or seen.flash_attention)
    assert "transformer_engine" not in sys.modules


class _Gpu:
    name, major, minor = "H100", 9, 0


def test_a_gpu_is_described_with_the_installed_kernels(looked, package, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: asked.append(index) or _Gpu
    )
    monkeypatch.setenv("LOCAL_RANK", "6")
    versions = {"transformer-engine": "2.20.2", "flash-attn-3": "3.0.0"}
    monkeypatch.setattr(machine, "version", lambda name: versions.get(name, ""))
    package("transformer_engine", pytorch="raise OSError('libnccl.so.2: cannot open')")
    package("apex", optimizers__DOT____init__="")
    package("amp_C")
    package("fused_weight_gradient_mlp_cuda")
    problem = "it is broken: OSError: libnccl.so.2: cannot open"
    assert look() == Machine(
        "H100", (9, 0), release(torch.version.cuda or ""), "2.20.2", problem, True, True, (3,)
    )
    assert asked == [2]


@pytest.mark.parametrize(("is_usable", "found"), [(True, (2, 4)), (False, (4,))])
def test_flash_attention_2_counts_where_transformer_engine_can_use_it(
    package, monkeypatch, is_usable, found
):
    versions = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b11"}
    monkeypatch.setattr(machine, "version", lambda name: versions.get(name, ""))
    text = f"class FlashAttentionUtils:\n    v2_4_1_plus = {is_usable}\n"
    package("te_attention", utils=text)
    monkeypatch.setattr(machine, "TE_ATTENTION", "te_attention.utils")
    assert machine._flash_attention() == found
    monkeypatch.setattr(machine, "TE_ATTENTION", "no_such_package.utils")
    assert machine._flash_attention() == (4,)


@pytest.mark.parametrize(("rank", "count", "index"), [("6", 8, 6), ("6", 1, 0), (None, 4, 0)])
def test_a_rank_takes_its_own_gpu_or_the_only_one_it_sees(monkeypatch, rank, count, index):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert device_index(count) == index


def test_a_torch_that_cannot_ask_has_no_gpu(looked, monkeypatch):
    def fail():
        raise RuntimeError("driver is too old")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert look() == Machine()


@pytest.mark.gpu
def test_the_gpu_that_is_here_is_seen(looked):
    seen = look()
    assert seen.gpu == torch.cuda.get_device_name()
    assert seen.capability == torch.cuda.get_device_capability()


NO_GPU = "a GPU, and torch sees none"


@pytest.mark.parametrize(
    ("here", "te", "fp8"),
    [
        (Machine(), NO_GPU, NO_GPU),
        (Machine(te="2.20.2", te_problem="there is no GPU for it"), NO_GPU, NO_GPU),
        (
            gpu("V100", 7, 0),
            "an Ampere GPU or newer, and V100 has compute capability 7.0",
            "a Hopper GPU or newer, and V100 has compute capability 7.0",
        ),
        (
            gpu("A100", 8, 0),
            None,
            "a Hopper GPU or newer, and A100 has compute capability 8.0",
        ),
        (gpu("L40S", 8, 9), None, None),
        (HOPPER, None, None),
        (gpu("B200", 10, 0), None, None),
        (
            replace(HOPPER, te=None, te_problem=MISSING),
            "Transformer Engine, and it is not installed",
            "Transformer Engine, and it is not installed",
        ),
        (
            replace(HOPPER, te="2.9.0"),
            "Transformer Engine 2.10 or newer, and it is 2.9.0",
            "Transformer Engine 2.10 or newer, and it is 2.9.0",
        ),
        (replace(HOPPER, te="2.10.0"), None, None),
    ],
)
def test_what_transformer_engine_and_fp8_need(here, te, fp8):
    assert [missing and str(missing) for missing in (te_missing(here), fp8_missing(here))] == [
        te,
        fp8,
    ]


@pytest.mark.parametrize(
    ("here", "default", "possible"),
    [
        (gpu("L40S", 8, 9), "blockwise", {"tensorwise", "delayed"}),
        (HOPPER, "blockwise", {"blockwise", "tensorwise", "delayed"}),
        (replace(HOPPER, cuda=(12, 8)), "blockwise", {"tensorwise", "delayed"}),
        (replace(HOPPER, cuda=(12, 9)), "blockwise", {"blockwise", "tensorwise", "delayed"}),
        (gpu("B200", 10, 0), "mxfp8", {"mxfp8", "blockwise", "tensorwise", "delayed"}),
        (gpu("B300", 10, 3), "mxfp8", {"mxfp8", "blockwise", "tensorwise", "delayed"}),
        (gpu("RTX PRO", 12, 0), "tensorwise", {"blockwise", "tensorwise", "delayed"}),
    ],
)
def test_which_recipes_a_gpu_has(here, default, possible):
    """Source: check_recipe_support of Transformer Engine 2.20.2, whose rules these are."""
    recipes = ("blockwise", "tensorwise", "delayed", "mxfp8")
    assert {recipe for recipe in recipes if not recipe_missing(recipe, here)} == possible
    assert default_recipe(here) == default


@pytest.mark.parametrize(
    ("here", "flash"),
    [
        (replace(HOPPER, flash_attention=(2, 3, 4)), 3),
        (replace(HOPPER, flash_attention=(4,)), 4),
        (gpu("B200", 10, 0, flash_attention=(2, 3, 4)), 4),
        (replace(HOPPER, flash_attention=(2,)), "flash-attn-3 or flash-attn-4"),
        (gpu("B200", 10, 0, flash_attention=(2, 3)), "flash-attn-4"),
        (gpu("A100", 8, 0, flash_attention=(2,)), "a Hopper GPU or newer"),
        (Machine(), "a GPU"),
    ],
)
def test_which_flash_attention_is_batch_invariant(here, flash):
    found = invariant_flash(here)
    assert (found if isinstance(found, int) else found.what) == flash
