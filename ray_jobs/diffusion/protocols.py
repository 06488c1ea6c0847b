"""Types of diffusers' and transformers' objects: what this project uses of them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import torch
from torch import nn

Settings = Mapping[str, Any]
"""Configuration of a component: options by name, as its `config.json` has them."""


class Scheduler(Protocol):
    """A sampling scheduler of diffusers."""

    config: Any  # a mapping whose options are attributes too
    timesteps: torch.Tensor

    def set_timesteps(self, *args: Any, **options: Any) -> None: ...
    def step(self, *args: Any, **options: Any) -> Any: ...
    def save_pretrained(self, folder: Any, **options: Any) -> Any: ...
    # Each class has further methods and state, which differ.
    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...


class Component(nn.Module):
    """A network of a pipeline: an autoencoder, a denoiser or a text encoder. For signatures only.

    The classes of diffusers and transformers have no other common base; they differ in layers and switches.
    """

    if TYPE_CHECKING:
        config: Any  # a mapping whose options are attributes too
        dtype: torch.dtype

        def __call__(self, *args: Any, **named: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


Autoencoder: TypeAlias = Component
Denoiser: TypeAlias = Component
TextEncoder: TypeAlias = Component


class Pipeline(Protocol):
    """A pipeline of diffusers. Its components are attributes; their names differ between families."""

    config: Any
    components: Mapping[str, Any]
    scheduler: Scheduler
    vae: Autoencoder
    device: torch.device

    def to(self, *args: Any, **options: Any) -> Self: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    model_max_length: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __len__(self) -> int: ...

    def __call__(self, captions: list[str], **options: Any) -> Any: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: list[Any], **options: Any) -> Any: ...
