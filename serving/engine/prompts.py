"""Cache of prompt embeddings: prompts recur, and the empty one comes with nearly every request."""

from collections import OrderedDict
from collections.abc import Sequence

from ray_jobs.diffusion.families import Captions, family_of
from ray_jobs.diffusion.protocols import Pipeline
from ray_jobs.diffusion.sampling import encode_texts
from serving.engine.batched_lora import Adapter, BatchedLoRA, Stacks

# What is tokenized, from the family's `as_prompt` or `as_negative`, and the adapter to encode it with. None:
# no negative prompt.
Text = tuple[str | None, Adapter | None]


class PromptEmbeddings:
    """Least-recently-used cache of prompt embeddings.

    Args:
        pipeline: pipeline whose text encoders run on `device`, even if they are offloaded.
        low_rank: adapter hooks, which cover the text encoders too.
        device: PyTorch device.
        max_bytes: maximum size of the cached embeddings, on the device.
    """

    def __init__(self, pipeline: Pipeline, low_rank: BatchedLoRA, *, device: str, max_bytes: int) -> None:
        self.pipeline, self.text, self.device = pipeline, family_of(pipeline).text, device
        self.low_rank, self.max_bytes = low_rank, max_bytes
        self._kept: OrderedDict[tuple[str, str | None], Captions] = OrderedDict()
        self._num_bytes = 0
        self.hits = self.misses = 0

    def embed(self, texts: Sequence[Text]) -> list[Captions]:
        """Return the embeddings of N texts, each without the batch dimension. Missing ones are encoded in one
        batch.

        None is not the empty negative prompt: its embedding is that of `Text.unconditional`.
        """
        wanted = {self._key(text): text for text in texts}
        missing = [key for key in wanted if key not in self._kept]
        self.misses += len(missing)
        self.hits += len(texts) - len(missing)
        if missing:
            adapters = [wanted[key][1] for key in missing]
            stacks: Stacks = {}
            for part in self.text.present(self.pipeline):
                stacks = {**stacks, **self.low_rank.stack(adapters, part)}
            with self.low_rank.applied(stacks):
                encoded = encode_texts(self.pipeline, [text for text, _ in missing], self.device)
            for row, key in enumerate(missing):
                self._kept[key] = {name: encoded[name][row].clone() for name in self.text.embeds}
                self._num_bytes += _bytes_of(self._kept[key])
        for key in wanted:
            self._kept.move_to_end(key)
        found = [self._embedding(text) for text in texts]
        while self._num_bytes > self.max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= _bytes_of(dropped)
        return found

    def _embedding(self, text: Text) -> Captions:
        embeds = self._kept[self._key(text)]
        return self.text.unconditional(self.pipeline.config, embeds) if text[0] is None else embeds

    def _key(self, text: Text) -> tuple[str, str | None]:
        """Return what the embedding depends on: the text, and the adapter if it changes text encoders."""
        written, adapter = text
        changed = adapter is not None and not adapter.parts.isdisjoint(self.text.encoders)
        if written is None:
            written = self.text.as_negative("")
        return written, adapter.name if adapter and changed else None


def _bytes_of(captions: Captions) -> int:
    return sum(tensor.nbytes for tensor in captions.values())
