"""The artifact container: nothing half-written under real signals and real full disks, no damage unseen."""

import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy
import pytest

from jettison.ir.errors import ArtifactError, BugError, OptionError, UnsupportedError
from jettison.runtime import artifact as module
from jettison.runtime.artifact import Artifact, ArtifactWriter, check_destination, check_requirements, library_versions

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
LARGE = numpy.random.default_rng(0).bytes(3 << 20)  # above the limit below which `open` hashes


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request, monkeypatch):
    if "sync" not in request.node.name:  # the tests below make hundreds of files that may well be lost in a power cut
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def written(out):
    return write_artifact(out)


def write(out, fill, manifest=None, **options):
    with ArtifactWriter(out, **options) as writer:
        fill(writer)
        writer.finish(manifest or {})
    return out


def fill_artifact(writer):
    writer.copy(TINY_LLAMA / "config.json")
    writer.write_text("graph/before.txt", "%x: f32[s0] = input\n")
    writer.write_json("report.json", {"passes": [], "kl": None})
    writer.path("model.onnx.data").write_bytes(LARGE)


def write_artifact(out, manifest=None, **options):
    return write(out, fill_artifact, {"pipeline": "quantize-weights{bits=4}", "seed": 0, **(manifest or {})}, **options)


def leave_by(error):
    def fill(writer):
        writer.copy(TINY_LLAMA / "config.json", "deep/config.json")
        raise error

    return fill


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def content_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def flip_byte(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def forge(folder, **changes):
    """Change the manifest and give it a matching hash, as a hostile writer would."""
    manifest = {**json.loads((folder / "jettison.json").read_text()), **changes}
    manifest["manifest_sha256"] = module._manifest_hash(manifest)
    (folder / "jettison.json").write_text(module._json_text(manifest))


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def child(code, *arguments, prefix=(), **options):  # `code` finds the first argument as `out`
    start = "import sys\nfrom pathlib import Path\nfrom jettison.runtime.artifact import *\nout = Path(sys.argv[1])\n"
    command = [*prefix, sys.executable, "-c", start + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_written_artifact_holds_files_hashes_and_manifest(out):
    written = write_artifact(out, manifest={"some later key": {"x": [1]}, "files": {"stale": 1}, "format_version": 9})
    artifact = Artifact.open(written, verify=True)
    names = ["config.json", "graph/before.txt", "model.onnx.data", "report.json"]
    assert artifact.manifest["format_version"] == module.FORMAT_VERSION == 1
    assert artifact.manifest["some later key"] == {"x": [1]}
    assert artifact.manifest["pipeline"] == "quantize-weights{bits=4}"
    assert sorted(artifact.manifest["files"]) == names
    for name in names:
        raw = (written / name).read_bytes()
        assert artifact.manifest["files"][name] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        assert artifact.path(name) == written / name
    assert artifact.read_json("config.json") == json.loads((TINY_LLAMA / "config.json").read_text())
    assert artifact.verify() == []
    assert names_in(written.parent) == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    modes = [path.stat().st_mode & 0o777 for path in (written, written / "jettison.json")]
    assert modes == [0o777 & ~umask, 0o666 & ~umask]


def test_same_content_gives_the_same_bytes_of_jettison_json(tmp_path):
    first = write_artifact(tmp_path / "a", manifest={"entries": {"decode": 1, "prefill": 2}})
    second = tmp_path / "deep" / "b"
    thread = threading.Thread(target=write_artifact, args=(second, {"entries": {"prefill": 2, "decode": 1}}))
    thread.start()  # no other thread than the main one may touch signals
    thread.join()
    assert (first / "jettison.json").read_bytes() == (second / "jettison.json").read_bytes()


def test_json_has_sorted_keys_and_final_newline_and_survives_int_keys(out):
    value = {"b": 1, "a": {10: "x", 9: "y"}}  # these sort differently as ints and as the strings they become
    write(out, lambda writer: writer.write_json("report.json", value), manifest={"layers": value})
    assert (out / "report.json").read_text() == '{\n  "a": {\n    "10": "x",\n    "9": "y"\n  },\n  "b": 1\n}\n'
    assert Artifact.open(out).manifest["layers"] == {"a": {"9": "y", "10": "x"}, "b": 1}
    assert Artifact.open(out).verify() == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", ".", "a\\x", "C:x", "a\0x", "./jettison.json"])
def test_writer_refuses_names_that_leave_the_folder(out, name):
    found = "is not the name of a file in an artifact" if "jettison" not in name else r"is written by finish\(\)"
    with pytest.raises(ArtifactError, match=found):
        write(out, lambda writer: writer.write_text(name, "x"))
    assert names_in(out.parent) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, ArtifactError, PermissionError])
