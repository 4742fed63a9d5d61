"""Chains of segments: the same numbers as one graph, memory that stays below the ring, and files that are damaged."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import jettison
from jettison.artifact_files import _onnx_executor
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.runtime import mapped_weights
from jettison.runtime.artifact import Artifact
from jettison.runtime.executor import Executor
from jettison.runtime.mapped_weights import PIECE_BYTES, MappedFile, Mapping, added
from jettison.runtime.mounts import mount_of
from jettison.runtime.onnx_executor import OnnxExecutor
from jettison.runtime.prepared import prepared_folder
from jettison.runtime.segmented_onnx import SegmentedOnnxExecutor
from jettison.segment_files import open_segments, packed_segments
from tests.models.shortened import shortened
from tests.runtime.placing import on_disk
from tests.runtime.started import Started

PROMPT = [[1, 40, 7, 300, 12], [1, 9, 77, 5, 210]]
INT4 = "quantize-weights{bits=4,group=32}"
MB = 1_000_000
pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(scope="module")
def two_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortened("tiny-opt", 2, tmp_path_factory.mktemp("opt") / "model")


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shortened("tiny-llama", 1, tmp_path_factory.mktemp("llama") / "model")


def logits_of(model: Any, steps: int = 20) -> torch.Tensor:
    """`[B, P + steps, V]`: of a prompt and of steps that depend on nothing but the model."""
    session = model.session(2, 64)
    parts = [session.prefill(PROMPT)]
    for step in range(steps):
        parts.append(session.decode([(11 * step) % 250 + 3, (7 * step) % 250 + 3]))
    return torch.cat([part.reshape(2, -1, part.shape[-1]) for part in parts], 1)


def open_unpacked(folder: Path) -> Any:
    """An artifact as it is, but with weights that are mapped, as those of segments are."""
    artifact = Artifact.open(folder)
    for graph in artifact.manifest["graphs"]:
        graph["is_mapped"] = True
    model = jettison.load(folder, threads=1, allow_spinning=False)
    model._executor = _onnx_executor(artifact, 1, False)
    return model


def optimize(model: Any, passes: str, place: Any = None) -> Any:
    return jettison.optimize(model, passes, after_each=place, allow_spinning=False)


def chained(model: Path, passes: str, out: Path, **placed: Any) -> Any:
    optimize(model, passes, on_disk(**placed)).save_pretrained(out)
    return jettison.load(out, threads=1)


@pytest.mark.parametrize(
    ("passes", "ring_bytes", "share", "seed"),
    [
        ("", 6 * MB, 1.0, 0),
        ("", 3 * MB, 1.0, 0),  # the head in slabs
        ("", 9 * MB, 0.5, 2),
        (INT4, MB // 2, 1.0, 0),
        (INT4, MB, 0.5, 3),
        ("quantize-weights{bits=8,group=32,skip='lm_head|embed'}", 4 * MB, 0.7, 4),
    ],
)
def test_a_chain_computes_what_one_graph_does(
    two_layers, onnx_artifact, onnx_fp32_artifact, passes, ring_bytes, share, seed, tmp_path
):
    folder = {"": onnx_fp32_artifact, INT4: onnx_artifact}.get(passes)
    if folder is None:
        folder = tmp_path / "whole"
        optimize(two_layers, passes).save_pretrained(folder)
    whole = jettison.load(folder, threads=1) if passes else open_unpacked(folder)
    model = chained(two_layers, passes, tmp_path / "chain", ring_bytes=ring_bytes, share=share, seed=seed)
    assert isinstance(model.executor, SegmentedOnnxExecutor)
    assert model.executor.is_prepared == bool(packed_segments(Artifact.open(tmp_path / "chain")))
    expected, actual = logits_of(whole), logits_of(model)
    if passes.endswith("embed'}"):  # beside packed weights that stream, others are packed as well
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)
    else:
        assert torch.equal(actual, expected)
    assert 0 < model.executor.statistics.most_bytes <= ring_bytes == model.executor.ring_bytes
    assert not list((tmp_path / "chain").glob("genai*")) + list((tmp_path / "chain").glob("scores*"))


def test_another_model(two_opt, tmp_path):
    jettison.optimize(two_opt, "").save_pretrained(tmp_path / "whole")
    expected = logits_of(open_unpacked(tmp_path / "whole"))
    assert torch.equal(logits_of(chained(two_opt, "", tmp_path / "chain", ring_bytes=8 * MB)), expected)


@pytest.mark.parametrize(
    "passes",
    [
        "cache-kv{policy=snapkv{budget=24,window=8}}",
        "approximate-lm-head{candidates=64}",
    ],
)
def test_policies_and_heads_work_as_they_do_in_one_graph(one_layer, passes, tmp_path):
    made = jettison.optimize(one_layer, passes)
    made.save_pretrained(tmp_path / "whole")
    chain = chained(one_layer, passes, tmp_path / "chain", ring_bytes=6 * MB)
    assert "chains" in Artifact.open(tmp_path / "chain").manifest
    prompt = [[(13 * place) % 300 + 3 for place in range(40)]]
    expected = open_unpacked(tmp_path / "whole").generate(prompt, max_new_tokens=20)
    assert chain.generate(prompt, max_new_tokens=20) == expected


def test_a_model_that_was_not_saved_runs_and_is_saved_afterwards(two_layers, tmp_path):
    made = jettison.optimize(two_layers, INT4, after_each=on_disk(MB))
    tokens = made.generate(PROMPT, max_new_tokens=5)
    assert isinstance(made.executor, SegmentedOnnxExecutor)
    assert tokens == jettison.optimize(two_layers, INT4).generate(PROMPT, max_new_tokens=5)
    made.save_pretrained(tmp_path / "out")
    assert jettison.load(tmp_path / "out", verify=True).generate(PROMPT, max_new_tokens=5) == tokens
    jettison.load(tmp_path / "out").save_pretrained(tmp_path / "copy")
    assert jettison.load(tmp_path / "copy", verify=True).generate(PROMPT, max_new_tokens=5) == tokens
    made.save_pretrained(tmp_path / "again")
    same = [(tmp_path / name / "jettison.json").read_bytes() for name in ("out", "copy", "again")]
    assert same[0] == same[1] == same[2]


def test_without_weights_on_disk_nothing_changes(two_layers, tmp_path):
    for name, settings in (("plain", {}), ("pinned", {"after_each": on_disk(MB, share=0.0)})):
        jettison.optimize(two_layers, INT4, **settings).save_pretrained(tmp_path / name)
    assert isinstance(jettison.load(tmp_path / "pinned").executor, OnnxExecutor)
    assert (tmp_path / "plain" / "jettison.json").read_bytes() == (tmp_path / "pinned" / "jettison.json").read_bytes()


def test_fast_prompts_are_refused(two_layers, tmp_path):
    made = jettison.optimize(two_layers, INT4, prefill="fast", after_each=on_disk(MB))
    with pytest.raises(UnsupportedError, match="second copy of the weights"):
        made.save_pretrained(tmp_path / "out")


# Anonymous bytes that opening and running adds, and the most that is resident of the files of segments.
MEASURE = """
import sys, jettison, torch, onnxruntime
from jettison.runtime.read_ahead import ReadAhead
def status(label):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(label))
def streamed():
    total, ours = 0, False
    for line in open("/proc/self/smaps"):
        fields = line.split()
        if not fields[0].endswith(":"):
            ours = ".segment." in line
        elif fields[0] == "Rss:" and ours:
            total += int(fields[1]) * 1024
    return total
