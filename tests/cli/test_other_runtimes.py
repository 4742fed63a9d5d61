"""What `jettison optimize` writes is read by others: ONNX Runtime GenAI, and lm-eval on tasks that lie in a folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

import jettison

# ONNX Runtime and GenAI report their use to their maker, unless they are told not to before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
genai = pytest.importorskip("onnxruntime_genai")
pytest.importorskip("lm_eval")

PROMPTS = ("It was a dark night, and", "“Ah,” he said — naïve")
ENDING, NONSENSE = " the captain.", " zq xx kk."
NEW_TOKENS = 24
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{endings}}",
        "target_delimiter": "", "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
        ],
    },
    "continuation": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{continuation}}",
        "generation_kwargs": {"until": ["<|endoftext|>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def ours(onnx_artifact: Path) -> jettison.OptimizedModel:
    return jettison.load(onnx_artifact, threads=1, allow_spinning=False)


@pytest.fixture(scope="module")
def tasks(ours: jettison.OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of lm-eval over two lines of JSON: nothing is fetched, and nothing is left in a user's cache."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {
            "prompt": prompt, "endings": [ENDING, NONSENSE], "text": prompt + ENDING,
            "continuation": ours.generate(prompt, max_new_tokens=NEW_TOKENS),
        }
        for prompt in PROMPTS
    ]  # fmt: skip
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"data_files": {"test": str(folder / "lines.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, task in TASKS.items():
        data = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({**data, **task}))  # JSON is YAML
    return folder


def evaluated(backend: str, path: Path, task: str, tasks: Path) -> tuple[dict[str, float], list[Any]]:
    """Metrics of a task by name, and the answer to each request."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    result = lm_eval.simple_evaluate(
        model=backend, model_args=f"pretrained={path}", tasks=[task], bootstrap_iters=0, random_seed=None,
        numpy_random_seed=None, torch_random_seed=None,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip
    metrics = {name.removesuffix(",none"): value for name, value in result["results"][task].items()}
    return metrics, [answer for sample in result["samples"][task] for (answer,) in sample["resps"]]


def log_probability(model: jettison.OptimizedModel, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """Of a continuation, by jettison's own runtime."""
    ids = [*prompt, *continuation]
    logits = model.session(1, len(ids)).score([ids])[0].double().log_softmax(-1)
    return float(sum(logits[at - 1, ids[at]] for at in range(len(prompt), len(ids))))


def test_genai_writes_the_same_text(onnx_artifact: Path, ours: jettison.OptimizedModel) -> None:
    """Text to text, through GenAI's own tokenizer."""
    model = genai.Model(str(onnx_artifact))
    tokenizer = genai.Tokenizer(model)
    for text in PROMPTS:
        prompt = tokenizer.encode(text)
        assert list(prompt) == ours.tokenizer.encode(text)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + NEW_TOKENS)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(numpy.array(prompt, dtype=numpy.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert tokenizer.decode(generator.get_sequence(0)) == text + ours.generate(text, max_new_tokens=NEW_TOKENS)


def test_lm_eval_generates_through_genai(onnx_artifact: Path, tasks: Path) -> None:
    metrics, _ = evaluated("onnxruntime-genai", onnx_artifact, "continuation", tasks)
    assert metrics["exact_match"] == 1.0


def test_lm_eval_scores_with_onnxruntime(onnx_artifact: Path, ours: jettison.OptimizedModel, tasks: Path) -> None:
    graph = onnx_artifact / "scores.onnx"
    encode = ours.tokenizer.encode
    metrics, answers = evaluated("onnxruntime", graph, "choice", tasks)
    assert metrics["acc"] == 1.0
    expected = [
        log_probability(ours, encode(prompt), encode(prompt + ending)[len(encode(prompt)) :])
        for prompt in PROMPTS
        for ending in (ENDING, NONSENSE)
    ]
    assert [score for score, _ in answers] == pytest.approx(expected, rel=1e-4)

    metrics, answers = evaluated("onnxruntime", graph, "perplexity", tasks)
    expected = [log_probability(ours, [0], encode(prompt + ENDING)) for prompt in PROMPTS]
    assert answers == pytest.approx(expected, rel=1e-4)
    text_bytes = sum(len((prompt + ENDING).encode()) for prompt in PROMPTS)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(-sum(expected) / text_bytes), rel=1e-4)
