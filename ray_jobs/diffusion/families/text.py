"""Facet of a family: from captions to the denoiser's inputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ray_jobs.diffusion.protocols import Pipeline, Settings, TextEncoder, Tokenizer

Captions = dict[str, torch.Tensor]  # tokens or embeddings of N captions, by name, each N x ...
Pictures = Sequence[torch.Tensor]
"""Reference pictures of N captions: the first ones, the second ones, ...; each uint8, N x 3 x h x w."""
Encoders = Mapping[str, TextEncoder]  # text encoders by their name in the pipeline
NULL = "null_"  # prefix of stored columns: the empty caption, with the row's own references
MASK = "prompt_mask"  # condition: bool, N x tokens, False at padding, which is on the right
LENGTHS = "prompt_lengths"  # condition on the CPU: int64, N, the number of each caption's tokens


class Text(ABC):
    """Text encoders of a family and what the denoiser receives from them.

    Attributes:
        tokens: names of the columns that `tokenize` returns: integers, or bool for masks.
        embeds: names of the columns that `embed` returns: float columns, which are cast to the denoiser's
            dtype, and others such as masks, which are not.
        encoders: text encoders in the pipeline; some models leave one out.
        ragged: columns of `embeds` of which only the tokens of `MASK` are stored.
        sees_references: whether the encoders see the reference pictures too, so that embeddings, also the
            unconditional ones, are of a caption with its pictures.
        max_tokens: numbers of tokens, by column, where diffusers does not use the tokenizer's own maximum.
    """

    tokens: tuple[str, ...]
    embeds: tuple[str, ...]
    encoders: tuple[str, ...]
    ragged: tuple[str, ...] = ()
    sees_references: bool = False
    max_tokens: Mapping[str, int] = {}

    def present(self, pipeline: Pipeline) -> dict[str, TextEncoder]:
        """Return the text encoders that a pipeline has, by name."""
        parts = {name: getattr(pipeline, name) for name in self.encoders}
        return {name: part for name, part in parts.items() if part is not None}

    def tokenizer_of(self, pipeline: Any, name: str) -> Any:
        """Return the tokenizer of the column `name`: that of `input_ids_2` is the pipeline's `tokenizer_2`.

        Args:
            pipeline: a pipeline, or its tokenizers (`load_tokenizers`).

        Returns:
            None if there is none.
        """
        return getattr(pipeline, name.replace("input_ids", "tokenizer"), None)

    def as_prompt(self, caption: str) -> str:
        """Return the text that is tokenized for a caption: with the family's template, if it has one."""
        return caption

    def as_negative(self, caption: str) -> str:
        """Return the text that is tokenized for a caption that guidance leads away from.

        Also for the empty one, from which `unconditional` is made. Some families use no template here.
        """
        return self.as_prompt(caption)

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        """Return what is tokenized for texts: in the template that all of them have, if there is one."""
        return texts

    def longest(self, tokenizer: Tokenizer, name: str) -> int:
        """Return the most tokens of a prompt in the column `name`."""
        return self.max_tokens.get(name, tokenizer.model_max_length)

    def cut(self, pipeline: Any, captions: list[str]) -> list[bool]:
        """Return which of N captions have tokens that no text encoder reads, since they are too long.

        Args:
            pipeline: a pipeline, or its tokenizers (`load_tokenizers`).
        """
        texts, found = [self.as_prompt(caption) for caption in captions], [True] * len(captions)
        for name in self.tokens:
            tokenizer = self.tokenizer_of(pipeline, name)
            if tokenizer is not None:
                rows = tokenizer(self.written(tokenizer, texts), verbose=False).input_ids
                limit = self.longest(tokenizer, name)
                found = [cut and len(row) > limit for cut, row in zip(found, rows, strict=True)]
        return found

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        """Tokenize texts of captions, truncated or padded to each tokenizer's length: int32, N x tokens each.

        Tokenizers that the pipeline does not have are skipped.
        """
        found = {}
        for name in self.tokens:
            tokenizer = self.tokenizer_of(pipeline, name)
            if tokenizer is not None:
                found[name] = self.tokens_of(tokenizer, name, captions).input_ids.int()
        return found

    def tokenize_shown(self, pipeline: Pipeline, captions: list[str], pictures: Pictures) -> Captions:
        """Return what `embed` takes for captions with their reference pictures.

        Where the encoders see pictures, there are further columns beside `tokens`.
        """
        return self.tokenize(pipeline, captions)

    def tokens_of(self, tokenizer: Tokenizer, name: str, captions: list[str], **options: Any) -> Any:
        """Return a tokenizer's output for the column `name`: PyTorch tensors, N x tokens.

        Args:
            options: further ones of the tokenizer.
        """
        return tokenizer(
            self.written(tokenizer, captions),
            padding="max_length",
            max_length=self.longest(tokenizer, name),
            truncation=True,
            return_tensors="pt",
            **options,
        )

    def masked_tokens_of(self, tokenizer: Tokenizer, texts: list[str]) -> Captions:
        """Tokenize texts for an encoder with an attention mask: `input_ids`, and a bool `attention_mask`."""
        found = self.tokens_of(tokenizer, "input_ids", texts)
        return {"input_ids": found.input_ids.int(), "attention_mask": found.attention_mask.bool()}

    def num_tokens(self, name: str, encoder: TextEncoder) -> int:
        """Return the number of tokens in a column, given the text encoder that reads it."""
        return self.max_tokens.get(name) or int(encoder.config.max_position_embeddings)

    @abstractmethod
    def embed(self, encoders: Encoders, tokens: Captions) -> Captions:
        """Return the denoiser's caption inputs; gradients reach the encoders.

        Args:
            encoders: those that the model has.
            tokens: from `tokenize` or `tokenize_shown`, on the encoders' device.

        Returns:
            The columns of `embeds`, floats in the encoders' dtype.
        """

    def unconditional(self, settings: Settings, empty: Captions) -> Captions:
        """Return the denoiser's inputs for no caption: N x ..., in the form that `embed` returns.

        An empty caption that is given explicitly is different: it is always encoded.

        Args:
            settings: the pipeline's own configuration, as in `model_index.json`.
            empty: embeddings of N empty captions, from `as_negative` and `embed`.
        """
        return empty

    @abstractmethod
    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of one row of `embeds`, from the denoiser's configuration, for planning.

        Floats are float32 here, and captions have their greatest length.
        """

    def shown_tokens(self, references: Sequence[tuple[int, int]]) -> int:
        """Return how many tokens of a caption stand for its reference pictures, beside those of `shapes`.

        Args:
            references: their heights and widths in pixels.
        """
        return 0


class MaskedText(Text):
    """One text encoder with an attention mask, whose denoiser receives a mask of the captions too.

    Attributes:
        caption_tokens: tokens of a caption that the denoiser receives, at most.
        width: name of their width in the denoiser's configuration.
    """

    tokens: tuple[str, ...] = ("input_ids", "attention_mask")
    embeds = ("prompt_embeds", MASK)
    encoders = ("text_encoder",)
    caption_tokens: int
    width: str

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        return self.masked_tokens_of(self.tokenizer_of(pipeline, "input_ids"), captions)

    def shapes(self, denoiser: Settings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "prompt_embeds": ((self.caption_tokens, denoiser[self.width]), torch.float32),
            MASK: ((self.caption_tokens,), torch.bool),
        }


class ChatText(MaskedText):
    """Captions in a chat template, encoded no longer than the longest of a call, and only then padded.

    Padding comes last, also where a pipeline has it on the left.

    Attributes:
        window: tokens: captions are encoded with padding up to a multiple of it.
    """

    ragged = ("prompt_embeds",)
    window = 1

    def written(self, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
        return chat_prompts(tokenizer, texts)

    def tokens_of(self, tokenizer: Tokenizer, name: str, captions: list[str], **options: Any) -> Any:
        return super().tokens_of(tokenizer, name, captions, padding_side="right", **options)

    def num_tokens(self, name: str, encoder: TextEncoder) -> int:
        return self.caption_tokens

    def tokenize(self, pipeline: Pipeline, captions: list[str]) -> Captions:
        """Tokenize texts, padded to the longest of their windows: on the host, where its length is known."""
        found = super().tokenize(pipeline, captions)
        longest = -(int(found["attention_mask"].sum(dim=1).max()) // -self.window) * self.window
        return {name: column[:, :longest] for name, column in found.items()}

    def padded(self, embeds: torch.Tensor, mask: torch.Tensor) -> Captions:
        """Return the columns of `embeds`: N x tokens x ... and their mask, padded to the greatest length."""
        rest = self.caption_tokens - mask.shape[1]
        return {
            "prompt_embeds": torch.nn.functional.pad(zero_padding(embeds, mask), (0, 0, 0, rest)),
            MASK: torch.nn.functional.pad(mask, (0, rest)),
        }


def chat_prompts(tokenizer: Any, captions: list[str], **options: Any) -> list[str]:
    """Return captions in a tokenizer's chat template, each as a user's only message.

    Args:
        options: variables of the template.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, **options
        )
        for caption in captions
    ]


