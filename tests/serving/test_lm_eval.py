"""lm-evaluation-harness itself, on tasks of local files: completions, choices and whole texts."""

import json

import pytest
import yaml

from agrpo_megatron.cli.main import main
from agrpo_megatron.serving.likelihood import Scoring, noise_of
from agrpo_megatron.serving.model import Generation, lead, open_model
from agrpo_megatron.serving.requests import noise_index, request_sampling
from agrpo_megatron.serving.texts import completion
from tests.cli.test_evaluate import HF
from tests.cli.test_main import call_all
from tests.ranks import run_ranks
from tests.serving.test_likelihood import SETTINGS
from tests.serving.test_model import resolved

pytest.importorskip("lm_eval")
DOCUMENTS = [
    {"ask": "7 5=12:", "answer": "7+5", "choices": ["7+5", "zq"], "gold": 0},
    {"ask": "9 5=14:", "answer": "9+5", "choices": ["ab 12 cd", "9+5"], "gold": 1},
]
TEMPLATE = "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}(assistant)"
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "fewshot_split": "test",
    "target_delimiter": "",
}
TASKS = {
    "local_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{ask}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{ask}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{ask}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the results and samples of three tasks, and of one with a chat template."""
    folder = tmp_path_factory.mktemp("lm_eval")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **COMMON, **files, **task})
        )
    template = folder / "own.jinja"
    template.write_text(TEMPLATE)
    harness = ["--include_path", folder, "--log_samples", "--output_path"]
    first = ["lm-eval", HF, *SETTINGS, "--mc-samples", "8", "--tasks", ",".join(TASKS)]
    chat = ["lm-eval", HF, *SETTINGS, f"tokenizer.chat_template={template}"]
    chat += ["--tasks", "local_text", "--apply_chat_template", "--num_fewshot", "1"]
    calls = [[*first, *harness, folder / "first"], [*chat, *harness, folder / "chat"]]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    (several,) = run_ranks(1, call_all, calls, folder, environment=offline)
    assert [status for status, _ in several] == [0, 0], several
    return [_read(folder / name) for name in ("first", "chat")]


def _read(folder):
    """Return what the harness wrote: its results, and the samples of each task by document."""
    (results,) = folder.glob("*/results_*.json")
    samples = {}
    for name in TASKS:
        for path in folder.glob(f"*/samples_{name}_*.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(results.read_text()), samples


def _directly():
    """Return the completions and scores that the tasks ask for, without the harness."""
    chosen = resolved()
    encode = chosen.tokenizer.encode
    asks = [encode(document["ask"]) for document in DOCUMENTS]
    with open_model(chosen, None) as model:
        sampling = request_sampling(chosen.settings, most=12, temperature=0.0)
        noise = [noise_index(noise_of(ids), 0) for ids in asks]
        tokens = lead(model, Generation(asks, noise, sampling, [["e"]] * 2)).tokens.tolist()
        texts = [completion(chosen.tokenizer, ids, most=12, stops=["e"]).text for ids in tokens]
        choices = [encode(text) for document in DOCUMENTS for text in document["choices"]]
        contexts = [asks[0], asks[0], asks[1], asks[1]]
        scores = [score.logprob for score in lead(model, Scoring(contexts, choices, 8))]
        start = [model.run.eos_id]
        whole = [score.logprob for score in lead(model, Scoring([start] * 2, asks, 8))]
    return texts, scores, whole


@pytest.fixture(scope="module")
def directly():
    return run_ranks(1, _directly)[0]


def test_completions_end_before_their_stop_texts(found, directly):
    _, samples = found[0]
    assert [line["resps"] for line in samples["local_text"]] == [[[text]] for text in directly[0]]
    assert all("e" not in text for text in directly[0])


def test_choices_are_ranked_by_their_bounds(found, directly):
    results, samples = found[0]
    scores = [float(answer[0][0]) for line in samples["local_choice"] for answer in line["resps"]]
    assert scores == pytest.approx(directly[1], abs=1e-4)
    best = [scores[0] > scores[1], scores[2] < scores[3]]
    assert results["results"]["local_choice"]["acc,none"] == sum(best) / 2


def test_whole_texts_have_their_bits_per_byte(found, directly):
    results, _ = found[0]
    bits = -sum(directly[2]) / 14 / 0.6931472  # two texts of seven bytes
    assert results["results"]["local_whole"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_the_results_state_how_likelihoods_were_estimated(found):
    config = found[0][0]["config"]
    assert config["likelihood_mc_samples"] == 8 and config["likelihood_masks"] == "counts"
    assert config["model_args"]["mc_samples"] == 8
    assert config["model_args"]["settings"] == ";".join(map(str, SETTINGS))


def test_the_chat_template_lays_out_examples_as_turns(found):
    _, samples = found[1]
    asked = [line["arguments"]["gen_args_0"]["arg_0"] for line in samples["local_text"]]
    one, two = ("(user)7 5=12:(assistant)7+5", "(user)9 5=14:(assistant)9+5")
    assert asked == [f"{two}(user)7 5=12:(assistant)", f"{one}(user)9 5=14:(assistant)"]


WRONG = {
    "too few masks": (["--mc-samples", "0"], "mc_samples=0 must be at least 1 with masks=counts"),
    "odd pairs": (
        ["--mc-samples", "5", "--masks", "coupled_counts"],
        "mc_samples=5 must be an even number of at least 2 with masks=coupled_counts",
    ),
    "another model": (["--model", "hf"], f"--model: the model is {HF}; leave it out"),
    "a wrong setting": (["sampling.block_lenght=4"], "did you mean sampling.block_length?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line(name, capsys):
    arguments, said = WRONG[name]
    assert main(["lm-eval", str(HF), *arguments]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1
