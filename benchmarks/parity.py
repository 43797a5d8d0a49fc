"""Prints how far nested and extracted models are from the masked full model, for every family: `make bench`.

Largest relative differences, fp32, of logits and of gradients; a minute on one core.
"""

from tests.parity import print_table

if __name__ == "__main__":
    print_table()
