"""Text → token ids with an exact boundary between prompt and answer."""

from typing import NamedTuple

from tokenizers import Tokenizer


class Encoder(NamedTuple):
    """A fast tokenizer with the recipe's prompt format."""

    tokenizer: Tokenizer
    eos: int
    template: str
    answer_prefix: str

    def prompt(self, prompt: str) -> list[int]:
        """Ids of the rendered prompt, with the special tokens that the tokenizer puts in front."""
        ids = self.tokenizer.encode(self.template.replace("{prompt}", prompt)).ids
        return ids[:-1] if ids and ids[-1] == self.eos else ids

    def answer(self, prompt: str, answer: str) -> list[int]:
        """Ids of the answer after `prompt`, ending with EOS.

        Tokenised together with the prompt where that leaves the prompt's own ids as they are (so that no tokenizer
        puts a second space in front), else alone; never with a token that spans the boundary.
        """
        text = self.answer_prefix + answer
        head = self.prompt(prompt)
        whole = self.tokenizer.encode(self.template.replace("{prompt}", prompt) + text).ids
        if whole[: len(head)] == head:
            ids = whole[len(head) :]
        else:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids if ids and ids[-1] == self.eos else [*ids, self.eos]
