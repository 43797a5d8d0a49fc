"""An exported model loads in transformers 4.57 with the nested model's logits, and so does its tokenizer."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sorted_ds.data.text.tokenizer import load_tokenizer
from sorted_ds.deploy.export import export
from sorted_ds.tasks.causal_lm import PROBE_TEXT
from tests.families import VARIANTS
from tests.spawn import ROOT
from tests.trained import trained_run

OLDER = "transformers==4.57.*"
IN_CI = ("llama", "qwen2, biases, sliding")
SLOW_TURNS = {"rope_type": "default", "rope_theta": 50.0}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCRIPT = """
import json, sys, torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, attention = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, **({"attn_implementation": attention} if attention else {}))
stored = load_file(folder + "/logits.safetensors")
with torch.no_grad():
    logits = model.eval()(stored["input_ids"]).logits
tokenizer = AutoTokenizer.from_pretrained(folder)
print(json.dumps({
    "version": transformers.__version__,
    "difference": float((logits - stored["logits"]).abs().max() / stored["logits"].abs().max()),
    "dtype": str(model.dtype),
    "ids": tokenizer(text).input_ids,
    "special": tokenizer("<|im_start|>").input_ids,
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False),
}))
"""


@pytest.fixture(scope="session")
def older() -> Path:
    """Returns the Python of a virtual environment with transformers 4.57 and this environment's torch."""
    folder = ROOT / ".cache" / "transformers-4.57"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "torch_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", OLDER], check=True, stdout=subprocess.DEVNULL)
        (folder / "complete").touch()
    return python


def seen_by(python: Path, folder: Path, attention: str = "") -> dict:
    """Returns what the Python of another environment, which cannot import this package, sees in the folder."""
    call = [python, "-c", SCRIPT, folder, PROBE_TEXT, attention]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def exported(folder: Path, variant: str) -> Path:
    """Returns an exported sub-network of a model whose tokenizer has special tokens and a chat template."""
    rope = STRETCHED if variant == "llama" else SLOW_TURNS
    run = trained_run(folder / "run", variant, rope_parameters=rope)
    tokenizer = load_tokenizer(str(run / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(run / "model")
    return export(run, ["d2-g3-f80"], [folder / "small"], store_logits=True)[0]


@pytest.mark.long
@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=pytest.mark.ci if v in IN_CI else ()) for v in VARIANTS], ids=str
)
def test_older_transformers_load_the_same_model_and_tokenizer(variant, tmp_path, older):
    out = exported(tmp_path, variant)
    # 4.57 leaves out gemma2's cap of attention scores unless it is told so, also for models that it has saved itself.
    seen = seen_by(older, out, "eager" if variant == "gemma2" else "")
    assert seen["version"].startswith("4.57")
    assert seen["difference"] <= 1e-6
    assert seen["dtype"] == "torch.float32"
    assert seen["ids"] == [ord(c) if ord(c) < 128 else 128 for c in PROBE_TEXT]
    assert (seen["special"], seen["chat"]) == ([130], "user: Hi")
    assert ("leaves out" in (out / "README.md").read_text()) == (variant == "gemma2")
