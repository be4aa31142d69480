"""NF4 changes the weights of linear layers, by at most its rounding, and nothing else."""

from pathlib import Path

import torch

from quantize.card import BaseCard, read_card
from quantize.evaluate import load_for_scoring


def test_the_tokenizer_and_the_template_are_the_parents(tiny: Path, tiny_nf4: BaseCard) -> None:
    parent = read_card(tiny).files_sha256
    assert tiny_nf4.files_sha256.keys() == parent.keys()
    changed = {name for name, sha256 in parent.items() if tiny_nf4.files_sha256[name] != sha256}
    assert changed == {"config.json"}


def test_weights_move_by_no_more_than_a_step_of_the_format(tiny: Path, tiny_nf4: BaseCard) -> None:
    before = load_for_scoring(tiny, quantized=False).state_dict()
    after = load_for_scoring(tiny.parent / tiny_nf4.name, quantized=True).state_dict()
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "_proj" not in name:
            assert torch.equal(weight, after[name])
            continue
        blocks, error = weight.view(-1, 64), (weight - after[name]).view(-1, 64)
        # Half of NF4's widest gap (-1 to -0.696) times the block's scale, which has 8 bits itself.
        assert (error.abs().amax(1) <= 0.16 * blocks.abs().amax(1)).all()
        assert error.abs().max() > 0
