"""Words of a text encoder's own vocabulary as input embeddings, encoded by the pipeline's own code.

The pipeline is given the prompt with as many stand-ins as there are words; while it encodes, a hook on the text
encoder's embedding layer puts the words' embeddings in place of the stand-ins'. Gradients reach them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipgo_opt.conditioning import Conditioning
from ipgo_opt.errors import BadInput

if TYPE_CHECKING:
    from ipgo_opt.models.sampler import Sampler


class WordEncoder:
    """A prompt with words before and after it that are given as input embeddings.

    Args:
        sampler: its pipeline must have exactly one text encoder, whose vocabulary has whole words.
        prompt: what is between the words.
        before, after: numbers of words.

    Attributes:
        words: the vocabulary's whole, printable words: each is one token wherever it stands, n of them.
        vectors: their input embeddings (n, d).

    Raises:
        BadInput: the pipeline can't, or the prompt and the words are more than its encoder reads.

    """

    def __init__(self, sampler: Sampler, prompt: str, before: int, after: int) -> None:
        self.sampler = sampler
        pipeline, tokenizer = sampler.pipeline, sampler.tokenizer
        kind = type(pipeline).__name__
        encoders = [name for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        if len(encoders) != 1:
            raise BadInput(f"hard tokens need a pipeline with one text encoder, but {kind} has {len(encoders)}.")
        self.layer: nn.Module = getattr(pipeline, encoders[0]).get_input_embeddings()
        whole = sampler.whole_words()
        found = dict(zip(whole, tokenizer(whole).input_ids if whole else [], strict=True))
        around = tokenizer("").input_ids  # begin and end
        self.words = [word for word, ids in found.items() if len(ids) == len(around) + 1]
        if not self.words:
            raise BadInput(f"hard tokens need a vocabulary of whole words, but the tokenizer of {kind} has none.")
        begins = int(bool(around) and found[self.words[0]][0] == around[0])
        ids = [found[word][begins] for word in self.words]
        weights: Any = self.layer.weight
        self.vectors: Tensor = weights[torch.tensor(ids, device=weights.device)].detach()
        self.text = " ".join([*self.words[:1] * before, prompt, *self.words[:1] * after])
        self.ids: list[int] = tokenizer(self.text).input_ids
        if len(self.ids) > sampler.reads:
            raise BadInput(
                f"prompt and words must have at most {sampler.reads} tokens, begin and end included, but they have "
                f"{len(self.ids)}."
            )
        end = len(self.ids) - (len(around) - begins)
        self.places = [*range(begins, begins + before), *range(end - after, end)]
        probe = self.vectors[:1].expand(1, len(self.places), -1).clone().requires_grad_()
        with torch.enable_grad():
            if not self.encode(probe).prompt_embeds.requires_grad:
                raise BadInput(f"hard tokens need a text encoder that can be differentiated, but that of {kind} can't.")

    def encode(self, embeddings: Tensor) -> Conditioning:
        """The prompt encoded with `embeddings` (q, M, d) in place of its words: q rows, with gradients."""
        return Conditioning.stack([self._encoded(row) for row in embeddings])

    def _encoded(self, embeddings: Tensor) -> Conditioning:
        heard = []

        def replaced(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            read = args[0][0, : len(self.ids)].tolist()
            if read != self.ids:
                return output  # the unconditional half
            heard.append(True)
            changed = output.clone()
            changed[:, self.places] = embeddings.to(output)
            return changed

        hook = self.layer.register_forward_hook(replaced)
        try:
            encoded = self.sampler.encoded(self.text)
        finally:
            hook.remove()
        if not heard:
            raise BadInput(
                f"hard tokens need a pipeline that encodes the prompt as it stands, but "
                f"{type(self.sampler.pipeline).__name__} does not."
            )
        return encoded
