"""Loads an exported model with plain transformers, in a process that cannot import sorted_ds or deepspeed.

`python tools/check_export.py DIR [PROMPT]`: compares the logits with those that `sorted-ds export --store-logits`
stored beside the model (the nested model's own), prints the largest difference, and generates a line of text. Fails
when the difference is over 1e-5 of the largest logit.
"""

import sys
from pathlib import Path

sys.modules["sorted_ds"] = sys.modules["deepspeed"] = None  # importing either is now an ImportError

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

LARGEST_RELATIVE_DIFFERENCE = 1e-5


def main(folder: Path, prompt: str) -> None:
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = load_file(folder / "logits.safetensors")
    with torch.no_grad():
        logits = model(stored["input_ids"]).logits
    difference = ((logits - stored["logits"]).abs().max() / stored["logits"].abs().max()).item()
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__} of {size:,} parameters; largest difference of its logits from the nested model's:")
    print(f"{difference:.1e} of the largest logit (at most {LARGEST_RELATIVE_DIFFERENCE:.0e})")
    if not difference <= LARGEST_RELATIVE_DIFFERENCE:
        sys.exit("error: the logits differ")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    print(f"it writes: {text!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "def ")
