"""Masked-diffusion training from autoregressive weights, which learned a toy language before.

A text follows a fixed cycle of letters, but for one letter in ten. Folders of the tiny model that
learned it are made here by transformers.
"""

import json
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel, AutoModelForCausalLM, dynamic_module_utils

from agrpo_megatron.checkpoint.convert import to_hf_directory
from agrpo_megatron.config.annealing import attention_at
from agrpo_megatron.config.schema import load
from agrpo_megatron.config.settings import Settings, TokenizerSettings
from agrpo_megatron.diffusion import SamplingSettings, module_context, sample
from agrpo_megatron.families import settings_from_hf
from agrpo_megatron.megatron.pipeline import forward_rows
from agrpo_megatron.runs.directory import resolve_run
from agrpo_megatron.text.tokenizer import CHARACTERS, load_tokenizer
from agrpo_megatron.training.supervised.drawn import micro_batches, open_stream
from tests.families.autoregressive import make_autoregressive
from tests.ranks import run_ranks
from tests.training.supervised.test_run import train_until
from tests.training.test_run import read
from tests.training.tiny import open_run, same_metrics

LETTERS = "abcdefghijklmnop"
LENGTH = 16
TOKENIZER = load_tokenizer(TokenizerSettings(str(CHARACTERS)))
MASK = TOKENIZER.mask_id
RUN = [
    "run.threads=1",
    "task.name=missing.py",  # is not read
    f"tokenizer.path={CHARACTERS}",
    "model.init_std=0.02",
    f"sampling.completion_length={LENGTH}",
    f"sampling.block_length={LENGTH}",
    f"sampling.denoising_steps={LENGTH}",
    "sft.batch_size=16",
    "sft.eval_interval=1",
    "sft.optimizer.learning_rate=3e-3",
    "sft.optimizer.warmup_iterations=5",
    "sft.optimizer.decay=constant",
    "train.token_budget=1024",
    "checkpoint.interval=1000",
    "logging.wandb=disabled",
    "logging.live=false",
]
RANDOM = [  # the same model from nothing
    "model.family=qwen2",
    "model.tie_embeddings=true",
    "model.qkv_bias=true",
    "model.shift=true",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.vocab_size=80",
    "model.max_sequence_length=64",
    "model.rope_theta=10000",
    "model.norm_epsilon=1e-6",
]


def follower():
    """Return the letter after each in the language's cycle."""
    order = random.Random(5).sample(LETTERS, len(LETTERS))
    return dict(zip(order, order[1:] + order[:1], strict=True))


def texts(count, seed):
    """Return texts of the language."""
    draw, follows, found = random.Random(seed), follower(), []
    for _ in range(count):
        text = draw.choice(LETTERS)
        while len(text) < LENGTH:
            text += follows[text[-1]] if draw.random() < 0.9 else draw.choice(LETTERS)
        found.append(text)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write rows to train on and held-out rows; return the settings that name them."""
    folder, found = tmp_path_factory.mktemp("data"), []
    for name, count, seed in (("data", 400, 1), ("eval_data", 40, 2)):
        rows = ({"prompt": text[:2], "completion": text[2:]} for text in texts(count, seed))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found.append(f"sft.{name}={folder / name}.jsonl")
    return found


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write a Qwen2.5 folder with a tied head that learned the language from left to right."""
    return write_learned(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True)