@pytest.mark.parametrize("exists", [False, True])
def test_everything_is_as_before_when_the_block_is_left_by_an_exception(out, error, exists):
    if exists:
        write_artifact(out)
    before = content_of(out.parent)
    with pytest.raises(error):
        write(out, leave_by(error("stop")), overwrite=True)
    assert content_of(out.parent) == before


def test_writer_reports_its_own_misuse_as_a_bug(out):
    with pytest.raises(BugError, match="without finish"), ArtifactWriter(out):
        pass
    assert names_in(out.parent) == []
    writer = ArtifactWriter(out)
    with pytest.raises(BugError, match="outside its `with`"):
        writer.path("x")
    with writer:
        writer.finish({})
        with pytest.raises(BugError, match="after finish"):
            writer.write_text("late.txt", "x")
    assert Artifact.open(out).manifest["files"] == {}


def test_everything_is_synced_before_it_is_moved_and_the_parent_after(out, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda source, target: (rename(source, target), events.append("moved")))
    write_artifact(out)
    at = events.index("moved")
    assert {path.stat().st_ino for path in (out, *out.rglob("*"))} == set(events[:at])
    assert events[at + 1 :] == [out.parent.stat().st_ino]


REFUSED = [
    (
        "artifact",
        False,
        OptionError,
        r"exists already.* Choose another.*replace it with overwrite=True \(--overwrite\)",
    ),
    ("empty", False, OptionError, "exists already"),
    ("folder", True, OptionError, r"is no folder with jettison\.json.*you may need the data\. Choose another"),
    ("folder/file", True, OptionError, r"is no folder with jettison\.json.*you may need the data\. Choose another"),
    ("folder/file/deeper/out", False, ArtifactError, "lies inside .*file, which is a file; needed a folder. Choose"),
    ("a\0b", False, ArtifactError, r"cannot be used \(.*null byte\)\. Choose another folder"),
    ("x" * 300, False, ArtifactError, r"File name too long.*\. Choose another folder"),
]


@pytest.mark.parametrize(("name", "overwrite", "error", "found"), REFUSED)
def test_destinations_that_cannot_be_used_are_refused_and_untouched(tmp_path, name, overwrite, error, found):
    write_artifact(tmp_path / "artifact")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("years of work")
    before = content_of(tmp_path)
    for attempt in (check_destination, write_artifact):
        with pytest.raises(error, match=rf"{name[:9]}.*\] {found}"):
            attempt(tmp_path / name, overwrite=overwrite)
    assert content_of(tmp_path) == before
    assert Artifact.open(write_artifact(tmp_path / "empty", overwrite=True)).verify() == []


@pytest.mark.parametrize("exchange", [module._exchange, lambda first, second: False], ids=["one step", "two steps"])
def test_overwrite_replaces_the_whole_artifact_only_at_the_end(written, monkeypatch, exchange):
    monkeypatch.setattr(module, "_exchange", exchange)
    with ArtifactWriter(written, overwrite=True) as writer:
        writer.write_text("graph/after.txt", "new")
        assert Artifact.open(written, verify=True).manifest["seed"] == 0
        writer.finish({"seed": 1})
    assert Artifact.open(written).manifest["seed"] == 1
    assert Artifact.open(written).verify() == []  # so nothing of the earlier one is left either
    assert names_in(written.parent) == ["out"]


def test_exchange_swaps_exactly_when_it_says_so(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, lambda writer: None, {"pipeline": name})
    is_swapped = module._exchange(tmp_path / "a", tmp_path / "b")
    now = [Artifact.open(tmp_path / name).manifest["pipeline"] for name in ("a", "b")]
    assert now == (["b", "a"] if is_swapped else ["a", "b"])
    assert not module._exchange(tmp_path / "a", tmp_path / "absent")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_earlier_artifact_is_restored_when_the_last_rename_fails(written, monkeypatch, error):
    rename = os.rename

    def fail_on_new(source, target):
        if "jettison-new" in str(source):
            raise error
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_exchange", lambda first, second: False)
        patch.setattr(os, "rename", fail_on_new)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ArtifactError):
            write(written, lambda writer: None, {"seed": 1}, overwrite=True)
    assert Artifact.open(written, verify=True).manifest["seed"] == 0
    assert names_in(written.parent) == ["out"]


