"""`jettison generate`: text on stdout, settings of transformers, chat templates."""

from __future__ import annotations

import io
import json
import shutil

import pytest

import jettison
from tests.cli.running import MODEL, forge, optimized, save_small_model

KEYS = {
    "prompt", "text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "seed", "prefill_seconds",
    "decode_seconds", "decode_tokens_per_s",
}  # fmt: skip
SEQUENCE_KEYS = {"text", "token_ids", "finish_reason", "new_tokens"}
PROMPT = "Once upon a time"


def test_text_is_streamed_to_stdout_and_is_what_the_library_returns(run, onnx_artifact):
    result = run("generate", onnx_artifact, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert (result.code, result.err) == (0, "")
    assert result.out == jettison.load(onnx_artifact).generate(PROMPT, max_new_tokens=12) + "\n"
    assert len(result.out) > 20


def test_json_has_the_text_the_tokens_and_the_times(run, torch_artifact):
    result = run("generate", torch_artifact, "--prompt", PROMPT, "--max-new-tokens", 12, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert document["prompt"] == PROMPT
    assert document["new_tokens"] == len(document["token_ids"]) == 12
    assert document["finish_reason"] == "length"
    assert document["text"] == jettison.load(torch_artifact).generate(PROMPT, max_new_tokens=12)
    assert document["decode_tokens_per_s"] > 0


def test_sampling_follows_the_seed(run, onnx_artifact):
    def sampled(*arguments):
        result = run("generate", onnx_artifact, "--prompt", PROMPT, "--max-new-tokens", 16, "--json", *arguments)
        assert result.code == 0, result.err
        return result.json

    greedy = sampled()["token_ids"]
    first = sampled("--do-sample", "--seed", 1)["token_ids"]
    assert sampled("--do-sample", "--seed", 1)["token_ids"] == first != greedy
    assert sampled("--do-sample", "--seed", 2)["token_ids"] != first
    # Settings of sampling ask for it; a temperature of 0, and --no-do-sample, for the opposite.
    assert sampled("--top-p", 1.0, "--top-k", 50, "--temperature", 1, "--seed", 1)["token_ids"] == first
    assert sampled("--temperature", 0)["token_ids"] == greedy
    assert sampled("--temperature", 2, "--no-do-sample")["token_ids"] == greedy
    assert sampled("--min-p", 0.0, "--seed", 1)["token_ids"] == first
    assert sampled("--min-p", 1.0)["token_ids"] == greedy
    # A seed that was not given is drawn and shown, so that the text can be had again.
    drawn = sampled("--do-sample")
    assert sampled("--do-sample", "--seed", drawn["seed"])["token_ids"] == drawn["token_ids"]


def test_a_repetition_penalty_needs_no_sampling(run, onnx_artifact):
    arguments = ("generate", onnx_artifact, "--prompt", PROMPT, "--max-new-tokens", 24, "--json")
    plain = run(*arguments).json["token_ids"]
    penalised = run(*arguments, "--repetition-penalty", 1.5).json["token_ids"]
    model = jettison.load(onnx_artifact)
    prompt = model.tokenizer.encode(PROMPT)
    assert penalised == model.generate(prompt, max_new_tokens=24, repetition_penalty=1.5) != plain
    assert len(set(penalised)) > len(set(plain))
    assert run(*arguments, "--repetition-penalty", 1).json["token_ids"] == plain


def test_several_sequences_are_listed(run, onnx_artifact, small_artifact):
    arguments = ("--max-new-tokens", 8, "--num-return-sequences", 3, "--seed", 4)
    document = run("generate", onnx_artifact, "--prompt", PROMPT, *arguments, "--json").json
    assert set(document) == KEYS - SEQUENCE_KEYS | {"continuations"}
    assert [set(row) for row in document["continuations"]] == [SEQUENCE_KEYS] * 3
    settings = {"max_new_tokens": 8, "num_return_sequences": 3, "seed": 4, "do_sample": True}
    texts = jettison.load(onnx_artifact).generate(PROMPT, **settings)
    assert [row["text"] for row in document["continuations"]] == texts
    assert len(set(texts)) == 3
    shown = run("generate", onnx_artifact, "--prompt", PROMPT, *arguments)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out == "".join(f"--- {number} of 3\n{text}\n" for number, text in enumerate(texts, 1))
    run("generate", small_artifact, "--prompt", PROMPT, "--num-return-sequences", 2, "--no-do-sample").fails(
        2, "num_return_sequences", "do_sample=True"
    )


def test_stop_ends_the_text_before_it(run, onnx_artifact):
    whole = run("generate", onnx_artifact, "--prompt", PROMPT, "--max-new-tokens", 24).out.rstrip("\n")
    stop = whole[10:14]
    result = run("generate", onnx_artifact, "--prompt", PROMPT, "--max-new-tokens", 24, "--stop", "@@", "--stop", stop)
    assert result.out.rstrip("\n") == whole[: whole.index(stop)]


def test_prompt_can_come_from_stdin(run, small_artifact, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    piped = run("generate", small_artifact, "--prompt", "-", "--max-new-tokens", 4, "--json").json
    assert piped["prompt"] == PROMPT
    assert (
        piped["token_ids"]
        == run("generate", small_artifact, "--prompt", PROMPT, "--max-new-tokens", 4, "--json").json["token_ids"]
    )


def test_token_ids_need_no_tokenizer(run, tmp_path):
    save_small_model(tmp_path / "model")
    out = optimized(tmp_path / "model", tmp_path / "out", "--target", "torch")
    document = run("generate", out, "--prompt-ids", "5, 17,3", "--max-new-tokens", 3, "--json").json
    assert (document["prompt"], document["text"], document["prompt_tokens"]) == (None, None, 3)
    shown = run("generate", out, "--prompt-ids", "5,17,3", "--max-new-tokens", 3).out
    assert shown == ",".join(map(str, document["token_ids"])) + "\n"
    run("generate", out, "--prompt", "text").fails(1, "no tokenizer files")


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def chat_artifact(small_model, tmp_path):
    """The random model, with a chat template in its tokenizer."""
    model = shutil.copytree(small_model, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return optimized(model, tmp_path / "chat", "--target", "torch")


def test_chat_template_is_used_where_there_is_one(run, chat_artifact):
    tokenizer = jettison.load(chat_artifact).tokenizer
    templated, plain = len(tokenizer.encode("<user>Hello<a>")), len(tokenizer.encode("Hello"))

    def prompt_tokens(*arguments):
        result = run("generate", chat_artifact, "--prompt", "Hello", "--max-new-tokens", 1, "--json", *arguments)
        return result.json["prompt_tokens"]

    assert templated > plain
    assert prompt_tokens() == prompt_tokens("--chat") == templated
    assert prompt_tokens("--raw") == plain


def test_chat_needs_a_template(run, small_artifact):
    run("generate", small_artifact, "--prompt", "Hello", "--chat").fails(1, "chat template")


def test_settings_out_of_range_are_usage_errors(run, small_artifact):
    for arguments, named in (
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--top-k", "-2"), "top_k"),
        (("--min-p", "-0.1"), "min_p"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--num-return-sequences", "0"), "num_return_sequences"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--stop", ""), "stop_strings"),
        (("--seed", "-1"), "--seed"),
        (("--threads", "0"), "--threads"),
        (("--chat", "--raw"), "not allowed with"),
    ):
        run("generate", small_artifact, "--prompt", "Hello", *arguments).fails(2, named)


def test_a_setting_of_the_model_that_is_not_supported_is_refused(run, small_artifact, copied):
    artifact = copied(small_artifact)
    config = artifact / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_beams": 4}))
    files = json.loads((artifact / "jettison.json").read_text())["files"]
    files["generation_config.json"] = file_record(config)
    forge(artifact, files=files)
    run("generate", artifact, "--prompt", "Hello").fails(1, "num_beams", "generation_config.json")


def file_record(path):
    import hashlib

    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_model_folder_is_told_apart_from_an_artifact(run):
    run("generate", MODEL, "--prompt", "Hello").fails(1, "Hugging Face model folder", "jettison optimize")
