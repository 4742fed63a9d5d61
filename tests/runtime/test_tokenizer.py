"""Tokenizers as folders hold them, decoding token by token, and stop strings."""

from __future__ import annotations

import builtins
import json
import random
import shutil
from pathlib import Path

import pytest

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.runtime.tokenizer import (
    IncrementalDecoder,
    StopStrings,
    TokenizersTokenizer,
    TransformersTokenizer,
    has_tokenizer,
    load_tokenizer,
)

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
TEXT = "“Sailing — naïve café”, 日本語 🙂🙃!\n\tTwo  spaces, then an end.  "
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no ' + m['role']) }}"
    "{% endif %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture
def without(monkeypatch):
    """Make packages look as if they were not installed."""

    def hide(*packages: str) -> None:
        real = builtins.__import__

        def fake(name, *args, **kwargs):
            if name.split(".")[0] in packages:
                raise ImportError(f"No module named {name!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return hide


@pytest.fixture
def folder(tmp_path):
    """A folder with the tokenizer of tiny-llama that a test may spoil."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / name, tmp_path / name)
    return tmp_path


def with_config(folder: Path, **values: object) -> Path:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def byte_fallback_tokenizer() -> TokenizersTokenizer:
    """A vocabulary in the manner of SentencePiece: `▁` for spaces, one token per byte for what it does not know."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for token in ("</s>", "▁", "▁Hello", "▁world", "ly", ".", "▁▁", "é", "▁日"):
        vocab[token] = len(vocab)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return TokenizersTokenizer(tokenizer, {"eos_token": "</s>"})


def pieces_of(tokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loaded_tokenizer_equals_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY_LLAMA)
    mine = load_tokenizer(TINY_LLAMA)
    assert isinstance(mine, TransformersTokenizer)
    assert mine.encode(TEXT) == theirs.encode(TEXT)
    assert mine.decode(mine.encode(TEXT)) == TEXT
    assert mine.eos_token_id == theirs.eos_token_id == 0
    assert mine.vocab_size == 4096
    assert mine.special_tokens == {"<|endoftext|>": 0}
    assert mine.decode([0, *mine.encode("a"), 0]) == "a"
    assert not mine.has_chat_template


def test_tokenizers_alone_reads_the_same(without):
    pytest.importorskip("tokenizers")
    reference = load_tokenizer(TINY_LLAMA)
    without("transformers")
    alone = load_tokenizer(str(TINY_LLAMA))
    assert isinstance(alone, TokenizersTokenizer)
    assert alone.encode(TEXT) == reference.encode(TEXT)
    assert alone.decode([0, *alone.encode(TEXT)]) == TEXT
    assert (alone.eos_token_id, alone.vocab_size, alone.special_tokens) == (0, 4096, {"<|endoftext|>": 0})
    assert not alone.has_chat_template


def test_stored_truncation_and_padding_are_not_applied(folder, without):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    expected = load_tokenizer(TINY_LLAMA).encode(TEXT)
    assert load_tokenizer(folder).encode(TEXT) == expected
    without("transformers")
    assert load_tokenizer(folder).encode(TEXT) == expected


def test_special_tokens_the_tokenizer_is_configured_to_add_are_added(folder, without):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["single"].insert(0, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}})
    content["post_processor"]["special_tokens"] = {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    expected = [0, *load_tokenizer(TINY_LLAMA).encode("a b")]
    assert load_tokenizer(folder).encode("a b") == expected
    without("transformers")
    assert load_tokenizer(folder).encode("a b") == expected


def test_long_text_is_encoded_whole_and_in_silence(caplog, capsys):
    tokenizer = load_tokenizer(TINY_LLAMA)  # its model_max_length is 1024
    assert len(tokenizer.encode("word " * 3000)) > 1024
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_spaces_are_decoded_as_the_tokens_have_them(folder):
    insists = {"clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    tokenizer = load_tokenizer(with_config(folder, clean_up_tokenization_spaces=True, **insists))
    assert tokenizer.decode(tokenizer.encode("do n't , he said .")) == "do n't , he said ."


def test_eos_token_may_be_stored_as_an_object(folder, without):
    with_config(folder, eos_token={"content": "<|endoftext|>", "lstrip": False})
    without("transformers")
    assert load_tokenizer(folder).eos_token_id == 0
    assert load_tokenizer(with_config(folder, eos_token=None)).eos_token_id is None


def test_has_tokenizer_tells_folders_apart(folder):
    assert has_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    assert not has_tokenizer(folder)
    assert not has_tokenizer(folder / "missing")


# --- chat templates --------------------------------------------------------------------------------------------------


def test_chat_template_gives_the_prompt_the_model_knows(folder):
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(with_config(folder, chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "Hi <there>"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "user: Hi <there>\nassistant: Ho\nassistant:"
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert tokenizer.decode(closed) == "user: Hi <there>\nassistant: Ho\n"


def test_chat_template_in_its_own_file_is_found(folder):
    pytest.importorskip("jinja2")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "user: Hi\nassistant:"


def test_missing_chat_template_is_refused(without):
    expected = (
        "[tokenizer] chat template: found none in this tokenizer for 1 message(s), needs one to format a conversation. "
        "Pass a plain prompt instead."
    )
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(TINY_LLAMA).apply_chat_template(messages)
    assert str(caught.value) == expected
    without("transformers")
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(TINY_LLAMA).apply_chat_template(messages)
    assert str(caught.value) == expected


@pytest.mark.parametrize("own_file", [False, True])
def test_chat_template_without_transformers_names_the_package(folder, without, own_file):
    if own_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        with_config(folder, chat_template=TEMPLATE)
    without("transformers")
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(UnsupportedError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert str(caught.value) == (
        "[tokenizer] chat template: found one, but transformers, which renders it, is not installed. Run `pip install "
        "'jettison[hf]'`, or pass a plain prompt."
    )


def test_chat_template_without_jinja_names_the_package(folder, monkeypatch):
    tokenizer = load_tokenizer(with_config(folder, chat_template=TEMPLATE))

    def refuse(*args, **kwargs):
        raise ImportError("jinja2 is missing")

    monkeypatch.setattr(tokenizer._tokenizer, "apply_chat_template", refuse)
    with pytest.raises(UnsupportedError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert str(caught.value) == (
        "[tokenizer] chat template: cannot be rendered (jinja2 is missing). Run `pip install 'jinja2>=3.1.6'`, or pass "
        "a plain prompt."
    )


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (TEMPLATE, [{"role": "system", "content": "x"}], "TemplateError: no system"),
        (TEMPLATE, [{"role": "user"}], "UndefinedError: 'dict object' has no attribute 'content'"),
        ("{{ 1 / 0 }}", [{"role": "user", "content": "x"}], "ZeroDivisionError: division by zero"),
    ],
)
def test_messages_the_template_refuses_are_an_option_error(folder, template, messages, reason):
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(with_config(folder, chat_template=template))
    with pytest.raises(OptionError) as caught:
        tokenizer.apply_chat_template(messages)
    assert str(caught.value) == (
        f"[tokenizer] chat template: the model's template refuses these 1 message(s): {reason}. Change the roles or "
        "contents, or pass a plain prompt."
    )


@pytest.mark.parametrize("messages", ["Hi", ["Hi"], [{"content": "Hi"}]])
def test_messages_of_the_wrong_form_are_an_option_error(folder, messages):
    tokenizer = load_tokenizer(with_config(folder, chat_template=TEMPLATE))
    with pytest.raises(OptionError) as caught:
        tokenizer.apply_chat_template(messages)
    assert str(caught.value) == (
        "[tokenizer] chat template: found messages that are not dicts with a role, needs a list such as "
        '[{"role": "user", "content": "Hello"}]. Pass a plain prompt to skip the template.'
    )


# --- bad folders and bad input ---------------------------------------------------------------------------------------


def test_a_missing_folder_is_refused_and_never_looked_up_elsewhere(tmp_path):
    for name in (tmp_path / "none", "some-org/some-model"):
        with pytest.raises(ArtifactError) as caught:
            load_tokenizer(name)
        assert str(caught.value) == (f"[tokenizer] {name}: not a folder, needs the folder of a model. Check the path.")


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"[tokenizer] {tmp_path}: no tokenizer files, needs one of tokenizer.json, tokenizer.model, spiece.model, "
        "sentencepiece.bpe.model, vocab.json, vocab.txt, tekken.json to turn text into tokens. Copy them from the "
        "original model into the folder, or pass token ids instead of text."
    )


@pytest.mark.parametrize("hidden", [(), ("transformers",)])
@pytest.mark.parametrize("content", ['{"version": "1.0"}', '{"version":', "[1, 2]", "\xff", ""])
def test_a_damaged_tokenizer_is_refused(folder, without, content, hidden):
    (folder / "tokenizer.json").write_text(content, encoding="latin-1")
    without(*hidden)
    with pytest.raises(ArtifactError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert message.startswith(f"[tokenizer] {folder}")
    assert message.endswith(
        "needs the tokenizer files as the model's authors saved them. Copy them again from the original model (or "
        "install what the reason names), or pass token ids instead of text."
    )


def test_a_damaged_tokenizer_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text("[1, 2]")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: cannot be read \(holds a JSON list, not an obj"):
        load_tokenizer(folder)


def test_a_tokenizer_that_needs_code_of_its_own_is_refused_and_not_run(folder):
    pytest.importorskip("transformers")
    (folder / "tok.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    auto_map = {"AutoTokenizer": ["tok.Own", None]}
    with_config(folder, tokenizer_class="Own", auto_map=auto_map)
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(folder)
    assert str(caught.value) == (
        f"[tokenizer] {folder}: tokenizer_config.json asks for Python code of its own ({auto_map}), and jettison runs "
        "no code from a model folder. Save the tokenizer as tokenizer.json with transformers, without auto_map, or "
        "pass token ids instead of text."
    )
    assert not (folder / "ran").exists()


def test_without_either_package_the_error_says_what_to_install(without):
    without("transformers", "tokenizers")
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(TINY_LLAMA)
    assert str(caught.value) == (
        f"[tokenizer] {TINY_LLAMA}: reading tokenizer.json needs the transformers or the tokenizers package; found "
        "neither. Run `pip install 'jettison[hf]'`, or pass token ids instead of text."
    )


def test_other_tokenizer_files_need_transformers(tmp_path, without):
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    without("transformers")
    with pytest.raises(UnsupportedError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == (
        f"[tokenizer] {tmp_path}: no tokenizer.json, and the other tokenizer files need transformers, which is not "
        "installed. Run `pip install 'jettison[hf]'`, or pass token ids instead of text."
    )


def test_bad_text_and_bad_ids_are_refused():
    tokenizer = load_tokenizer(TINY_LLAMA)
    with pytest.raises(OptionError) as caught:
        tokenizer.encode(["a", "b"])
    assert str(caught.value) == "[tokenizer] encode: found list, needs one string. Pass the texts one by one."
    with pytest.raises(OptionError) as caught:
        tokenizer.decode([5, -100])
    assert str(caught.value) == (
        "[tokenizer] decode: found token -100, needs ids of at least 0. Drop padding such as -100."
    )
    assert tokenizer.decode([]) == ""


# --- decoding token by token -----------------------------------------------------------------------------------------


def test_pieces_add_up_and_no_piece_is_half_a_character():
    tokenizer = load_tokenizer(TINY_LLAMA)
    ids = tokenizer.encode(TEXT)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("日") == pieces.count("🙂") == 1
    assert pieces[-1] == ""


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_tokens_add_up_to_the_decoded_text(seed):
    tokenizer = load_tokenizer(TINY_LLAMA)
    draw = random.Random(seed)
    # Bytes, the special token and words in all orders: most sequences are not valid UTF-8.
    ids = [draw.choice([0, draw.randrange(1, 257), draw.randrange(4096)]) for _ in range(120)]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_pieces_of_a_byte_fallback_vocabulary_add_up():
    tokenizer = byte_fallback_tokenizer()
    named = tokenizer._tokenizer.get_vocab()
    words = ["▁Hello", "▁", "▁world", "ly", ".", "</s>", "▁Hello", "</s>", "ly", "▁▁", "é", "▁日", ".", "▁"]
    smile = list("🙂".encode())
    ids = [named[word] for word in words[:4]] + smile + smile + [named[word] for word in words[4:]] + smile[:2]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).startswith("Hello  worldly🙂🙂. Hellol")
    assert "".join(pieces[:-1]).count("\ufffd") == 0
    assert pieces[4:8] == ["", "", "", "🙂"]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_byte_fallback_tokens_add_up(seed):
    tokenizer = byte_fallback_tokenizer()
    draw = random.Random(seed)
    chunks = [list("é".encode()), list("日".encode()), list("🙂".encode()), *([i] for i in range(256, 265))]
    ids = [token for _ in range(80) for token in draw.choice(chunks)]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_text_before_half_a_character_is_shown_at_once():
    tokenizer = byte_fallback_tokenizer()

    class TwoInOne(TokenizersTokenizer):
        """Token 1000 is a full stop followed by the first byte of a character."""

        def _decode(self, ids):
            raw = b"".join(b".\xf0" if i == 1000 else bytes([i]) for i in ids)
            return raw.decode("utf-8", errors="replace")

    decoder = IncrementalDecoder(TwoInOne(tokenizer._tokenizer))
    assert [decoder.push(i) for i in (65, 1000, 0x9F, 0x99, 0x82, 66)] == ["A", ".", "", "", "🙂", "B"]


def test_each_push_decodes_a_few_tokens_only():
    tokenizer = load_tokenizer(TINY_LLAMA)
    sizes = []

    class Counting(TransformersTokenizer):
        def _decode(self, ids):
            sizes.append(len(ids))
            return super()._decode(ids)

    pieces_of(Counting(tokenizer._tokenizer), tokenizer.encode("The sea was calm and the night was dark. " * 40))
    assert max(sizes) <= 4


# --- stop strings ----------------------------------------------------------------------------------------------------


def run_stops(strings: list[str], texts: list[str]) -> tuple[list[str], bool]:
    stops = StopStrings(strings)
    shown = [stops.push(text) for text in texts]
    return [*shown, stops.finish()], stops.is_found


@pytest.mark.parametrize(
    ("strings", "texts", "shown", "is_found"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", "", "", ""], True),
        (["END"], ["a", "E", "N", "E", "N", "x"], ["a", "", "", "EN", "", "ENx", ""], False),
        (["END"], ["aENDb"], ["a", ""], True),
        (["END"], ["aEN"], ["a", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], True),
        (["ab", "b"], ["a", "b"], ["", "", ""], True),
        (["abcd", "bc"], ["a", "b", "c"], ["", "", "a", ""], True),
        (["\n\n", "User:"], ["x\n", "\nUs"], ["x", "", ""], True),
        ([], ["a", "b"], ["a", "b", ""], False),
        (["é🙂"], ["né", "🙂"], ["n", "", ""], True),
    ],
)
def test_stop_strings_hold_back_what_may_begin_one(strings, texts, shown, is_found):
    assert run_stops(strings, texts) == (shown, is_found)


@pytest.mark.parametrize("seed", range(30))
def test_stop_strings_cut_at_the_first_one_however_the_text_is_split(seed):
    draw = random.Random(seed)
    text = "".join(draw.choice("ab") for _ in range(60))
    strings = ["".join(draw.choice("ab") for _ in range(draw.randrange(3, 7))) for _ in range(2)]
    # Character by character: the end is where the first stop string completes.
    ends = [end for end in range(len(text)) if any(text[: end + 1].endswith(string) for string in strings)]
    shown, is_found = run_stops(strings, list(text))
    assert is_found == bool(ends)
    if ends:
        start = min(ends[0] + 1 - len(s) for s in strings if text[: ends[0] + 1].endswith(s))
        assert "".join(shown) == text[:start]
    else:
        assert "".join(shown) == text


def test_special_tokens_as_stop_strings_become_token_ids():
    tokenizer = load_tokenizer(TINY_LLAMA)
    assert StopStrings.special_ids(["x", "<|endoftext|>"], tokenizer) == [0]
    with pytest.raises(UnsupportedError) as caught:
        StopStrings.special_ids(["<|endoftext|>\n"], tokenizer)
    assert str(caught.value) == (
        "[generate] stop_strings: found '<|endoftext|>\\n', which mixes the special token '<|endoftext|>' with other "
        "text, needs one or the other, because special tokens are left out of the text. Use '<|endoftext|>'."
    )
