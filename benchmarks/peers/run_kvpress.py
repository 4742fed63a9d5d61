"""KV eviction by kvpress: `python run_kvpress.py MODEL_FOLDER WINDOWS.json OUT.json`.

Runs in a virtual environment of its own, as kvpress pins transformers below 5.3:

    python3.11 -m venv kvpress && kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5 "transformers<5.3"

WINDOWS.json holds `windows` (lists of token ids), `prefill` (tokens of each window that are prefilled under the press),
`ratios` (fraction of the prefilled tokens that is kept), `recall` (`prompt` and `answer` ids; see recall_task.py) and
perhaps `recall_tail`: how many tokens at the end of each recall prompt are hidden from the press and run behind it.

Everything is fp32 with eager attention, which ObservedAttention needs, so all rows share one attention. A press evicts
once, after the prefill. The tokens behind it go through the model in one forward over what is left of the cache, at
their true positions; `one_by_one_difference` is how far that is from decoding them one at a time: the largest
difference of a log-probability over the vocabulary, first window, smallest ratio.

As in `jettison.evaluate`, tokens P to W - 1 of a window of W are scored. The first of them is scored by the last logits
of the prefill, which eviction cannot change. Without a tail the same holds for the first token of a recalled answer, so
`recall_nll_decoded` leaves it out. KL(full cache || press) is in nats per scored token, summed in fp64. `recall_exact`
needs no second pass: a greedy answer is right when each of its tokens is the likeliest behind the right ones before it.

kvpress knows no OPT: a press looks for `model.model.layers`. `show_decoder` names the decoder where it also looks; the
message of what happens without that is `error_as_shipped`.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from torch import Tensor

SNAPKV_WINDOW = 32
PRESSES: dict[str, Callable[[float], Any]] = {
    "SnapKV": lambda evicted: kvpress.SnapKVPress(compression_ratio=evicted, window_size=SNAPKV_WINDOW),
    "StreamingLLM": lambda evicted: kvpress.StreamingLLMPress(compression_ratio=evicted, n_sink=4),
    "ObservedAttention": lambda evicted: kvpress.ObservedAttentionPress(compression_ratio=evicted),
    "Knorm": lambda evicted: kvpress.KnormPress(compression_ratio=evicted),
}
FULL = ("full", 1.0)


def kept_tokens(tokens: int, ratio: float) -> int:
    """How many of the tokens a ratio keeps; rounding of the ratio loses none."""
    return max(1, int(tokens * ratio + 1e-9))


def build_press(name: str, ratio: float, tokens: int) -> Any:
    """A press that keeps exactly `kept_tokens`, or None for the full cache.

    kvpress keeps `int(tokens * (1 - evicted))`, so aim at the middle between two whole numbers.
    """
    if name == FULL[0]:
        return None
    return PRESSES[name](max(0.0, 1 - (kept_tokens(tokens, ratio) + 0.5) / tokens))


def error_as_shipped(model: Any) -> str | None:
    """What a press says to this model, or None where it accepts it."""
    try:
        with kvpress.KnormPress(0.5)(model):
            return None
    except AttributeError as error:
        return f"{type(error).__name__}: {error}"


class Peer:
    """A model under one press at a time.

    Args:
        folder: Hugging Face folder.
    """

    def __init__(self, folder: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.error_as_shipped = error_as_shipped(self.model)
        self.prefill_options: dict[str, Any] = {}
        if self.error_as_shipped is not None:
            self.show_decoder()

    def show_decoder(self) -> None:
        """Let kvpress find the layers of a model that keeps them in `model.model.decoder`.

        Nothing of kvpress changes. Its hooks read the layers of `language_model`, hand every layer `rotary_emb`, which
        no scorer here uses, and score by the attention probabilities that OPT returns on request: SnapKV too, which
        otherwise computes them with rotary positions.
        """
        decoder = self.model.model.decoder
        decoder.rotary_emb = None
        object.__setattr__(self.model.model, "language_model", decoder)  # a name, not a second submodule
        self.prefill_options = {"output_attentions": True}

    @torch.inference_mode()
    def prefill(self, tokens: list[int], press: Any) -> tuple[transformers.DynamicCache, Tensor]:
        """The cache that a press leaves, and the log-probabilities `[1, V] f64` of the token after the prompt."""
        cache = transformers.DynamicCache()
        inputs = {"input_ids": torch.tensor([tokens]), "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        if press is None:
            out = self.model(**inputs)
        else:
            with press(self.model):
                out = self.model(**inputs, **self.prefill_options)
        return cache, out.logits[0].double().log_softmax(-1)

    @torch.inference_mode()
    def follow(self, cache: transformers.DynamicCache, tokens: list[int], start: int) -> Tensor:
        """Log-probabilities `[S, V] f64` behind each of S tokens whose positions count from `start`.

        A compressed cache is shorter than the positions its keys were rotated for, so positions are explicit.
        """
        if not tokens:
            return torch.empty(0, self.model.config.vocab_size, dtype=torch.float64)
        positions = torch.arange(start, start + len(tokens))[None]
        out = self.model(
            input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, position_ids=positions
        )
        return out.logits[0].double().log_softmax(-1)

    def log_probs(self, tokens: list[int], prompt: int, name: str, ratio: float) -> tuple[Tensor, int]:
        """Log-probabilities `[S - prompt, V] f64` of tokens `prompt` to S - 1, and the bytes that eviction left."""
        cache, first = self.prefill(tokens[:prompt], build_press(name, ratio, prompt))
        if any(layer.keys.shape[2] != kept_tokens(prompt, ratio) for layer in cache.layers):
            sys.exit(f"{name} at ratio {ratio} did not keep {kept_tokens(prompt, ratio)} of {prompt} tokens")
        state_bytes = allocated_bytes(cache)
        return torch.cat([first, self.follow(cache, tokens[prompt:-1], prompt)]), state_bytes

    def one_by_one_difference(self, tokens: list[int], prompt: int, name: str, ratio: float) -> float:
        """Largest difference between `log_probs` and the same tokens decoded one at a time."""
        together, _ = self.log_probs(tokens, prompt, name, ratio)
        cache, first = self.prefill(tokens[:prompt], build_press(name, ratio, prompt))
        steps = [self.follow(cache, [tokens[at]], at) for at in range(prompt, len(tokens) - 1)]
        return (torch.cat([first, *steps]) - together).abs().max().item()


def allocated_bytes(cache: transformers.DynamicCache) -> int:
    """Bytes of the storages that a cache's tensors hold, each counted once."""
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def targets(log_probs: Tensor, tokens: list[int]) -> Tensor:
    """Log-probabilities `[S] f64` of the tokens."""
    return log_probs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