def test_artifact_hidden_by_a_death_between_two_renames_comes_back(written):
    written.rename(written.with_name(".out.jettison-old-999999999-0123abcd"))
    with pytest.raises(OptionError, match="exists already"):
        ArtifactWriter(written).__enter__()  # not only after everything has been written
    assert Artifact.open(written).verify() == []


def test_missing_parents_are_created_and_links_to_the_destination_followed(tmp_path):
    assert Artifact.open(write_artifact(tmp_path / "a" / "b" / "out")).verify() == []
    (tmp_path / "latest").symlink_to(tmp_path / "a" / "b" / "out")
    write_artifact(tmp_path / "latest", overwrite=True, manifest={"seed": 2})
    assert (tmp_path / "latest").is_symlink()
    assert Artifact.open(tmp_path / "a" / "b" / "out").manifest["seed"] == 2


def test_parent_without_write_permission_is_refused():
    code = "import os\nos.geteuid() or os.setuid(65534)  # root may write anywhere\nArtifactWriter(out)"
    with tempfile.TemporaryDirectory() as folder:  # tmp_path lies in a folder that is closed to other users
        os.chmod(folder, 0o755)
        parent = Path(folder, "parent")
        parent.mkdir(mode=0o555)
        _, stderr = child(code, parent / "new" / "out").communicate(timeout=60)
        assert re.search(r"ArtifactError: .*no permission to write in .*parent\. Choose another", stderr)
        assert names_in(parent) == []


def test_destination_that_appears_meanwhile_is_kept(out):
    with pytest.raises(OptionError, match="exists already"):
        write(out, lambda writer: write_artifact(out, manifest={"seed": 7}), {"seed": 8})
    assert Artifact.open(out, verify=True).manifest["seed"] == 7
    assert names_in(out.parent) == ["out"]


def test_links_and_pipes_are_followed_or_refused_but_never_stored(tmp_path, out):
    (tmp_path / "blob").write_text("content")
    (tmp_path / "link.json").symlink_to("blob")
    os.mkfifo(tmp_path / "pipe")
    write(out, lambda writer: writer.copy(tmp_path / "link.json"))
    assert (out / "link.json").lstat().st_size == len("content")
    for name in ("absent", "pipe"):
        with pytest.raises(ArtifactError, match=f"{name}.*missing or not a file"):
            write(tmp_path / "other", lambda writer, name=name: writer.copy(tmp_path / name))
    with pytest.raises(ArtifactError, match=r"sneaky\] is a link or a special file"):
        write(tmp_path / "other", lambda writer: (writer.folder / "sneaky").symlink_to(tmp_path / "blob"))
    assert names_in(tmp_path) == ["blob", "link.json", "out", "pipe"]


def test_progress_grows_to_the_total_of_all_files(out):
    calls = []
    write_artifact(out, on_progress=lambda *call: calls.append(call))
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "jettison.json")
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert (done[-1], {call[2] for call in calls}) == (total, {total})
    calls.clear()
    Artifact.open(out, verify=True, on_progress=lambda *call: calls.append(call))
    assert calls[-1][1:] == (total, total)


