"""Compress the bundled model to four bits, generate from it, and ship it as an ONNX folder.

python examples/01_compress_and_generate.py [OUT_FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jettison

MODEL = Path(__file__).resolve().parent / "models" / "tiny-llama"


def main(out: str | None = None) -> None:
    """Optimise, report, generate, save, load."""
    model = jettison.optimize(MODEL, passes="quantize-weights{bits=4,group=32}")
    print(model.report)
    print(model.generate("It was a dark night, and", max_new_tokens=40))

    with tempfile.TemporaryDirectory() as scratch:
        folder = model.save_pretrained(out or Path(scratch) / "tiny-llama-int4")
        loaded = jettison.load(folder, verify=True)
        for piece in loaded.stream("The captain", max_new_tokens=40, do_sample=True, temperature=0.8, seed=1):
            print(piece, end="")
        print()


if __name__ == "__main__":
    main(*sys.argv[1:2])