@dataclass
class Sums:
    """What one press at one ratio adds up over windows and recall items."""

    kl: float = 0.0
    nll: float = 0.0
    full_nll: float = 0.0
    agreed: int = 0
    scored: int = 0
    state_bytes: int = 0
    items: int = 0
    exact: int = 0
    answer_nll: float = 0.0
    answer_tokens: int = 0
    decoded_nll: float = 0.0
    decoded_tokens: int = 0

    def add_window(self, full: Tensor, found: Tensor, tokens: list[int], state_bytes: int) -> None:
        """Count the scored tokens of a window."""
        self.kl += (full.exp() * (full - found)).sum().item()
        self.nll -= targets(found, tokens).sum().item()
        self.full_nll -= targets(full, tokens).sum().item()
        self.agreed += int((full.argmax(-1) == found.argmax(-1)).sum())
        self.scored += len(tokens)
        self.state_bytes = max(self.state_bytes, state_bytes)

    def add_item(self, found: Tensor, answer: list[int], tail: int) -> None:
        """Count a recall item of whose prompt `tail` tokens ran behind the press."""
        losses = -targets(found, answer)
        self.items += 1
        self.exact += found.argmax(-1).tolist() == answer
        self.answer_nll += losses.sum().item()
        self.answer_tokens += len(answer)
        decoded = losses if tail else losses[1:]
        self.decoded_nll += decoded.sum().item()
        self.decoded_tokens += len(decoded)

    def row(self, name: str, ratio: float, prefill: int) -> dict[str, Any]:
        """The means, JSON-ready; None where there was nothing to count."""
        return {
            "press": name,
            "ratio": ratio,
            "kept_tokens": kept_tokens(prefill, ratio),
            "state_bytes": self.state_bytes,
            "kl": self.kl / self.scored,
            "perplexity": math.exp(self.nll / self.scored),
            "full_perplexity": math.exp(self.full_nll / self.scored),
            "top1_agreement": self.agreed / self.scored,
            "recall_exact": self.exact / self.items if self.items else None,
            "recall_nll": self.answer_nll / self.answer_tokens if self.items else None,
            "recall_nll_decoded": self.decoded_nll / self.decoded_tokens if self.decoded_tokens else None,
        }


