"""Cache of prompt embeddings: prompts recur, and the empty one comes with nearly every request."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import encode_texts
from serving.engine.batched_lora import Adapter, BatchedLoRA, Stacks


class Text(NamedTuple):
    """A text to encode.

    Attributes:
        written: what is tokenized, from the family's `as_prompt` or `as_negative`; None: no negative prompt.
        adapter: the adapter to encode it with.
        pictures: reference pictures, each uint8, height x width x 3, where text encoders see them.
        digest: of these pictures.
    """

    written: str | None
    adapter: Adapter | None
    pictures: tuple[torch.Tensor, ...] = ()
    digest: bytes = b""


class Key(NamedTuple):
    """What an embedding depends on: the text, the adapter if it changes text encoders, and the pictures."""

    written: str
    adapter: str | None
    digest: bytes


class PromptEmbeddings:
    """Least-recently-used cache of prompt embeddings.

    Args:
        pipeline: pipeline whose text encoders run on `device`, even if they are offloaded.
        low_rank: adapter hooks, which cover the text encoders too.
        device: PyTorch device.
        max_bytes: maximum size of the cached embeddings, on the device.
        reserve: take that memory with the first text, so that later ones neither let it grow nor fragment it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        low_rank: BatchedLoRA,
        *,
        device: str,
        max_bytes: int,
        reserve: bool = False,
    ) -> None:
        self.pipeline, self.text, self.device = pipeline, family_of(pipeline).text, device
        self.low_rank, self.max_bytes = low_rank, max_bytes
        self._kept: OrderedDict[Key, Captions] = OrderedDict()
        self._num_bytes = 0
        self._reserve, self._slots = reserve, Slots()
        self.hits = self.misses = 0

    def embed(self, texts: Sequence[Text]) -> list[Captions]:
        """Return the embeddings of N texts, each without the batch dimension. Missing ones are encoded in one
        batch, or in one for all that come with pictures of the same sizes.

        None is not the empty negative prompt: its embedding is that of `Text.unconditional`.
        """
        wanted = {self._key(text): text for text in texts}
        missing = [key for key in wanted if key not in self._kept]
        self.misses += len(missing)
        self.hits += len(texts) - len(missing)
        for key in wanted:
            if key in self._kept:
                self._kept.move_to_end(key)
        self._drop(self.max_bytes - len(missing) * self._slots.num_bytes, keep=wanted)
        groups: dict[tuple[torch.Size, ...], list[Key]] = {}
        for key in missing:
            groups.setdefault(tuple(each.shape for each in wanted[key].pictures), []).append(key)
        for keys in groups.values():
            self._encode(keys, [wanted[key] for key in keys])
        found = [self._embedding(text) for text in texts]
        self._drop(self.max_bytes)
        return found

    def _drop(self, max_bytes: int, keep: Collection[Key] = ()) -> None:
        """Drop the least recently used embeddings above a size, but the last one, and none of `keep`."""
        while self._num_bytes > max_bytes and len(self._kept) > 1 and next(iter(self._kept)) not in keep:
            key, dropped = self._kept.popitem(last=False)
            self._num_bytes -= _bytes_of(dropped)
            self._slots.give_back(key)

    def _encode(self, keys: Sequence[Key], texts: Sequence[Text]) -> None:
        """Encode texts whose pictures are of the same sizes, and keep the embeddings."""
        stacks: Stacks = {}
        for part in self.text.present(self.pipeline):
            stacks = {**stacks, **self.low_rank.stack([text.adapter for text in texts], part)}
        pictures = [
            torch.stack(each).permute(0, 3, 1, 2)
            for each in zip(*(text.pictures for text in texts), strict=True)
        ]
        with self.low_rank.applied(stacks):
            encoded = encode_texts(self.pipeline, [key.written for key in keys], self.device, pictures)
        for row, key in enumerate(keys):
            captions = {name: encoded[name][row] for name in self.text.embeds}
            if self._reserve and not self._slots.num_bytes:
                self._slots = Slots(captions, self.max_bytes)
            self._kept[key] = self._slots.take(key, captions) or _copy(captions)
            self._num_bytes += _bytes_of(captions)

    def _embedding(self, text: Text) -> Captions:
        embeds = self._kept[self._key(text)]
        if self._reserve:
            embeds = _copy(embeds)  # the slot of a dropped one is written again while rows use it
        return self.text.unconditional(self.pipeline.config, embeds) if text.written is None else embeds

    def _key(self, text: Text) -> Key:
        adapter = text.adapter
        changed = adapter is not None and not adapter.parts.isdisjoint(self.text.encoders)
        written = self.text.as_negative("") if text.written is None else text.written
        return Key(written, adapter.name if adapter and changed else None, text.digest)


class Slots:
    """Memory for embeddings of one layout, all of which is taken at once.

    Args:
        like: one of them; None: there are no slots.
        max_bytes: size of all.

    Attributes:
        num_bytes: size of one; 0 without slots.
    """

    def __init__(self, like: Captions | None = None, max_bytes: int = 0) -> None:
        like = like or {}
        self.num_bytes = _bytes_of(like)
        count = max_bytes // self.num_bytes if like else 0
        # Written, because memory is only taken then.
        self._all = {name: each.new_full((count, *each.shape), 0) for name, each in like.items()}
        self._free, self._taken = list(range(count)), dict[Key, int]()

    def take(self, key: Key, captions: Captions) -> Captions | None:
        """Return a copy in a free slot; None if there is none of this layout."""
        if not self._free or any(self._all[n].shape[1:] != each.shape for n, each in captions.items()):
            return None
        slot = self._taken[key] = self._free.pop()
        return {name: self._all[name][slot].copy_(each) for name, each in captions.items()}

    def give_back(self, key: Key) -> None:
        """Free the slot of an embedding, if it has one."""
        if (slot := self._taken.pop(key, None)) is not None:
            self._free.append(slot)


def _copy(captions: Captions) -> Captions:
    return {name: each.clone() for name, each in captions.items()}


def _bytes_of(captions: Captions) -> int:
    return sum(tensor.nbytes for tensor in captions.values())