def write_learned(folder, family, *, tied):
    """Train a model by next tokens, and write it; return the folder."""
    model = make_autoregressive(family, tied=tied, vocab_size=80).train()
    model.init_weights()
    torch.manual_seed(0)
    ids = torch.tensor([TOKENIZER.encode(text) for text in texts(400, 1)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        batch = ids[torch.randint(len(ids), (32,))]
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.9  # 0.52 is the entropy of the language
    model.save_pretrained(folder)
    return folder


def _train(run_dir, overrides, stop_after=None):
    settings = load(Settings, None, [*RUN, f"run.dir={run_dir}", *overrides])
    resolved = resolve_run(settings, world_size=dist.get_world_size(), phases=("sft",))
    train_until(resolved, stop_after)


def _losses(run_dir, overrides):
    """Return the held-out losses of a run, iteration by iteration."""
    _train(run_dir, overrides)
    return [record["held_out_loss"] for record in read(run_dir / "metrics.jsonl")]


def first_batches(overrides, iteration):
    """Return rows, scored tokens and logits of what a run learns from in an iteration."""
    session, engine = open_run(load(Settings, None, [*RUN, *overrides]))
    run, places = session.run, range(16)
    batches, _ = micro_batches(
        run,
        open_stream(run).draw(places),
        torch.arange(16),
        seed=0,
        attention=attention_at(run.settings, iteration),
    )
    found = []
    forward_rows(
        engine.network,
        [batch.rows for batch in batches],
        lambda number, logits: found.append((batches[number].rows, logits.clone())),
    )
    return [(rows.tokens, rows.bounds, rows.scored, logits) for rows, logits in found]


def test_before_annealing_logits_are_the_causal_ones_of_transformers(start, data):
    """Also on masked rows; halfway they are not, and at the end they are those of whole rows."""
    model = AutoModelForCausalLM.from_pretrained(start).eval()
    overrides = [f"model.load={start}", *data, "sft.anneal_iterations=10", "sft.iterations=11"]
    gaps = {}
    for iteration in (1, 6):
        (found,) = run_ranks(1, first_batches, overrides, iteration)
        gap = 0.0
        for tokens, bounds, scored, logits in found:
            assert (tokens == MASK).any() and len(scored) > 20
            with torch.no_grad():
                rows = [model(tokens[None, a:b]).logits[0] for a, b in pairwise(bounds)]
            theirs = torch.cat(rows)[scored]
            gap = max(gap, float((theirs - logits).abs().max() / theirs.abs().max()))
        gaps[iteration] = gap
    assert gaps[1] < 1e-5
    assert gaps[6] > 1e-2


@pytest.fixture(scope="module")
def annealed(tmp_path_factory, start, data):
    """Return the folder of a run from autoregressive weights, and the settings that made it."""
    directory = tmp_path_factory.mktemp("runs") / "annealed"
    overrides = [f"model.load={start}", *data, "sft.anneal_iterations=30", "sft.iterations=60"]
    run_ranks(1, _train, directory, overrides)
    return directory, overrides


def test_attention_grows_from_causal_to_whole_rows(annealed):
    shares = [record["attention/ahead"] for record in read(annealed[0] / "metrics.jsonl")]
    assert shares == pytest.approx([n / 30 for n in range(30)] + [1.0] * 30)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_autoregressive_weights_take_fewer_iterations_than_random_ones(start, data, tmp_path, seed):
    """To a held-out masked-diffusion loss of 2.4 nats per token: log(16) = 2.77 is chance."""
    counts, limit = {}, 2.4
    for name, own, most in (
        ("autoregressive", [f"model.load={start}", "sft.anneal_iterations=10"], 20),
        ("random", RANDOM, 40),
    ):
        overrides = [*own, *data, f"run.seed={seed}", f"sft.iterations={most}"]
        (losses,) = run_ranks(1, _losses, tmp_path / name, overrides)
        counts[name] = next((n for n, loss in enumerate(losses, 1) if loss <= limit), most + 1)
    assert counts["autoregressive"] <= 20
    assert counts["autoregressive"] < 0.75 * counts["random"], counts


@pytest.fixture
def exported(annealed, tmp_path, monkeypatch):
    """Return the folder of the exported run, and its model as transformers loads it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = annealed[0] / "checkpoints" / "sft-000060"
    to_hf_directory(source, tmp_path / "h", progress=lambda *_: None)
    return tmp_path / "h", AutoModel.from_pretrained(tmp_path / "h", trust_remote_code=True)


def test_after_annealing_the_model_decodes_by_unmasking(exported):
    """From single letters, most confident positions first: most letters follow the cycle."""
    folder, module = exported
    model = settings_from_hf(folder)
    assert (model.attention, model.shift, model.mask_token_id) == ("full", True, MASK)
    context = module_context(module, mask_id=MASK, shift=True)
    sampling = SamplingSettings(
        completion_length=LENGTH,
        block_length=4,
        denoising_steps=LENGTH,
        unmasking="low_confidence",
        temperature=0.2,
    )
    prompts = [torch.tensor(TOKENIZER.encode(letter)) for letter in LETTERS]
    tokens = sample(prompts, torch.arange(16), context=context, sampling=sampling).tokens
    follows, right = follower(), 0
    for letter, row in zip(LETTERS, tokens.tolist(), strict=True):
        text = letter + TOKENIZER.decode_raw(row)
        right += sum(follows.get(a) == b for a, b in pairwise(text))
    assert right > 0.6 * 16 * LENGTH, right


def test_an_annealed_run_resumes_to_the_same_bits(annealed, tmp_path):
    directory, overrides = annealed
    saved = [*overrides, "checkpoint.interval=10"]
    run_ranks(1, _train, tmp_path / "run", saved, 15)
    run_ranks(1, _train, tmp_path / "run", saved)
    ours, theirs = (read(path / "metrics.jsonl") for path in (tmp_path / "run", directory))
    assert same_metrics(ours, theirs)


def test_a_tied_head_resumes_in_another_pipeline(annealed, tmp_path):
    directory, overrides = annealed
    saved = [*overrides, "checkpoint.interval=5"]
    own = ["sft.optimizer.distributed=true", "parallel=pp2"]
    run_ranks(2, _train, tmp_path / "run", [*saved, *own], 6)
    run_ranks(1, _train, tmp_path / "run", saved, 12)
    run_ranks(2, _train, tmp_path / "run", [*saved, *own], 20)
    ours, theirs = (read(path / "metrics.jsonl")[:20] for path in (tmp_path / "run", directory))
    assert len(ours) == 20
    for one, other in zip(ours, theirs, strict=True):
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_blocks_by_schedule_from_a_model_with_an_added_mask_token(tmp_path, data):
    """Blocks of 1, 4, the whole row, then the model's own; the mask token is a new row."""
    folder = write_learned(tmp_path / "qwen3", "qwen3", tied=True)
    overrides = [
        f"model.load={folder}",
        "model.attention=block_causal",
        "model.block_length=4",
        "model.vocab_size=81",
        "model.mask_token_id=80",
        "model.tie_embeddings=false",
        "sampling.block_length=4",
        *data,
        "sft.block_schedule=[1x2,4x1,fullx1]",
        "sft.iterations=8",
    ]
    (losses,) = run_ranks(1, _losses, tmp_path / "run", overrides)
    lengths = [r["attention/block_length"] for r in read(tmp_path / "run" / "metrics.jsonl")]
    assert lengths == [1, 1, 4, 0, 4, 4, 4, 4]
    assert losses[-1] < losses[0]
    saved = settings_from_checkpoint(tmp_path / "run" / "checkpoints" / "sft-000008")
    assert (saved.vocab_size, saved.mask_token_id, saved.tie_embeddings) == (81, 80, False)
    assert (saved.attention, saved.block_length, saved.shift) == ("block_causal", 4, False)


def settings_from_checkpoint(path):
    """Return the model's settings in a checkpoint."""
    from agrpo_megatron.checkpoint.model_files import read_model

    return read_model(path)


@pytest.mark.parametrize(
    ("schedule", "blocks"),
    [(["1x2", "full x 1", "8x3"], [1, 1, None, 8, 8, 8, 4, 4]), (["2x1"], [2, 4])],
)
def test_a_stage_has_the_attention_of_its_block_length(schedule, blocks):
    model = replace(Settings().model, attention="block_causal", block_length=4)
    settings = replace(
        Settings(), model=model, sft=replace(Settings().sft, block_schedule=schedule)
    )
    for iteration, block in enumerate(blocks, 1):
        found = attention_at(settings, iteration)
        assert found.model.block_length == block and found.ahead is None
        assert found.model.attention == ("full" if block is None else "block_causal")
        assert block in (None, 4) or found.sampling.block_length == block