most, release = 0, ReadAhead.release
def measured(self):
    global most
    most = max(most, streamed())
    release(self)
ReadAhead.release = measured
model = jettison.load(sys.argv[1], threads=1)
before = status("RssAnon")
executor = model.executor
session = model.session(1, 64)
session.prefill([[5] * 16])
for step in range(4):
    session.decode([step])
print(status("RssAnon") - before, most, executor.statistics.most_bytes)
"""


@pytest.mark.parametrize(("passes", "neurons", "ring"), [("", 4096, 20 * MB), (INT4, 8192, 6 * MB)])
def test_memory_stays_below_the_ring(passes, neurons, ring, tmp_path):
    """Layers of 47 MB (fp32) or 15 MB, beside which what sessions hold anyway is small."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=768, intermediate_size=neurons, num_hidden_layers=2,
        num_attention_heads=8, max_position_embeddings=64,
    )  # fmt: skip
    made = jettison.optimize(transformers.LlamaForCausalLM(config), passes, after_each=on_disk(ring))
    made.save_pretrained(tmp_path / "out")
    streamed = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.segment.*.data"))
    assert streamed > 3 * ring
    jettison.load(tmp_path / "out").executor  # noqa: B018  (packs, which is done once)
    measure = [sys.executable, "-c", MEASURE, tmp_path / "out"]
    done = subprocess.run(measure, capture_output=True, text=True, check=True)
    anonymous, most, counted = map(int, done.stdout.split())
    assert anonymous < min(20 * MB, streamed // 2), "what sessions and activations take"
    assert counted <= ring
    assert 0 < most <= ring + MB, "pages are mapped in blocks of 64 KB, also beside what is read"


def segment_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.segment.*.data"))


@pytest.fixture(scope="session")
def kept_chain(two_layers: Path, once: Any) -> Path:
    """Unquantised, all on disk. Not to be changed."""
    return once("chain-fp32", lambda out: optimize(two_layers, "", on_disk(6 * MB)).save_pretrained(out))


@pytest.fixture
def chain(kept_chain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept_chain, tmp_path / "out")


def test_a_file_that_is_cut_off_while_it_is_open(chain):
    model = jettison.load(chain, threads=1)
    tokens = model.generate(PROMPT, max_new_tokens=3)
    path = segment_files(chain)[-1]
    contents = path.read_bytes()
    os.truncate(path, 4096)
    with pytest.raises(ArtifactError, match=f"{path.name}: 4,096 bytes, needed {len(contents):,}"):
        model.generate(PROMPT, max_new_tokens=3)
    with path.open("r+b") as file:
        file.write(contents)
    with pytest.raises(ArtifactError, match=f"{path.name}: was written to after it was opened"):
        model.generate(PROMPT, max_new_tokens=3)
    assert jettison.load(chain, threads=1).generate(PROMPT, max_new_tokens=3) == tokens


def test_a_file_that_is_replaced_stays_the_one_that_was_opened(chain):
    model = jettison.load(chain, threads=1)
    tokens = model.generate(PROMPT, max_new_tokens=3)
    for path in segment_files(chain):
        path.unlink()
    assert model.generate(PROMPT, max_new_tokens=3) == tokens
    with pytest.raises(ArtifactError, match="missing"):
        jettison.load(chain)


def test_a_changed_byte_is_found_when_the_artifact_is_opened(chain):
    path = max(segment_files(chain), key=lambda path: path.stat().st_size)
    assert path.stat().st_size > 1 << 20, "smaller ones are hashed by every load"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x07\x08\x09")
    with pytest.raises(ArtifactError, match=f"{path.name}: its contents are not what was written"):
        jettison.load(chain).executor  # noqa: B018


def test_damaged_packed_weights_are_found(two_layers, tmp_path):
    model = chained(two_layers, INT4, tmp_path / "out", ring_bytes=MB)
    tokens = model.generate(PROMPT, max_new_tokens=3)
    data = max(prepared_folder(Artifact.open(tmp_path / "out")).glob("*.data"), key=lambda path: path.stat().st_size)
    contents = bytearray(data.read_bytes())
    contents[len(contents) // 2] ^= 1
    data.write_bytes(contents)
    with pytest.raises(ArtifactError, match=r"contents are not what was written.*`jettison prepare`"):
        jettison.load(tmp_path / "out").executor  # noqa: B018
    data.write_bytes(contents[:-4096])  # then it is known to be no use
    assert jettison.load(tmp_path / "out", threads=1).generate(PROMPT, max_new_tokens=3) == tokens


@pytest.mark.parametrize("is_old", [False, True])
def test_what_cannot_be_read_is_an_error_and_no_signal(is_old, tmp_path, monkeypatch):
    """The file is cut off between the check of its size and the reading."""
    path = tmp_path / "weights.data"
    path.write_bytes(bytes(range(256)) * 4096)
    file = MappedFile(path, 1 << 20)
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    (piece,) = file.pieces([(0, 1 << 20)], file.mappings(), is_whole=True)
    if is_old:
        monkeypatch.setattr(mapped_weights, "_madvise", lambda *_: errno.EINVAL)
    piece.request()
    piece.read()
    assert mapped[257] == 1
    monkeypatch.setattr(MappedFile, "check", lambda self: None)
    os.truncate(path, 4096)
    with pytest.raises(ArtifactError, match="ends at 4,096" if is_old else "the disk failed, or the file has been cut"):
        piece.read()


def in_memory(mapped: mmap.mmap) -> list[bool]:
    """Of every page of a mapped file, whether the page cache has it."""
    pages = torch.zeros(-(-len(mapped) // mmap.PAGESIZE), dtype=torch.uint8)
    address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mincore(*map(ctypes.c_size_t, (address, len(mapped), pages.data_ptr()))) == 0
    return [bool(page & 1) for page in pages.tolist()]


@pytest.mark.parametrize("is_huge", [False, True])
def test_what_was_dropped_is_not_in_the_page_cache(is_huge, tmp_path, monkeypatch):
    """Ranges begin and end within huge pages, which are dropped as a whole."""
    if mount_of(tmp_path)[1] in ("", "tmpfs"):
        pytest.skip("files in memory are never dropped")
    monkeypatch.setattr(mapped_weights, "has_large_folios", lambda path: is_huge)
    path, size = tmp_path / "weights.data", 21 * 1024 * 1024 + 5000
    with path.open("wb") as file:
        file.write(bytes(size))
        file.flush()
        os.fsync(file.fileno())
    found = MappedFile(path, size)
    with path.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE)
    found.forget(0, 0)
    ranges = [(5000, 9 << 20), ((9 << 20) + 8192, 3000), (10 << 20, 11 << 20)]
    pieces = found.pieces(ranges, found.mappings(), is_whole=True)
    if found.has_huge_pages != is_huge:
        pytest.skip("a kernel without huge pages")
    assert all(piece.offset // PIECE_BYTES == (piece.offset + piece.length - 1) // PIECE_BYTES for piece in pieces)
    assert sum(piece.length for piece in pieces) == sum(start % 4096 + length for start, length in ranges)
    for piece in pieces:
        piece.request()
        piece.read()
    pages = in_memory(mapped)
    for start, length in ranges:
        assert all(pages[start // mmap.PAGESIZE : -(-(start + length) // mmap.PAGESIZE)])
    for piece in pieces:
        piece.drop()
    # The kernel reads around small pages that are touched, less than that.
    assert sum(in_memory(mapped)) * mmap.PAGESIZE < 1 << 20


def test_an_older_kernel_reads_through_a_buffer(chain, monkeypatch):
    model = jettison.load(chain, threads=1)
    tokens = model.generate(PROMPT, max_new_tokens=3)
    real, refused = mapped_weights._madvise, []

    def madvise(address: int, length: int, advice: int) -> int:
        if advice == mapped_weights._POPULATE_READ:
            refused.append(length)
            return errno.EINVAL
        return real(address, length, advice)

    monkeypatch.setattr(mapped_weights, "_madvise", madvise)
    model = jettison.load(chain, threads=1)
    assert model.generate(PROMPT, max_new_tokens=3) == tokens
    assert refused


def test_two_threads_take_turns(chain):
    model = jettison.load(chain, threads=1)
    expected, found = model.generate(PROMPT, max_new_tokens=8), []
    both = [threading.Thread(target=lambda: found.append(model.generate(PROMPT, max_new_tokens=8))) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert found == [expected, expected]


def test_after_an_error_within_a_step_the_next_one_runs(chain):
    model = jettison.load(chain, threads=1)
    tokens = model.generate(PROMPT, max_new_tokens=3)
    _, opened, _ = model.executor._chains["decode"]

    class Broken:
        def io_binding(self) -> Any:
            raise KeyboardInterrupt

    working, opened[1].session = opened[1].session, Broken()
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT, max_new_tokens=3)
    opened[1].session = working
    assert model.generate(PROMPT, max_new_tokens=3) == tokens
    assert model.executor.statistics.most_bytes <= model.executor.ring_bytes


def test_no_thread_and_no_file_is_left(chain):
    readers = Started("jettison-read-ahead")

    def are_open() -> bool:
        paths = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
        return any(str(chain) in os.readlink(path) for path in paths if os.path.lexists(path))

    model = jettison.load(chain, threads=1)
    model.generate(PROMPT, max_new_tokens=2)
    assert readers.alive()
    assert are_open()
    model.executor.close()
    assert not readers.alive()
    with pytest.raises(OptionError, match="no entry 'forward'"):
        model.executor.run("forward", {}, {})
    del model
    gc.collect()
    assert not are_open()


def damaged(folder: Path, change: Any) -> Executor:
    artifact = Artifact.open(folder)
    manifest = json.loads(json.dumps(artifact.manifest))
    change(manifest)
    return open_segments(dataclasses.replace(artifact, manifest=manifest), [], {}, 1, None, {})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m: m["chains"][0]["segments"].pop(0), "reads .*, which nothing before it makes"),
        (lambda m: m["chains"][0]["segments"].reverse(), "reads .*, which nothing before it makes"),
        (lambda m: m["chains"][0]["segments"].pop(), "no segment makes logits"),
        (lambda m: m["chains"][0]["segments"][0].update(file=3), "3 is no name"),
        (lambda m: m["chains"][0]["segments"][0].update(file="../x"), "not the name of a file"),
        (lambda m: m["chains"][0]["segments"][0].update(file="none.onnx"), "lists no file none.onnx"),
        (lambda m: m["chains"][0]["segments"][0].update(is_packed=1), "true or false"),
        (lambda m: m["chains"][0].update(states=[]), "not described as they must be"),
        (lambda m: m.update(chains={"a": 1}), "not described as they must be"),
        (lambda m: m.update(ring_bytes="4"), "ring_bytes is '4', needed a size"),
    ],
)
def test_a_damaged_manifest(kept_chain, change, found):
    with pytest.raises(ArtifactError, match=found):
        damaged(kept_chain, change)


def test_the_command_line_knows_chains(two_layers, kept_chain, tmp_path, capsys):
    from jettison.__main__ import main

    out = tmp_path / "out"
    jettison.optimize(two_layers, INT4, after_each=on_disk(MB)).save_pretrained(out)
    assert main(["prepare", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 0
    assert jettison.load(out).executor.is_prepared
    assert main(["inspect", str(out), "--json"]) == 0
    files = {each["name"]: each["file"] for each in json.loads(capsys.readouterr().out)["entries"]}
    assert files["decode"].startswith("model.segment.000.onnx to model.segment.")
    shutil.rmtree(out)
    shutil.copytree(kept_chain, out)
    assert main(["prepare", str(out)]) == 2
    assert "nothing of it is packed" in capsys.readouterr().err


def test_new_mappings_are_those_that_were_not_there():
    """One that the kernel joined to its neighbour is told apart."""
    before = [Mapping(0, 1000, 100)]
    assert added(before, [Mapping(0, 1000, 100), Mapping(50, 5000, 10)]) == [Mapping(50, 5000, 10)]
    assert added(before, [Mapping(0, 1000, 150)]) == [Mapping(100, 1100, 50)]
    assert added([Mapping(100, 1100, 50)], [Mapping(0, 1000, 150)]) == [Mapping(0, 1000, 100)]
    assert added([Mapping(20, 1020, 10)], [Mapping(0, 1000, 100)]) == [Mapping(0, 1000, 20), Mapping(30, 1030, 70)]
    assert added(before, before) == []
