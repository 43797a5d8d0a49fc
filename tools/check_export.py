"""Checks an exported model with plain transformers: `python tools/check_export.py DIR [PROMPT]`.

In: a directory that `sorted-ds export --store-logits` wrote. The process cannot import sorted_ds or deepspeed. It
compares the model's logits with the nested model's, which stand beside the model, and generates a line of text. Out:
the largest difference, and the text. It fails if the difference is more than 1e-5 of the largest logit.
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
    print(f"The {type(model).__name__} has {size:,} parameters. Its logits differ from the nested model's by at most")
    print(f"{difference:.1e} of the largest logit; {LARGEST_RELATIVE_DIFFERENCE:.0e} is allowed.")
    if not difference <= LARGEST_RELATIVE_DIFFERENCE:
        sys.exit("error: the exported model has other logits than the nested model. Please report this.")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True)
    print(f"It generates: {text!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "def ")