def real_tokens(conditions: Mapping[str, torch.Tensor]) -> list[int]:
    """Return how many tokens each of N captions has.

    From `LENGTHS` where the caller knows them, else from `MASK`, for which the host waits for the device.
    Planning runs on tensors without data; there captions have their greatest length.

    Args:
        conditions: with `MASK`, and optionally `LENGTHS`.
    """
    mask = conditions[MASK]
    if mask.is_meta or isinstance(mask, FakeTensor):
        return [mask.shape[1]] * len(mask)
    lengths = conditions[LENGTHS] if LENGTHS in conditions else mask.sum(dim=1)
    counts: list[int] = lengths.tolist()
    return counts


def without_padding(conditions: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return N captions' embeddings, cut to the longest one's tokens, and their mask; None if all are alike.

    Args:
        conditions: as for `real_tokens`, with `prompt_embeds`.
    """
    counts = real_tokens(conditions)
    longest = max(counts)
    mask = conditions[MASK][:, :longest] if min(counts) < longest else None
    return conditions["prompt_embeds"][:, :longest], mask


def zero_padding(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return embeddings, N x tokens x ..., with zeros at padding, where encoders answer with numbers too.

    For denoisers that do not attend to padding: zeros take little space in files.
    """
    return embeds.masked_fill(~mask.reshape(*mask.shape, *[1] * (embeds.dim() - 2)), 0.0)
