"""Ray Data's two steps from a source to encoded rows: read one picture, encode a batch of them."""

import posixpath
from typing import Any

import numpy as np

from cluster.storage import Storage
from ray_jobs.config import DataConfig, ModelConfig, resolve_path
from ray_jobs.data.images import Rejected, decode_image, encode_png
from ray_jobs.data.splits import Shares, content_digest, is_floor_candidate, split_of

REJECTED = "rejected"


class ReadPicture:
    """Row to row: adds pixels, digest and split, or the reason why the picture is set aside."""

    def __init__(self, storage: Storage, config: DataConfig) -> None:
        self.storage, self.config = storage, config

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        size = self.config.resolution
        read = dict(
            row,
            split=REJECTED,
            digest="",
            reason="",
            detail="",
            image=b"",
            pixels=np.zeros((size, size, 3), np.uint8),
        )
        try:
            read |= self._read(row["file_name"], row["text"])
        except Rejected as rejected:
            read |= {"reason": rejected.reason, "detail": rejected.detail}
        return read

    def _read(self, file_name: str, text: str) -> dict[str, Any]:
        if not text.strip():
            raise Rejected("empty_caption", "the text is empty")
        if posixpath.isabs(file_name) or posixpath.normpath(file_name).startswith(".."):
            raise Rejected("outside_folder", "file_name leaves the folder")
        try:
            with self.storage.filesystem.open_input_file(f"{self.storage.path}/{file_name}") as file:
                data = file.read()
        except FileNotFoundError:
            raise Rejected("missing_file", "no such file") from None
        except OSError as error:
            raise Rejected("unreadable", str(error)) from None
        config = self.config
        pixels = decode_image(data, resolution=config.resolution, background=config.background)
        digest = content_digest(data)
        shares = Shares(config.split_seed, config.validation, config.test)
        split = split_of(digest, shares)
        # Scores compare with real pictures: those splits keep theirs, and so does as much of the
        # training split as the floor (real training against real test pictures) needs.
        kept = split != "train" or is_floor_candidate(digest, shares)
        return {
            "digest": digest,
            "split": split,
            "pixels": pixels,
            "image": encode_png(pixels) if kept else b"",
        }


class Encoder:
    """An actor that holds the autoencoder and the text encoder.

    Batch to batch: `pixels` become `latents` (float16, C x H x W: the posterior's mean times the
    scaling factor), `text` becomes `input_ids` (int32, tokens) and `prompt_embeds` (float16, tokens x
    width). Half precision halves what is stored and streamed.
    """

    def __init__(self, model: ModelConfig, num_threads: int) -> None:
        import torch

        from ray_jobs.diffusion.loading import load_pipeline

        torch.set_num_threads(num_threads)
        pipeline = load_pipeline(resolve_path(model.base), revision=model.revision)
        self.autoencoder, self.tokenizer = pipeline.vae, pipeline.tokenizer
        self.text_encoder = pipeline.text_encoder
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autoencoder.to(self.device)
        self.text_encoder.to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        from ray_jobs.diffusion.loading import embed_tokens, tokenize

        pixels = torch.from_numpy(np.stack(list(batch.pop("pixels")))).to(self.device)
        with torch.no_grad():
            posterior = self.autoencoder.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
            latents = posterior.latent_dist.mean * self.autoencoder.config.scaling_factor
        input_ids = tokenize(self.tokenizer, [str(text) for text in batch["text"]])
        embeds = embed_tokens(self.text_encoder, input_ids)
        return batch | {
            "latents": latents.half().cpu().numpy(),
            "input_ids": input_ids.int().numpy(),
            "prompt_embeds": embeds.half().cpu().numpy(),
        }
