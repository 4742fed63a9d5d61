"""What the tests of the command line share: a way to run it, and model folders and artifacts to run it on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "models" / "tiny-llama"
INT4 = "quantize-weights{bits=4,group=32}"
INT8_WINDOW = "quantize-weights{bits=8,group=64,skip='down_proj'},cache-kv{policy=window{size=64}}"


@dataclass(frozen=True)
class Run:
    """What one run of the program did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout; anything beside it is an error."""
        return json.loads(self.out)

    def fails(self, code: int, *parts: str) -> Run:
        """Assert one clear error: exit code, nothing on stdout, one `error:` on stderr that holds every part."""
        assert self.code == code, self.err
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("error: ") == 1
        assert "Traceback" not in self.err
        assert "bug" not in self.err
        for part in parts:
            assert part in self.err
        return self


def run_process(*arguments: object, **options: Any) -> Run:
    """Run `python -m jettison ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "jettison", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)
    return Run(done.returncode, done.stdout, done.stderr)


def optimized(model: Path, out: Path, *arguments: str) -> Path:
    """An artifact made by the command line itself."""
    from jettison.cli import main

    assert main(["optimize", str(model), "--out", str(out), *arguments]) == 0
    return out


def save_small_model(folder: Path, **options: Any) -> None:
    """Write a random Llama in bf16 with a context of 1024 tokens, and no tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder, **options)


def forge(artifact: Path, **changes: Any) -> None:
    """Change the manifest of an artifact as its writer would have written it."""
    path = artifact / "jettison.json"
    manifest = {**json.loads(path.read_text()), **changes}
    manifest.pop("manifest_sha256")
    body = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["manifest_sha256"] = hashlib.sha256(body.encode()).hexdigest()
    path.write_text(json.dumps(manifest, sort_keys=True, indent=2) + "\n")
