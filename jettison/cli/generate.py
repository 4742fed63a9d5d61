"""`jettison generate`: continue a prompt, streaming to stdout."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import TYPE_CHECKING, Any

from jettison.cli.artifact import open_model
from jettison.cli.console import Terminal
from jettison.cli.parser import add_artifact, add_threads, seed, token_ids
from jettison.ir.errors import OptionError

if TYPE_CHECKING:
    from jettison.optimized_model import OptimizedModel
    from jettison.runtime.generation import GeneratedRow, GenerationResult

_SAMPLING = ("temperature", "top_k", "top_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; their names and meaning are those of `generate` in transformers."""
    add_artifact(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue; - reads it from stdin")
    prompt.add_argument(
        "--prompt-ids", type=token_ids, metavar="IDS", help="token ids such as 5,17,3, for a model without tokenizer"
    )
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat", action="store_true", default=None,
        help="give the prompt to the tokenizer's chat template as the user's message; the default where it has one",
    )  # fmt: skip
    chat.add_argument("--raw", dest="chat", action="store_false", help="continue the prompt as it stands")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most new tokens (default: the model's, else 20)"
    )
    parser.add_argument(
        "--do-sample", action=argparse.BooleanOptionalAction, default=None,
        help="draw tokens at random instead of taking the likeliest (default: the model's choice, or yes if "
        "--temperature, --top-k or --top-p is given)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; 0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K best tokens; 0 means all")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the best tokens that hold P probability")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given repeatedly")
    parser.add_argument("--seed", type=seed, metavar="N", help="of the draws (default: another one every time)")
    add_threads(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    settings = _settings(args)
    model = open_model(args)
    if args.prompt_ids is not None:
        prompt, ids = None, args.prompt_ids
    else:
        prompt = _read_prompt(args.prompt)
        ids = _encode(model, prompt, args.chat)
    if args.prompt_ids is None and not terminal.is_json:
        result = _stream(model, ids, settings, terminal)
    else:
        result = model.generate_rows([ids], **settings)
    row = result.rows[0]
    if terminal.is_json:
        terminal.document(_document(prompt, row, result, settings["seed"]))
    elif args.prompt_ids is not None:
        terminal.line(row.text if row.text is not None else ",".join(map(str, row.token_ids)))
    else:
        terminal.text("\n")
    speed = f", {result.steps / result.decode_seconds:.1f} tokens/s" if result.decode_seconds else ""
    terminal.note(
        f"{row.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, {len(row.token_ids)} new{speed}, ended "
        f"by {row.finish_reason}, seed {settings['seed']}"
    )
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    do_sample = args.do_sample
    if do_sample is None and any(getattr(args, name) is not None for name in _SAMPLING):
        # Greedy search would drop these settings silently; a temperature of 0 is how other tools ask for it.
        do_sample = args.temperature != 0
    return {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": do_sample,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "stop_strings": args.stop,
        # Drawn here and shown, so that any output can be had again.
        "seed": secrets.randbelow(2**31) if args.seed is None else args.seed,
    }


def _read_prompt(given: str) -> str:
    try:
        prompt = sys.stdin.read() if given == "-" else given
        prompt.encode()  # an argument that is not UTF-8 holds lone surrogates, which no tokenizer takes
    except UnicodeError as error:
        raise OptionError(
            f"[generate] the prompt is not UTF-8 text ({error}). Convert it, for example with iconv."
        ) from error
    return prompt


def _encode(model: OptimizedModel, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt, through the chat template if asked for or, by default, if there is one."""
    tokenizer = model.tokenizer
    if chat is True or (chat is None and tokenizer.has_chat_template):
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def _stream(model: OptimizedModel, ids: list[int], settings: dict[str, Any], terminal: Terminal) -> GenerationResult:
    pieces = model.stream(ids, **settings)
    while True:
        try:
            terminal.text(next(pieces))
        except StopIteration as end:
            result: GenerationResult = end.value
            return result


def _document(prompt: str | None, row: GeneratedRow, result: GenerationResult, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": row.text,
        "token_ids": list(row.token_ids),
        "finish_reason": row.finish_reason,
        "prompt_tokens": row.prompt_tokens,
        "new_tokens": len(row.token_ids),
        "seed": seed,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "decode_tokens_per_s": result.steps / result.decode_seconds if result.decode_seconds else None,
    }