def check(request: dict[str, Any]) -> None:
    """Exit where a press could not do what its name says."""
    prompts = [request["prefill"], *(len(item["prompt"]) - request["recall_tail"] for item in request["recall"])]
    fewest = min(kept_tokens(tokens, ratio) for tokens in prompts for ratio in request["ratios"])
    if fewest < SNAPKV_WINDOW:
        sys.exit(
            f"a ratio of {min(request['ratios'])} keeps {fewest} of {min(prompts)} tokens, less than SnapKV's window "
            f"of {SNAPKV_WINDOW}, whose rows then tie. Give longer prompts or larger ratios."
        )
    if not request["windows"] or any(len(window) <= request["prefill"] for window in request["windows"]):
        sys.exit(f"every window needs more tokens than prefill={request['prefill']}, and there must be one")


def measure(peer: Peer, request: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for the full cache, then one for each press and ratio."""
    prompt = request["prefill"]
    sums = {FULL: Sums(), **{(name, ratio): Sums() for name in PRESSES for ratio in request["ratios"]}}
    for number, window in enumerate(request["windows"]):
        full = peer.log_probs(window, prompt, *FULL)[0]
        for key, total in sums.items():
            found, state_bytes = peer.log_probs(window, prompt, *key)
            total.add_window(full, found, window[prompt:], state_bytes)
        print(f"window {number + 1} of {len(request['windows'])}", file=sys.stderr)
    for item in request["recall"]:
        tokens, answer, tail = [*item["prompt"], *item["answer"]], item["answer"], request["recall_tail"]
        for key, total in sums.items():
            found, _ = peer.log_probs(tokens, len(item["prompt"]) - tail, *key)
            total.add_item(found[tail:], answer, tail)
    return [total.row(*key, prompt) for key, total in sums.items()]


def main() -> None:
    """Measure and write."""
    folder, source, target = sys.argv[1:]
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # or it says once per prefill that it was not tried on OPT
    request = {"recall": [], "recall_tail": 0, **json.loads(Path(source).read_text())}
    check(request)
    peer = Peer(folder)
    rows = measure(peer, request)
    smallest = min(request["ratios"])
    differences = {
        name: peer.one_by_one_difference(request["windows"][0], request["prefill"], name, ratio)
        for name, ratio in [FULL, *((name, smallest) for name in PRESSES)]
    }
    about = {
        "versions": {name: version(name) for name in ("kvpress", "transformers", "torch")}
        | {"python": platform.python_version()},
        "model": Path(folder).name,
        "model_type": peer.model.config.model_type,
        "dtype": "float32",
        "attention": "eager",
        "error_as_shipped": peer.error_as_shipped,
        "prefill": request["prefill"],
        "windows": len(request["windows"]),
        "scored_tokens": sum(len(window) - request["prefill"] for window in request["windows"]),
        "recall_items": len(request["recall"]),
        "recall_tail": request["recall_tail"],
        "one_by_one_difference": differences,
    }
    Path(target).write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
