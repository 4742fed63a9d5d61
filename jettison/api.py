"""`optimize` and `load`: the one place where capture, passes, code generation and runtime meet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from jettison.artifact_files import ArtifactContents, load_artifact, save_artifact, temporary_executor
from jettison.calibration import LENGTH, WINDOWS, Calibration, finished_layers
from jettison.codegen.onnx.emit import weight_bytes
from jettison.codegen.onnx.fast_prefill import fast_bytes
from jettison.codegen.triton.ahead_of_time import check_archs
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.program import PassRecord, Program
from jettison.ir.text import program_text
from jettison.optimized_model import OptimizedModel
from jettison.passes import USER_PASSES
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.factorizers import FACTORIZERS, Factorizer
from jettison.passes.formats import FORMATS, WeightFormat
from jettison.passes.grammar import format_pipeline, parse_pipeline
from jettison.passes.methods import METHODS, Method
from jettison.passes.options import build, lookup, to_spec
from jettison.passes.pipeline import apply, prepare
from jettison.passes.place_weights import PlaceWeights
from jettison.passes.policies import POLICIES, Policy
from jettison.passes.predictors import PREDICTORS, Predictor
from jettison.passes.pruners import PRUNERS, Pruner
from jettison.report import Report
from jettison.runtime.onnx_executor import multiplies_int8
from jettison.runtime.tokenizer import Tokenizer, load_tokenizer
from jettison.runtime.tunings import stopwatch
from jettison.sample_text import load_text, load_windows
from jettison.source import ModelSource, open_source

if TYPE_CHECKING:
    from jettison.drift import DriftCheck

TARGETS = ("onnx", "torch", "triton")
PREFILLS = ("exact", "fast")
AfterPass = Callable[[Pass, PassRecord, Program], None]


def parse_passes(text: str) -> list[Pass]:
    """Passes from a textual pipeline.

    Args:
        text: E.g. `quantize-weights{bits=4,group=32},cache-kv{policy=full}`.

    Raises:
        OptionError: A syntax error (points at the column), an unknown pass or option, or a value out of range.
    """
    registry = {pass_.name: pass_ for pass_ in USER_PASSES}
    registries: dict[type, Mapping[str, type]] = {
        Policy: POLICIES, WeightFormat: FORMATS, Method: METHODS, Predictor: PREDICTORS,
        Factorizer: FACTORIZERS, Pruner: PRUNERS,
    }  # fmt: skip
    return [
        build(lookup(spec.name, registry, "pass", text, spec.column), spec, where=text, registries=registries)
        for spec in parse_pipeline(text)
    ]


def pipeline_text(passes: Sequence[Pass]) -> str:
    """Canonical text of passes."""
    return format_pipeline([to_spec(pass_, pass_.name) for pass_ in passes])


def with_cache(passes: Sequence[Pass], program: Program) -> list[Pass]:
    """The passes, with `cache-kv{policy=full}` behind them (before `place-weights`) for a decoder without a cache."""
    needs_cache = program.info.kind == "decoder" and not any(isinstance(pass_, CacheKV) for pass_ in passes)
    if not needs_cache:
        return list(passes)
    # What is placed is what runs: placing comes last.
    last = next((index for index, pass_ in enumerate(passes) if isinstance(pass_, PlaceWeights)), len(passes))
    return [*passes[:last], CacheKV(), *passes[last:]]


def optimize(
    model: nn.Module | str | Path,
    passes: Sequence[Pass] | str = (),
    *,
    target: str = "onnx",
    prefill: str = "exact",
    strict: bool = False,
    check: bool = False,
    max_kl: float | None = None,
    dtype: str = "float32",
    context: int | None = None,
    seed: int = 0,
    calibration: str | Path | None = None,
    calibration_size: tuple[int, int] = (WINDOWS, LENGTH),
    resume: str | Path | None = None,
    archs: Sequence[str] = (),
    tune: bool = False,
    allow_spinning: bool = True,
    after_each: AfterPass | None = None,
) -> OptimizedModel:
    """Rewrite a model with passes.

    Args:
        model: A Hugging Face folder, a transformers model, or a module whose forward takes `input_ids`.
        passes: Pass objects or the text of a pipeline. A decoder without `cache-kv` gets `cache-kv{policy=full}`.
        target: `onnx` (runs with ONNX Runtime, can be shipped), `torch`, or `triton` (kernels for NVIDIA GPUs; without
            one Triton's interpreter runs them, very slowly).
        prefill: `fast` also emits an ONNX graph that runs prompts in 8-bit integers, from a second copy of the weights.
        strict: Whether a place where a pass could not fire is an error.
        check: Whether to run the program before and after every pass on a few tokens and report the drift.
        max_kl: With `check` (which it implies): the KL divergence, in nats per token, that no pass may exceed.
        dtype: What the graph computes in; `onnx` needs `float32`, and GPUs are fastest with `bfloat16`.
        context: Most positions of a sequence, for a module that does not say.
        seed: Of the tokens that the model writes for passes to be calibrated or checked on.
        calibration: A text file whose tokens are used instead.
        calibration_size: Windows, and tokens of each, that passes are calibrated on.
        resume: A folder for the layers that a calibrated pass has finished: made by the first, read by a run with the
            same model and options after an interruption. It can go when the model is saved.
        archs: GPUs that kernels are compiled for when the model is saved, such as `sm_90`; needs no GPU.
        tune: Whether saving measures which tile sizes of the kernels are fastest on this machine's GPU.
        allow_spinning: Whether idle threads of ONNX Runtime spin: faster steps, but they slow torch in this process.
        after_each: Called with each pass, its record and the program.

    Returns:
        The optimised model.

    Raises:
        CaptureError: The model cannot be read or captured.
        OptionError: A bad setting.
        UnsupportedError: `strict`, and a pass could not fire somewhere.
        BudgetExceeded: A pass exceeded `max_kl`.
    """
    _check_target(target, prefill, dtype, archs, tune)
    chosen = _checked(parse_passes(passes) if isinstance(passes, str) else list(passes), target)
    started = time.perf_counter()
    if calibration is not None:
        load_text(calibration)  # refuses a file that cannot be read before the work, not after
    source = open_source(model, dtype=dtype, context=context)
    if calibration is not None:
        source.calibration_sha256 = hashlib.sha256(Path(calibration).read_bytes()).hexdigest()
    program = source.program
    program.target = target
    prepare(program)
    tokens = Calibration.of(source, calibration, calibration_size, seed)
    program.finished = None if resume is None else finished_layers(Path(resume), source, pipeline_text(chosen), tokens)
    raised = [miss for record in program.history for miss in record.misses]
    program.history.clear()
    before = program_text(program)
    chosen = with_cache(chosen, program)
    program.pipeline = pipeline_text(chosen)
    drift = _drift_check(source, calibration, max_kl, seed) if check or max_kl is not None else None

    records = apply(program, chosen, strict=strict, after_each=_one_after_the_other(drift, after_each))
    # What a pass planned takes its place: the text says what was done.
    texts = [record.plan or pipeline_text([pass_]) for pass_, record in zip(chosen, records, strict=True)]
    program.pipeline = ",".join(texts)
    source.calibration_sha256 = tokens.sha256 or source.calibration_sha256
    report = Report(
        model=program.info.name, source=source.name, pipeline=program.pipeline, target=target, passes=records,
        raised=raised, source_bytes=source.weight_bytes,
        weight_bytes=weight_bytes(program) if target == "onnx" else program.weight_bytes(),
        state_bytes=program.state_bytes(1, program.info.context), context=program.info.context,
        seconds=time.perf_counter() - started, prefill=prefill,
        prefill_bytes=fast_bytes(program) if prefill == "fast" else 0, calibration=tokens.as_dict(),
    )  # fmt: skip
    optimized = _wrap(source, program, report, before, seed, allow_spinning, archs, tune)
    if drift is not None and prefill == "fast" and program.info.kind == "decoder" and multiplies_int8():
        report.prefill_kl = drift.of_prompts(optimized.session)
    return optimized


def _one_after_the_other(*callbacks: AfterPass | None) -> AfterPass:
    def call_all(pass_: Pass, record: PassRecord, current: Program) -> None:
        for callback in callbacks:
            if callback is not None:
                callback(pass_, record, current)

    return call_all


def _check_target(target: str, prefill: str, dtype: str, archs: Sequence[str], tune: bool) -> None:
    if target not in TARGETS:
        raise OptionError(f"[optimize] target={target!r}: needed one of {', '.join(TARGETS)}.")
    if prefill not in PREFILLS or (prefill == "fast" and target != "onnx"):
        raise OptionError(
            f"[optimize] prefill={prefill!r} with target={target!r}: needed one of {', '.join(PREFILLS)}; fast "
            "needs the ONNX target."
        )
    if target == "onnx" and dtype != "float32":
        raise OptionError(
            f"[optimize] dtype={dtype!r} with target='onnx': CPU graphs compute in float32. Leave it out."
        )
    if archs:
        if target != "triton":
            raise OptionError(
                f"[optimize] archs={','.join(archs)} with target={target!r}: only triton compiles kernels."
            )
        check_archs(archs)
    if tune and target != "triton":
        raise OptionError(f"[optimize] tune with target={target!r}: only kernels of triton have tile sizes to choose.")
    if tune:
        stopwatch()  # refuses a machine without a GPU before the work, not after


def _checked(chosen: list[Pass], target: str) -> list[Pass]:
    for pass_ in chosen:
        reason = pass_.unsupported_on(target)
        if reason is not None:
            raise UnsupportedError(
                f"[optimize] {pipeline_text([pass_])} with target={target!r}: {reason}. Change the options, or the "
                "target."
            )
    return chosen


def _drift_check(source: ModelSource, calibration: str | Path | None, max_kl: float | None, seed: int) -> DriftCheck:
    from jettison.drift import DriftCheck, row_tokens

    program, windows = source.program, None
    if calibration is not None:
        if source.folder is None:
            raise OptionError("[optimize] calibration: a module has no tokenizer for the text. Give a model folder.")
        windows = load_windows(calibration, load_tokenizer(source.folder), row_tokens(program))
    return DriftCheck(program, max_kl=max_kl, seed=seed, windows=windows)


def _wrap(
    source: ModelSource, program: Program, report: Report, before: str, seed: int, allow_spinning: bool,
    archs: Sequence[str],
    tune: bool,
) -> OptimizedModel:  # fmt: skip
    contents = ArtifactContents(source, program, report, before, program_text(program), seed, tuple(archs), tune)
    folder = source.folder

    def tokenizer() -> Tokenizer:
        if folder is None:
            raise UnsupportedError(
                f"[tokenizer] {program.info.name} was given as a module, without a tokenizer. Pass token ids, or "
                "optimise its folder."
            )
        return load_tokenizer(folder)

    return OptimizedModel(
        program.info,
        report,
        contents.graph_before,
        contents.graph_after,
        open_executor=lambda: temporary_executor(contents, allow_spinning=allow_spinning),
        save=lambda out, overwrite: save_artifact(contents, out, overwrite=overwrite),
        tokenizer=tokenizer,
        generation_config=source.generation_config,
        source=source.folder or source.module,
        source_sha256=source.content_hash,
    )


def load(
    folder: str | Path,
    *,
    verify: bool = False,
    threads: int | None = None,
    allow_spinning: bool = True,
    trust_kernels: bool = False,
) -> OptimizedModel:
    """Open an artifact folder.

    Args:
        folder: What `save_pretrained` or `jettison optimize` wrote.
        verify: Check the hash of every file, not only of small ones.
        threads: Threads within an operator; default the runtime's own choice.
        allow_spinning: See `optimize`.
        trust_kernels: Whether machine code in the folder may run. It is not checked against its source, so trust who
            wrote it. Without, or for another GPU or Triton (a warning says so), kernels are compiled when they first
            run.

    Returns:
        The model.

    Raises:
        ArtifactError: The folder is no artifact, is damaged, or was written by a newer jettison.
        UnsupportedError: The installed ONNX Runtime is too old for it.
    """
    return load_artifact(
        Path(folder), verify=verify, threads=threads, allow_spinning=allow_spinning, trust_kernels=trust_kernels
    )
