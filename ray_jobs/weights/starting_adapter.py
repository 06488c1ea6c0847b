"""The adapter of `model.adapter`, from which training goes on: with its rank, scale, layers and values.

The base with this adapter is what a run begins from, and so what its result is compared with.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ray_jobs.config import Config, ConfigError, ModelConfig
from ray_jobs.diffusion.families import Family
from ray_jobs.diffusion.finetuning import ADAPTER
from ray_jobs.diffusion.protocols import Component
from ray_jobs.weights.adapter_files import read_adapter_file
from ray_jobs.weights.given_adapters import (
    DOWN,
    file_digest,
    given_file,
    inject_given,
    own_part,
    read_given,
    require_places,
)
from ray_jobs.weights.loading import LORA_WEIGHTS
from ray_jobs.weights.model_index import index_path
from ray_jobs.weights.saving import write_adapter
from ray_jobs.weights.schedulers import has_scheduler

FIELD = "model.adapter"


def adapter_file(model: ModelConfig) -> Path:
    """Return the local file of `model.adapter`; see `given_file`.

    Raises:
        ValueError: as `given_file`, or it is a whole model.
    """
    from cluster.fetched import local_path

    if index_path(Path(local_path(str(model.adapter), FIELD))):
        raise ValueError(f"{FIELD}: {model.adapter} is a whole model; give it as model.base")
    return given_file(str(model.adapter), model.adapter_revision, FIELD)


def adapter_digest(model: ModelConfig) -> str | None:
    """Return the sha256 of the file of `model.adapter`; None without one."""
    return file_digest(adapter_file(model)) if model.adapter else None


def with_form_of_adapter(config: Config) -> Config:
    """Return a configuration whose `train.lora` has the rank, the scale and the kind of `model.adapter`.

    Of several ranks it is the most common one.

    Raises:
        ConfigError: the file is no LoRA, or `train.lora` or `train.loss` contradicts it.
    """
    from safetensors import SafetensorError

    try:
        file = adapter_file(config.model)
        tensors, settings = read_adapter_file(file)
    except SafetensorError as error:
        raise ConfigError(f"{FIELD}: {config.model.adapter}: no safetensors file ({error})") from None
    except ValueError as error:
        raise ConfigError(str(error) if str(error).startswith(FIELD) else f"{FIELD}: {error}") from None
    ranks = [len(each) for name, each in tensors.items() if DOWN.search(name)]
    if not ranks:
        raise ConfigError(f"{FIELD}: {file}: there is no LoRA in it; give an adapter of this model")
    [(rank, _)] = Counter(ranks).most_common(1)
    told = {name.rpartition(".")[2]: value for name, value in sorted(settings.items())}
    alpha = told.get("lora_alpha", rank)  # other programs' alphas become part of the tensors
    if alpha != int(alpha):
        raise ConfigError(f"{FIELD}: {file}: its alpha is {alpha}, but training takes whole numbers only")
    form = {
        "kind": "lora",
        "rank": rank,
        "alpha": int(alpha),
        "use_dora": any("magnitude" in name for name in tensors),
        "use_rslora": bool(told.get("use_rslora")),
    }
    lora, fix = config.train.lora, "leave it out, or give another adapter"
    for name, value in form.items():
        if name in lora.model_fields_set and getattr(lora, name) != value:
            raise ConfigError(
                f"train.lora.{name}: {getattr(lora, name)}, but {FIELD}: {config.model.adapter}, from which "
                f"training goes on, has {value}; {fix}"
            )
    if has_scheduler(file.parent) and not config.train.loss.zero_terminal_snr:
        raise ConfigError(
            f"train.loss.zero_terminal_snr: false, but {FIELD}: {config.model.adapter} was trained with it; "
            "set it to true"
        )
    train = config.train.model_copy(update={"lora": lora.model_copy(update=form)})
    return config.model_copy(update={"train": train})


def brought_layers(config: Config, family: Family) -> list[str]:
    """Return the denoiser's layers that an adapter changes besides `train.lora.target_modules`.

    To follow control images, it must change the layer that takes them.
    """
    channels = family.control_channels
    return [channels.layer] if channels and config.data.has_control else []


def add_starting_adapter(
    parts: Mapping[str, Component],
    family: Family,
    config: Config,
    adapter: str = ADAPTER,
    dropout: float | None = None,
) -> None:
    """Freeze the trained components and add the adapter of `model.adapter` to train it further.

    Args:
        parts: trained components by name.
        adapter: the adapter's name in peft.
        dropout: None: `train.lora.dropout`.

    Raises:
        ValueError: the file is no LoRA of all these components alone, or `train.lora` contradicts it.
    """
    file = adapter_file(config.model)
    tensors, settings = read_given(file, family, parts[family.denoiser], FIELD)
    _require_components(tensors, parts, family, file)
    require_places(tensors, parts, file, FIELD)
    if not family.has_lora_loader and len({len(t) for name, t in tensors.items() if "lora_A" in name}) > 1:
        raise ValueError(
            f"{FIELD}: {file}: its layers have several ranks, of which diffusers reads none for this base"
        )
    for name, part in parts.items():
        own = own_part(tensors, name)
        layers = {key.partition(".lora_")[0] for key in own}
        if name in family.denoisers:
            unused = family.unused_layers(part, config.data.num_references)
            brought, chosen = brought_layers(config, family), config.train.lora.target_modules
            if not layers.issuperset(brought):
                raise ValueError(
                    f"{FIELD}: {file}: it follows no control images, because it does not change "
                    f"{brought[0]}; give an adapter that was trained with them, or leave them out"
                )
            _require_layers(layers, chosen and [*chosen, *brought], unused, file)
        part.requires_grad_(False)
        try:
            rate = config.train.lora.dropout if dropout is None else dropout
            inject_given(part, own, own_part(settings, name), adapter, dropout=rate)
        except ValueError as error:
            raise ValueError(f"{FIELD}: {file}: {name}: {error}") from None


def _require_components(
    tensors: Mapping[str, object], parts: Mapping[str, object], family: Family, file: Path
) -> None:
    """Raise ValueError if an adapter is of other components than those that are trained."""
    for name in tensors:
        component = name.partition(".")[0]
        if component in family.text.encoders and component not in parts:
            raise ValueError(
                f"{FIELD}: {file}: {name} is of a text encoder, and train.train_text_encoder is false; "
                "set it to true, or give an adapter without"
            )
    adapted = {name.partition(".")[0] for name in tensors}
    for component in parts:
        if adapted.intersection(parts) and component not in adapted:
            other = "train.train_text_encoder is true; set it to false, or"
            why = other if component in family.text.encoders else "it is trained too;"
            raise ValueError(
                f"{FIELD}: {file}: it has no tensor of {component}, and {why} give an adapter with"
            )


def _require_layers(layers: set[str], chosen: list[str] | None, unused: tuple[str, ...], file: Path) -> None:
    """Raise ValueError if an adapter's layers are not the chosen ones, or do not reach the prediction."""
    for layer in sorted(layers.intersection(unused)):
        raise ValueError(f"{FIELD}: {file}: {layer} never reaches the prediction; give an adapter without it")
    if chosen is None:
        return
    endings = tuple(f".{target}" for target in chosen)
    missing = [target for target in chosen if not any(f".{layer}".endswith(f".{target}") for layer in layers)]
    others = sorted(layer for layer in layers if not f".{layer}".endswith(endings))
    if missing or others:
        which = f"has none of {missing[0]}" if missing else f"also has {others[0]}"
        raise ValueError(
            f"train.lora.target_modules: {chosen}, but {FIELD}: {file}, from which training goes on, "
            f"{which}; leave it out, or give another adapter"
        )


@contextmanager
def adapter_folder(model: ModelConfig, family: Family, denoiser: Component) -> Iterator[Path]:
    """Yield a folder with the adapter of `model.adapter` in diffusers' format, for `load_lora`.

    Raises:
        ValueError: the file is no LoRA.
    """
    file = adapter_file(model)
    tensors, settings = read_given(file, family, denoiser, FIELD)
    if file.name == LORA_WEIGHTS and tensors.keys() == read_adapter_file(file)[0].keys():
        yield file.parent
        return
    components = {name.partition(".")[0] for name in tensors}
    with tempfile.TemporaryDirectory(prefix="diffray-adapter-") as folder:
        write_adapter(
            Path(folder),
            {name: own_part(tensors, name) for name in components},
            {name: own_part(settings, name) for name in components},
        )
        yield Path(folder)