def end_mid_write(out, number):
    """Send signal `number` to a process that has written half an artifact, and wait for its end."""
    code = """
import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored by a suite under nohup, and by its children
with ArtifactWriter(out) as writer:
    writer.write_text("graph/before.txt", "half")
    writer.path("model.onnx.data").write_bytes(bytes(100_000))
    print("ready", flush=True)
    sys.stdin.read()
    writer.finish({})
"""
    with child(code, out, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        assert len(names_in(out.parent)) == 1
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    return process, stderr


def test_killed_write_leaves_nothing_at_out_and_the_next_write_cleans_up(out):
    process, _ = end_mid_write(out, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert re.fullmatch(rf"\.out\.jettison-new-{process.pid}-[0-9a-f]{{8}}", *names_in(out.parent))
    neighbour = out.with_name(".other.jettison-new-999999999-0123abcd")
    neighbour.mkdir()
    write_artifact(out)
    assert names_in(out.parent) == [neighbour.name, "out"]
    assert Artifact.open(out).verify() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_mid_write_leaves_nothing(out, number):
    process, stderr = end_mid_write(out, number)
    assert names_in(out.parent) == []
    assert process.returncode == 128 + number or (number == signal.SIGINT and "KeyboardInterrupt" in stderr)


def test_leftover_of_a_pid_that_lives_again_is_cleaned_but_a_live_writer_is_not(out):
    for pid in (os.getpid(), os.getppid()):
        out.with_name(f".out.jettison-new-{pid}-0123abcd").mkdir()

    with ArtifactWriter(out) as first:
        assert names_in(out.parent) == [first.folder.name]
        with ArtifactWriter(out) as second:
            assert first.folder.is_dir()
            second.finish({"seed": 2})
        first.path("a").write_text("still there")
        with pytest.raises(OptionError, match="exists already"):
            first.finish({"seed": 1})
        shutil.rmtree(out)
        first.finish({"seed": 1})
    assert Artifact.open(out, verify=True).manifest["seed"] == 1
    assert names_in(out.parent) == ["out"]


def test_signal_handlers_are_given_back_and_foreign_ones_kept(tmp_path):
    during = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        write(tmp_path / "a", lambda writer: during.append(signal.getsignal(signal.SIGTERM)))
        assert during.pop() is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        write(tmp_path / "b", lambda writer: during.append(signal.getsignal(signal.SIGTERM)))
        assert during.pop() is signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


FILL = {
    "text": 'writer.require_space(500_000); writer.write_text("a.txt", "x" * 3_000_000)',
    "copy": "writer.copy(sys.argv[2])",
    "numpy": 'import numpy; numpy.zeros(3_000_000, numpy.uint8).tofile(writer.path("a.bin"))',
    "safetensors": "import numpy; from safetensors.numpy import save_file; "
    'save_file({"w": numpy.zeros(3_000_000, numpy.uint8)}, writer.path("a.safetensors"))',
    "manifest": 'writer.finish({"history": "x" * 3_000_000})',
}


def fill_disk(how, out, source, **options):
    code = f"""
try:
    with ArtifactWriter(out) as writer:
        {FILL[how]}
        writer.finish({{}})
except ArtifactError as error:
    print(error)
print("left:", sorted(path.name for path in out.parent.iterdir()))
"""
    source.write_bytes(bytes(3_000_000))
    stdout, stderr = child(code, out, source, **options).communicate(timeout=60)
    assert stderr == ""
    message, left = stdout.splitlines()
    assert left == "left: []"
    assert re.search(r"were written, .* are free in .*disk\. The unfinished artifact was removed\. \w+", message)
    return message


@pytest.mark.parametrize("how", FILL)
def test_file_size_limit_is_explained_and_leaves_nothing(tmp_path, how):
    (tmp_path / "disk").mkdir()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    message = fill_disk(how, tmp_path / "disk" / "out", tmp_path / "source.bin", preexec_fn=limit)
    # numpy tells that a write came short, but not why.
    assert ("out] the disk is full" if how == "numpy" else "out] a file grew past the largest size") in message
    assert ("of the 0.50 MB needed" in message) == (how == "text")


@pytest.mark.parametrize("how", FILL)
def test_full_disk_is_explained_and_leaves_nothing(tmp_path, how):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode != 0:
        pytest.skip("no small disk to fill: unshare or user namespaces are not available here")
    message = fill_disk(how, disk / "out", tmp_path / "source.bin", prefix=private)
    assert "out] the disk is full" in message
    if how in ("text", "copy"):
        assert re.search(r": 1\.05 MB.* 0 bytes are free", message)  # all of the small disk


def test_used_up_quota_is_explained_even_behind_another_error(out):
    error = RuntimeError("the exporter failed")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(ArtifactError, match="your disk quota is used up"):
        write(out, leave_by(error))
    assert names_in(out.parent) == []


def test_required_space_names_both_numbers(out):
    write(out.with_name("fits"), lambda writer: writer.require_space(1))
    with pytest.raises(ArtifactError, match=r"needs 1,000,000,000,000\.00 MB, and [\d,.]+ MB are free in .*Free some"):
        write(out, lambda writer: writer.require_space(10**18))
    assert names_in(out.parent) == ["fits"]


MANIFEST = "jettison.json"
NEWER = "out] written by a newer jettison (format 3, this one reads up to 1). Upgrade with `pip install -U jettison`"
ONE_BYTE = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
NOT_A_NAME, NOT_A_RECORD = "is not the name of a file in an artifact", "needed its bytes and sha256"
DAMAGE = {
    "gone": (shutil.rmtree, "out] does not exist. Pass the folder that `jettison optimize --out` wrote"),
    "a file": (lambda f: (shutil.rmtree(f), f.touch()), "out] is a file, not a folder. Pass the folder"),
    "no artifact": (lambda f: [p.unlink() for p in f.glob("*.json")], "holds no jettison.json, so it is no artifact"),
    "a model": (
        lambda f: (f / MANIFEST).unlink(),
        "jettison.json: this looks like a Hugging Face model folder, not an",
    ),
    "truncated": (lambda f: (f / MANIFEST).write_text('{"format_version": 1'), "json] is not readable JSON"),
    "binary": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\0"), "json] is not readable JSON"),
    "deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "json] is not readable JSON"),
    "huge number": (lambda f: (f / MANIFEST).write_text("1" * 9_999), "json] is not readable JSON"),
    "huge": (lambda f: os.truncate(f / MANIFEST, 1 << 40), "json] is not a small regular file"),
    "a pipe": (lambda f: replace_by_pipe(f / MANIFEST), "json] is not a small regular file"),
    "a list": (lambda f: (f / MANIFEST).write_text("[1]"), "has format version None, needed a number from 1 to 1"),
    "true": (lambda f: forge(f, format_version=True), "has format version True"),
    "newer": (lambda f: (f / MANIFEST).write_text('{"format_version": 3, "files": "elsewhere now"}'), NEWER),
    "edited": (lambda f: flip_byte(f / MANIFEST, -6), "does not match its own SHA-256"),
    "files none": (lambda f: forge(f, files=None), f"has the entry 'files': None, {NOT_A_RECORD}"),
    "record": (lambda f: forge(f, files={"x": 1}), f"has the entry 'x': 1, {NOT_A_RECORD}"),
    "bytes": (lambda f: forge(f, files={"x": {**ONE_BYTE, "bytes": "1"}}), NOT_A_RECORD),
    "up": (lambda f: forge(f, files={"../secret": ONE_BYTE}), f"'../secret'] {NOT_A_NAME}"),
    "absolute": (lambda f: forge(f, files={"/etc/hostname": ONE_BYTE}), NOT_A_NAME),
    "not canonical": (lambda f: forge(f, files={"a//b": ONE_BYTE}), "a name that jettison never writes"),
    "itself": (lambda f: forge(f, files={MANIFEST: ONE_BYTE}), "a name that jettison never writes"),
    "small missing": (lambda f: (f / "config.json").unlink(), "out] config.json: missing"),
    "small pipe": (lambda f: replace_by_pipe(f / "config.json"), "config.json: not a regular file"),
    "large longer": (lambda f: os.truncate(f / "model.onnx.data", len(LARGE) + 1), "3,145,729 bytes, needed 3,145,728"),
    "small flipped": (lambda f: flip_byte(f / "graph/before.txt", 3), "graph/before.txt: content changed (SHA-256"),
    "many missing": (lambda f: shutil.rmtree(f / "seven"), "; and 2 more. The artifact is damaged: copy it again"),
}


