"""`jettison generate`: continue a prompt, streaming to stdout."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jettison.cli.artifact import open_model
from jettison.cli.console import Terminal
from jettison.cli.parser import add_artifact, add_running, seed, token_ids
from jettison.ir.errors import OptionError

if TYPE_CHECKING:
    from jettison.optimized_model import OptimizedModel
    from jettison.runtime.generation import GeneratedRow, GenerationResult

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


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
        "--temperature, --top-k, --top-p, --min-p or more than one sequence is asked for)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; 0 takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K best tokens; 0 means all")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the best tokens that hold P probability")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="sample among the tokens at least P times as likely as the best one"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R",
        help="make tokens that are already there less likely: above 1, 1.1 say; also without sampling",
    )  # fmt: skip
    parser.add_argument(
        "--num-return-sequences", type=int, default=1, metavar="N",
        help="draw N continuations; with more than one, each is written when all are complete (default: 1)",
    )  # fmt: skip
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given repeatedly")
    parser.add_argument("--seed", type=seed, metavar="N", help="of the draws (default: another one every time)")
    add_running(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    settings = _settings(args)
    model = open_model(args, terminal)
    if args.prompt_ids is not None:
        prompt, ids = None, args.prompt_ids
    else:
        prompt = _read_prompt(args.prompt)
        ids = _encode(model, prompt, args.chat)
    is_streamed = args.prompt_ids is None and args.num_return_sequences == 1 and not terminal.is_json
    result = _stream(model, ids, settings, terminal) if is_streamed else model.generate_rows([ids], **settings)
    if terminal.is_json:
        terminal.document(_document(prompt, result, settings["seed"]))
    elif is_streamed:
        terminal.text("\n")
    else:
        _write_rows(result.rows, terminal)
    new = sum(len(row.token_ids) for row in result.rows)
    speed = f", {(new - len(result.rows)) / result.decode_seconds:.1f} tokens/s" if result.decode_seconds else ""
    terminal.note(
        f"{result.rows[0].prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, {new} new{speed}, ended by "
        f"{', '.join(row.finish_reason for row in result.rows)}, seed {settings['seed']}"
    )
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    do_sample = args.do_sample
    asks = args.num_return_sequences > 1 or any(getattr(args, name) is not None for name in _SAMPLING)
    if do_sample is None and asks:
        # Greedy search would drop these settings silently; a temperature of 0 is how other tools ask for it.
        do_sample = args.temperature != 0
    return {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": do_sample,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "num_return_sequences": args.num_return_sequences,
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


def _write_rows(rows: Sequence[GeneratedRow], terminal: Terminal) -> None:
    """Write each continuation, under its number if there are several; ids where there is no tokenizer."""
    for number, row in enumerate(rows, 1):
        if len(rows) > 1:
            terminal.line(f"--- {number} of {len(rows)}")
        terminal.line(row.text if row.text is not None else ",".join(map(str, row.token_ids)))


def _document(prompt: str | None, result: GenerationResult, seed: int) -> dict[str, Any]:
    rows = [
        {
            "text": row.text,
            "token_ids": list(row.token_ids),
            "finish_reason": row.finish_reason,
            "new_tokens": len(row.token_ids),
        }
        for row in result.rows
    ]
    new = sum(len(row.token_ids) for row in result.rows)
    decoded = new - len(rows)  # the first token of each comes from the prompt
    return {
        "prompt": prompt,
        **(rows[0] if len(rows) == 1 else {"continuations": rows}),
        "prompt_tokens": result.rows[0].prompt_tokens,
        "seed": seed,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "decode_tokens_per_s": decoded / result.decode_seconds if result.decode_seconds else None,
    }
