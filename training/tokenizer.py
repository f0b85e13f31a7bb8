"""Stage `tokenizer`: a byte-pair vocabulary learned from the captions, in CLIP's format.

python -m training.tokenizer
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from training.checkpoint import WORK
from training.scenes import load

SIZE = 1024
LENGTH = 77


def tokenizer() -> Any:
    """The trained tokenizer, as the pipeline uses it."""
    return CLIPTokenizer.from_pretrained(str(WORK / "tokenizer"))


def main() -> None:
    """Trains the vocabulary and writes the folder `tokenizer`."""
    captions = sorted({text for texts in load()[2] for text in texts})
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s+"), "removed"), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    # CLIP's order: the bytes, the bytes that end a word, the merges, then the two special tokens.
    vocabulary = alphabet + [byte + "</w>" for byte in alphabet]
    known = set(vocabulary)
    vocabulary += [token for token in model["vocab"] if token not in known]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = CLIPTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=LENGTH)
    made.save_pretrained(str(WORK / "tokenizer"))
    again = tokenizer()
    ids = [again(c).input_ids for c in captions[:2000]]
    texts = [again.decode(i, skip_special_tokens=True).strip().replace(" ,", ",") for i in ids]
    wrong = [c for c, text in zip(captions, texts, strict=False) if text != c]
    print(f"{len(again)} tokens; longest caption {max(map(len, ids))}; {len(wrong)} of 2000 round trips differ")


if __name__ == "__main__":
    main()