@pytest.mark.parametrize(("damage", "found"), DAMAGE.values(), ids=DAMAGE)
def test_open_refuses_a_damaged_artifact(out, damage, found):
    with ArtifactWriter(out) as writer:
        fill_artifact(writer)
        for index in range(7):
            writer.write_text(f"seven/{index}", "x")
        writer.finish({"pipeline": "quantize-weights{bits=4}"})
    damage(out)
    with pytest.raises(ArtifactError, match=re.escape(found)):
        Artifact.open(out)


def test_every_flipped_bit_of_jettison_json_is_found_and_every_other_change(out):
    artifact = Artifact.open(write(out, lambda writer: writer.write_text("a", "x"), {"seed": 0}))
    good = (out / MANIFEST).read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in range(len(good))]
    for changed in (*flipped, good + b"\n", good.replace(b"{", b'{"seed": 5,', 1)):
        (out / MANIFEST).write_bytes(changed)
        assert [problem.name for problem in artifact.verify()] == [MANIFEST], changed


@pytest.mark.parametrize("at", [0, 1 << 20, len(LARGE) - 1])
def test_flipped_byte_in_a_large_file_is_found_by_verify(written, at):
    flip_byte(written / "model.onnx.data", at)
    problems = Artifact.open(written).verify()
    assert [(p.kind, p.name, p.is_note) for p in problems] == [("hash", "model.onnx.data", False)]
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data: content changed"):
        Artifact.open(written, verify=True)


def test_links_that_leave_the_folder_are_refused_and_others_followed(written):
    outside = written.parent / "outside"
    shutil.move(written / "graph", outside)
    (written / "graph").symlink_to(outside)
    shutil.move(written / "report.json", written / "kept")
    (written / "report.json").symlink_to("kept")
    artifact = module.Artifact(written, module._read_manifest(written))
    assert [(p.kind, p.name) for p in artifact.verify()] == [("outside", "graph/before.txt"), ("extra", "kept")]
    with pytest.raises(ArtifactError, match=r"out\] graph/before\.txt: a link that leaves the folder.*cp -rL"):
        Artifact.open(written)


def test_extra_files_are_notes_and_a_whole_extra_folder_is_one(written):
    for name in ("notes.txt", "graph/mine.txt", ".git/one", ".git/objects/two"):
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).write_text("x")
    problems = Artifact.open(written, verify=True).verify()
    assert [p.name for p in problems] == [".git/", "graph/mine.txt", "notes.txt"]
    assert all(problem.is_note for problem in problems)


def test_unreadable_file_is_a_problem_not_a_crash(written, monkeypatch):
    def refuse(path, *arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    artifact = Artifact.open(written)
    monkeypatch.setattr(module, "open", refuse, raising=False)  # root reads whatever the mode says
    assert {problem.kind for problem in artifact.verify()} == {"unreadable"}


def test_path_and_read_json_serve_only_listed_files(written):
    artifact = Artifact.open(written)
    (written / "planted.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"lists no file planted\.json"):
        artifact.read_json("planted.json")
    with pytest.raises(ArtifactError, match="not the name of a file"):
        artifact.path("../out/config.json")
    with pytest.raises(ArtifactError, match=r"before\.txt\] is not readable JSON"):
        artifact.read_json(Path("graph/before.txt"))
    (written / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json: missing"):
        artifact.path("config.json")


def test_library_versions_are_those_installed():
    versions = library_versions()
    assert list(versions) == sorted(versions)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    for library in ("jettison", "torch", "numpy", "onnx", "onnxruntime", "safetensors"):
        assert versions[library] == importlib.metadata.version(library)


VERSIONS = [("1.24.0", "1.24"), ("1.24", "1.24.0"), ("2.0", "1.99.99"), ("1.9.1", "1.24"), ("1.24.1", "1.24.2")]


@pytest.mark.parametrize(("found", "needed"), VERSIONS)
def test_requirements_compare_release_numbers(monkeypatch, found, needed):
    for suffix in ("", "rc1", ".dev20250101", "+cpu"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, suffix=suffix: found + suffix)
        if (found, needed) in VERSIONS[:3]:
            check_requirements({"requires": {"onnxruntime": needed}})
            continue
        message = re.escape(f"[onnxruntime] found version {found}{suffix}, and this artifact needs {needed} or newer")
        with pytest.raises(UnsupportedError, match=message + f'.*pip install -U "onnxruntime>={needed}"'):
            check_requirements({"requires": {"onnxruntime": needed}})


def test_requirements_hold_for_this_machine_and_fail_for_what_is_absent_or_damaged():
    check_requirements({})
    check_requirements({"requires": {"onnxruntime": "1.24"}})
    with pytest.raises(UnsupportedError, match=r"\[no-such-library\] is not installed.*pip install -U"):
        check_requirements({"requires": {"no-such-library": "1"}})
    for damaged in ([], "1.24", {"onnxruntime": 1.24}, {"onnxruntime": ""}, {"onnxruntime": "new"}):
        with pytest.raises(ArtifactError, match='"requires"'):
            check_requirements({"requires": damaged})


def test_gpu_build_of_onnx_runtime_counts_and_is_what_to_upgrade(monkeypatch):
    version, fake = importlib.metadata.version, {"onnxruntime-gpu": "1.24.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fake.get(name) or version("absent"))
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    check_requirements({"requires": {"onnxruntime": "1.24"}})
    with pytest.raises(UnsupportedError, match=r'pip install -U "onnxruntime-gpu>=1\.30"'):
        check_requirements({"requires": {"onnxruntime": "1.30"}})
