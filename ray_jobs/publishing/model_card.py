"""Model card of a published model, in the Hub's format (README.md next to the weights).

Pure: values in, text out. User text (captions, names, paths) is escaped, never markup. Of local paths and
URLs only the last part is included.

Format: https://huggingface.co/docs/hub/model-cards
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_jobs.config import LEARNING_RATE, Config, Effect, LoraConfig
from ray_jobs.config.yaml_text import write_yaml
from ray_jobs.diffusion.families.control import CONTROLNET, Control, ControlChannels
from ray_jobs.report import beginning, forgotten, headline, number
from ray_jobs.run.manifest import Manifest
from ray_jobs.run.records import (
    BESIDE,
    COPIES,
    FID,
    MEASURES,
    RECITED,
    FinalMeasures,
    Measurement,
    Remembered,
    Winner,
)
from ray_jobs.weights.model_index import UPSAMPLER
from ray_jobs.weights.schedulers import SCHEDULER


@dataclass(frozen=True)
class PublishedBase:
    """What the card's program must know of the base model beside its name.

    Attributes:
        on_hub: True if `model.base` is a Hub name, not a folder.
        variant: variant of its weights, for example fp16, if no default variant exists.
        injected: component that an adapter changes, where diffusers' pipeline has no LoRA loader.
        own_area: see `Family.own_area`.
        size_arguments: of the pipeline, see `Family.size_arguments`.
        references: names of the reference pictures; empty if it has none.
        before_drawing: lines of the program, see `Family.before_drawing`.
        takes_one: True if the pipeline takes one reference picture, and no list.
        paints_masks: see `Family.paints_masks`.
        torchvision: True if plain diffusers needs it to load the base.
        blocks: class of the base's blocks, if diffusers has only a modular pipeline for it.
        control: of what was trained to follow control images; None: nothing was.
    """

    on_hub: bool = True
    variant: str | None = None
    injected: str | None = None
    own_area: bool = False
    size_arguments: Mapping[str, object] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    before_drawing: tuple[str, ...] = ()
    takes_one: bool = False
    paints_masks: bool = False
    torchvision: bool = False
    blocks: str | None = None
    control: Control | ControlChannels | None = None


# Effects of the sections needed to train the model again; the others configure storage and serving.
REPRODUCED = (Effect.ENCODINGS, Effect.DATASET, Effect.WEIGHTS, Effect.SCORES)


def model_card(
    *,
    config: Config,
    base: PublishedBase,
    winner: Winner,
    manifest: Manifest,
    prompt: str,
    guidance: Mapping[str, object],
    pictures: Sequence[tuple[str, str]] = (),
    scheduler: str | None = None,
) -> str:
    """Compose the text of README.md.

    Args:
        winner: content of winner.json.
        manifest: content of dataset/manifest.json.
        prompt: prompt of the usage example.
        guidance: as in `usage`.
        pictures: (caption, path relative to the card) of pictures that the model generated.
        scheduler: class of the scheduler stored with LoRA weights; None: the base's scheduler is used.
    """
    config = config.with_settings({LEARNING_RATE: winner.learning_rate, **winner.settings})
    parts = [
        f"---\n{write_yaml(_front_matter(config, base, pictures))}---",
        f"# {_text(config.name)}",
        _introduction(config, base, winner),
        *(_pictures(pictures, manifest) if pictures else ()),
        *_use(config, base, usage(config, base, prompt, guidance, scheduler)),
        *_scores(config, winner, manifest),
        *_measures(winner),
        *(["## Earlier subjects", *map(_remembered, winner.remembered)] if winner.remembered else ()),
        *_data(config, manifest),
        *_settings(config, winner),
        *_reproduce(config, winner),
        *_limits(config, winner, manifest),
    ]
    return "\n\n".join(parts) + "\n"


def portable(path: str) -> str:
    """Shorten a path or URL for publication: Hub names and relative paths are kept, else only the last part.

    This keeps home folders, buckets and credentials in URLs out of the card.
    """
    plain = path.partition("?")[0] if "://" in path else path
    if "://" in plain or re.match(r"[/~\\]|\.\.|[A-Za-z]:[/\\]", plain):
        return re.split(r"[/\\]", plain.rstrip("/\\"))[-1]
    return plain


def _front_matter(
    config: Config, base: PublishedBase, pictures: Sequence[tuple[str, str]]
) -> dict[str, object]:
    lora = config.train.makes_adapter
    task = "image-to-image" if base.references or base.paints_masks else "text-to-image"
    found: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": task}
    if base.on_hub:  # the Hub accepts only names of its own models
        relation = "adapter" if lora or isinstance(base.control, Control) else "finetune"
        found |= {"base_model": config.model.base, "base_model_relation": relation}
    kind = ["lora"] if lora else ["controlnet"] if isinstance(base.control, Control) else []
    found["tags"] = [task, "diffusers", *kind, "diffray"]
    if pictures:
        widget = [{"text": _line(caption), "output": {"url": path}} for caption, path in pictures]
        found["widget"] = widget
    return found


def _introduction(config: Config, base: PublishedBase, winner: Winner) -> str:
    begun = {field: portable(name) for field, name in winner.begins_from.items()}
    name, lora = _text(begun.get("base") or portable(config.model.base)), config.train.lora
    edits = base.references or base.paints_masks
    article, does = ("An", "image-editing") if edits else ("A", "text-to-image")
    if config.train.makes_adapter:
        form = "rank" if lora.kind == "lora" else f"trained as {KINDS[lora.kind]} of rank"
        kind = f"LoRA weights ({form} {lora.rank}) for the {does} model {name}"
        kind += ", with which it follows control images" if base.control else ""
    elif isinstance(base.control, Control):
        kind = f"A ControlNet for the {does} model {name}"
    else:
        how = "all of its denoiser fine-tuned" if config.train.method == "full" else _rotated(lora)
        kind = f"{article} {does} model: {name}, {how}"
    told = f" {_text(beginning(begun))}" if begun else ""
    return f"{kind}, in diffusers' format.{told} {_text(headline(winner))}"


KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


def _rotated(lora: LoraConfig) -> str:
    return f"orthogonal matrices (OFT, blocks of {lora.block}) merged into its layers"


def _pictures(pictures: Sequence[tuple[str, str]], manifest: Manifest) -> list[str]:
    table = [
        "| " + " | ".join(f"![]({path})" for _, path in pictures) + " |",
        "|" + " --- |" * len(pictures),
        "| " + " | ".join(_text(caption) for caption, _ in pictures) + " |",
    ]
    captions = "held-out captions" if manifest.held_out else "captions of training images"
    return [f"Samples for {captions}:", "\n".join(table)]


# diffusers 0.42.1 and transformers 5.23 leave DoRA magnitudes in text encoders at their initial values.
MAGNITUDES = (
    'weights = load_file("pytorch_lora_weights.safetensors")',
    "for name, part in pipeline.components.items():",
    "    if isinstance(part, torch.nn.Module):",
    "        for key, parameter in part.named_parameters():",
    '            layer, magnitude, _ = key.removeprefix("text_model.").partition(".lora_magnitude_vector")',
    '            stored = f"{name}.text_model.{layer}{magnitude}"',
    "            if magnitude and stored in weights:",
    "                parameter.data = weights[stored]",
)


def usage(
    config: Config,
    base: PublishedBase,
    prompt: str,
    guidance: Mapping[str, object],
    scheduler: str | None = None,
) -> str:
    """Python program that samples `prompt` with plain diffusers; it runs in the model's folder.

    Everything is float32: for a base in half precision, transformers 5.23 keeps the files' dtype, diffusers
    0.42.1 does not, and mixed dtypes fail. Adapters load in training mode, in which `train.lora.dropout` is
    active, so the program switches to evaluation mode.

    Args:
        guidance: the pipeline's arguments for guidance (`Family.guidance_arguments`).
        scheduler: class of the scheduler stored with LoRA weights; None: the base's scheduler is used.
    """
    revision = f", revision={config.model.revision!r}" if config.model.revision else ""
    variant = f", variant={base.variant!r}" if base.variant else ""
    name = portable(config.model.base)
    lora = config.train.makes_adapter
    if base.blocks:
        load = _modular(base.blocks, name if lora else None, f"{revision}{variant}")
        names = {base.blocks}
        if "guidance_scale" in guidance:
            names.add(GUIDER)
            load.append(f"pipeline.update_components(guider={GUIDER}({_arguments(guidance)}))")
            guidance = {}
    elif isinstance(control := base.control, Control):
        names = {control.network_class, control.pipeline_class}
        load = [
            f'controlnet = {control.network_class}.from_pretrained(".", subfolder="{CONTROLNET}")',
            f"pipeline = {control.pipeline_class}.from_pretrained(",
            f"    {name!r}{revision}{variant}, controlnet=controlnet, torch_dtype=torch.float32",
            ")",
        ]
    else:
        told = f"{name!r}{revision}{variant}" if lora else '"."'
        kind = control.pipeline_class if control else "DiffusionPipeline"
        names = {kind}
        load = [f"pipeline = {kind}.from_pretrained({told}, torch_dtype=torch.float32)"]
    if lora:
        load += [
            *(
                _injection(config, base.injected)
                if base.injected
                else ('pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")',)
            ),
            "for part in pipeline.components.values():",
            "    if isinstance(part, torch.nn.Module):",
            "        part.eval()",
            *(MAGNITUDES if config.train.lora.use_dora and config.train.train_text_encoder else ()),
        ]
    if scheduler is not None:
        names.add(scheduler)
        load.append(f'pipeline.scheduler = {scheduler}.from_pretrained(".", subfolder="{SCHEDULER}")')
    side = config.data.resolution
    if base.own_area:
        load.append(
            f"pipeline.default_sample_size = {side} / pipeline.vae_scale_factor  # else it scales sizes"
        )
    return "\n".join(
        [
            *(["import os", ""] if f"model = {HERE}" in load else []),
            "import torch",
            f"from diffusers import {', '.join(sorted(names))}",
            *(["from PIL import Image"] if base.references or base.paints_masks or base.control else []),
            *([f"from peft import {', '.join(INJECTING)}"] if base.injected and lora else []),
            *(["from safetensors.torch import load_file"] if MAGNITUDES[0] in load else []),
            "",
            *load,
            *base.before_drawing,
            *_references(base),
            "picture = pipeline(",
            f"    prompt={prompt!r},",  # by name: FLUX.2's pipelines take an image first
            *([f"    image=references{'[0]' if base.takes_one else ''},"] if base.references else []),
            *([f"    {base.control.image_argument}=control,"] if base.control else []),
            *(["    image=before,", "    mask_image=mask,"] if base.paints_masks else []),
            f"    height={side},",
            f"    width={side},",
            *(f"    {name}={value!r}," for name, value in base.size_arguments.items()),
            f"    num_inference_steps={config.evaluate.inference_steps},",
            *(f"    {name}={value!r}," for name, value in guidance.items()),
            "    generator=torch.Generator().manual_seed(0),",
            ").images[0]",
            'picture.save("picture.png")',
        ]
    )


def _references(base: PublishedBase) -> list[str]:
    """Return the lines that open the reader's own pictures: references, one to paint into, or to follow."""
    if base.control:
        return ['control = Image.open("control.png").convert("RGB")  # your control image, of the same size']
    if base.paints_masks:
        return [
            'before = Image.open("before.png").convert("RGB")  # your picture',
            'mask = Image.open("mask.png").convert("L")  # of the same size, white where it is to be painted',
        ]
    if not base.references:
        return []
    names = ", ".join(repr(f"{portable(name)}.png") for name in base.references)
    return [f"references = [Image.open(name).convert('RGB') for name in ({names},)]  # your pictures"]


GUIDER = "ClassifierFreeGuidance"


def _arguments(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


HERE = "os.getcwd()"


def _modular(blocks: str, base: str | None, options: str) -> list[str]:
    """Return the lines that load a modular pipeline without the block that rewrites prompts.

    A folder is absolute: for "." and a subfolder, transformers 5.23 looks for some files beside it.

    Args:
        blocks: class of its blocks.
        base: folder or Hub name of a base; None for the model in this folder, whose index cannot know where
            it will be.
        options: further arguments with which a base's components are loaded.
    """
    lines = [
        f"blocks = {blocks}()",
        f'blocks.sub_blocks.pop("{UPSAMPLER}", None)  # a language model that would rewrite the prompt',
    ]
    if base is None:
        return [
            *lines,
            f"model = {HERE}",
            "pipeline = blocks.init_pipeline(model)",
            "pipeline.load_components(pretrained_model_name_or_path=model, torch_dtype=torch.float32)",
        ]
    return [
        *lines,
        f"pipeline = blocks.init_pipeline({base!r})",
        f"pipeline.load_components(torch_dtype=torch.float32{options})",
    ]


INJECTING = ("LoraConfig", "inject_adapter_in_model", "set_peft_model_state_dict")


def _injection(config: Config, component: str) -> list[str]:
    """Return the lines that load an adapter with peft alone."""
    own = config.train.lora
    names = {"r": own.rank, "lora_alpha": own.alpha, "use_dora": own.use_dora, "use_rslora": own.use_rslora}
    settings = ", ".join(f"{name}={value!r}" for name, value in names.items())
    ranks: list[str] = []
    if own.kind != "lora":  # each layer's follows from its size, and the scale is 1
        settings = "rank_pattern=ranks, alpha_pattern=ranks"
        ranks = ['ranks = {f"^{layer}$": len(weights[f"{layer}.lora_A.weight"]) for layer in layers}']
    return [
        MAGNITUDES[0],
        f'weights = {{name.removeprefix("{component}."): tensor for name, tensor in weights.items()}}',
        'layers = sorted({name.partition(".lora_")[0] for name in weights})',
        *ranks,
        f"settings = LoraConfig({settings}, target_modules=layers)",
        f"inject_adapter_in_model(settings, pipeline.{component})",
        f"set_peft_model_state_dict(pipeline.{component}, weights)",
    ]


def _use(config: Config, base: PublishedBase, code: str) -> list[str]:
    dot = HERE if f"model = {HERE}" in code else "the dot"
    where = f"In this folder (on the Hub, put the repository's name in place of {dot})"
    if (config.train.makes_adapter or isinstance(base.control, Control)) and not base.on_hub:
        where += f"; {_text(portable(config.model.base))} is the folder of the base model"
    model = config.model
    kinds = {"a base": model.quantize, "text encoders": model.quantize_text}
    if stored := [f"{kind} stored as {name}" for kind, name in kinds.items() if name]:
        where += (
            f". The scores are those of {' and '.join(stored)}; this loads the plain model, whose pictures "
            "differ a little"
        )
    packages = "torch diffusers transformers accelerate peft" + (" torchvision" if base.torchvision else "")
    return ["## Use", f"`pip install {packages}`. {where}:", _fenced(code, "python")]


def _scores(config: Config, winner: Winner, manifest: Manifest) -> list[str]:
    def fid(key: str) -> str:
        return f"{getattr(winner, key):.1f}"

    def real(split: str) -> int:
        """Number of real reference pictures; without a held-out split they are training pictures."""
        return min(config.evaluate.num_samples, manifest.rows(split if manifest.held_out else "train"))

    counts = [
        f"{generated:,} generated, {real(split):,} real"
        for generated, split in ((winner.num_samples, "test"), (winner.validation_num_samples, "validation"))
    ]
    table = _table(
        ("FID (lower is nearer to real pictures)", "test", "validation"),
        [
            ("this model", fid("test_fid"), fid("validation_fid")),
            ("base model", fid("base_test_fid"), fid("base_validation_fid")),
            ("real training pictures (the floor)", fid("test_floor_fid"), "–"),
            ("pictures", *counts),
        ],
    )
    times = winner.test_reads
    reads = "once" if times == 1 else f"{times} times"
    ranked, digits = winner.measure
    if winner.ranked_by != FID:
        value, error = winner.value_of(f"validation_{winner.ranked_by}")
        ranked += f" ({number(value, digits, error)})"
    return [
        "## Scores",
        table,
        f"Feature network: {_text(winner.feature_network)}. The test split was used {reads}, after the"
        f" search. The search selected the model by its validation {ranked}, which is therefore slightly too"
        " low. FID depends on the number of images and on the network: compare only within this table.",
    ]


def _measures(winner: Winner) -> list[str]:
    """Table of base's and winner's further scores on the test split; empty if there are none."""
    found = winner.measures or FinalMeasures()
    base = {each.metric: each for each in found.base}
    floor = {each.metric: number(each.value, 3, each.standard_error) for each in found.floor}
    rows = []
    for key, (name, digits) in (MEASURES | BESIDE).items():
        scores = [winner.value_of(f"{whose}test_{key}") for whose in ("", "base_")]
        if key != FID and any(value is not None for value, _ in scores):
            pair = (number(value, digits, error) for value, error in scores)
            rows.append((name, *pair, "–", f"{winner.num_samples:,}", winner.feature_network))
    for each in found.winner:
        pair = (number(record.value, 3, record.standard_error) for record in (each, base[each.metric]))
        real = floor.get(each.metric, "–")
        rows.append((each.metric, *pair, real, f"{each.num_samples:,}", each.feature_network))
    if not rows:
        return []
    head = ("measure, on the test split", "this model", "base model", "real pictures", "pictures", "network")
    return ["Further measures, of the same pictures:", _table(head, rows)]


def _remembered(found: Remembered) -> str:
    pictures = f"{found.num_samples:,} generated pictures, by {found.feature_network}"
    return f"{_text(forgotten(found))} ({_text(pictures)})"


def _data(config: Config, manifest: Manifest) -> list[str]:
    splits = ", ".join(f"{manifest.rows(split):,} {split}" for split in ("train", "validation", "test"))
    rows = [(portable(each.name), f"{each.rows:,}", f"{each.share:.0%}") for each in manifest.source]
    held_out = ""
    if not manifest.held_out:
        of = "test scores" if manifest.folds else "scores"
        held_out = f" It is too small to hold out images; {of} use training images."
    data = config.data
    sizes = f"{data.resolution} pixels"
    if data.num_references:
        each = "a reference" if data.num_references == 1 else f"{data.num_references} references"
        sizes += f", each with {each} of {data.reference_resolution or data.resolution}"
    if data.has_control:
        sizes += f"; control images: {data.control.kind or 'of their own'}"
    if data.has_masks:
        sizes += f"; what is outside of its mask counted {config.train.loss.outside_mask:g} of what is inside"
    return [
        "## Training data",
        f"{manifest.captions.different:,} different captions; pictures: {splits};"
        f" {sizes}.{held_out} Digest of the prepared data: `{manifest.digest}`.",
        _table(("source", "pictures", "share of training"), rows),
    ]


def _settings(config: Config, winner: Winner) -> list[str]:
    train = config.train
    method = "all weights of the denoiser"
    if train.makes_adapter:
        method = f"{KINDS[train.lora.kind]}, rank {train.lora.rank}, alpha {train.lora.alpha}"
    elif train.method == "lora":
        method = _rotated(train.lora)
    elif train.method == "controlnet":
        method = "a ControlNet beside the frozen base"
    workers = f"{train.min_workers} to {train.max_workers}" if train.is_elastic else f"{train.min_workers}"
    rows = [
        ("trained", method + (", and the text encoders" if train.train_text_encoder else "")),
        ("learning rate", f"{winner.learning_rate:g}, {train.schedule}"),
        ("optimizer", ", then ".join(dict.fromkeys(train.optimizers))),
        ("steps", f"{winner.step:,} of {train.batch_size} pictures"),
        ("precision", train.precision),
        ("sharding", f"ZeRO stage {train.zero_stage}, {workers} workers"),
        ("averaged weights (EMA)", f"decay {train.ema_decay:g}" if train.ema_decay else "off"),
        ("seed", str(config.seed)),
    ]
    return ["## Training", _table(("setting", "value"), rows)]


def _reproduce(config: Config, winner: Winner) -> list[str]:
    told = _portable(config.model_dump(mode="json", include={"name", *config.affecting(*REPRODUCED)}))
    settings = _fenced(write_yaml(told), "yaml")
    command = ".venv/bin/python -m cluster.submit --config run.yaml -- python -m ray_jobs"
    commands = "\n".join(
        [
            "# the search, and the model that won it",
            f"{command}.pipeline --config run.yaml",
            f"# this model's training alone; its weights are those of step {winner.step}",
            f"{command}.train --config run.yaml",
        ]
    )
    return [
        "## Reproduce",
        "With diffray, and this as `run.yaml` (names stand in place of paths outside of the checkout):",
        _fenced(commands, "sh"),
        f"<details><summary>run.yaml</summary>\n\n{settings}\n\n</details>",
    ]


def _limits(config: Config, winner: Winner, manifest: Manifest) -> list[str]:
    copies = "".join(
        f" Near copies, {whose} that are closer to one of {each.num_training:,} training images than"
        f" {1 - each.expected_share:.0%} of images that were not trained on are: {each.value:.1%}. Without"
        f" memorisation about {each.expected_share:.0%} are expected.{_sensitivity(each)}"
        for metric, whose in (
            (COPIES, "samples for the test captions"),
            (RECITED, "samples for captions of training images"),
        )
        for each in (winner.measures or FinalMeasures()).winner
        if each.metric == metric and each.expected_share is not None
    )
    learnt = manifest.train + (manifest.validation if config.search.folds else 0)
    return [
        "## Limits and licence",
        f"The model was fine-tuned on {learnt:,} images. What they do not show is drawn as by the base"
        f" model, and rare training images may be memorised.{copies} The model has the base model's biases"
        f" and no safety filter of its own. It was evaluated only at {config.data.resolution} pixels, with"
        f" {config.evaluate.inference_steps} denoising steps and a guidance scale of"
        f" {config.evaluate.guidance_scale:g}.",
        "This card grants no licence. Those of the base model and of the training data apply to the model"
        " and to the images that it generates.",
    ]


def _sensitivity(copies: Measurement) -> str:
    if copies.metric != COPIES or copies.sensitivity is None:
        return ""
    return f" Of training images that went through the autoencoder twice this finds {copies.sensitivity:.0%}."


def _portable(value: object) -> object:
    """Apply `portable` to all strings of a configuration."""
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_portable(each) for each in value]
    return portable(value) if isinstance(value, str) else value


def _line(text: str) -> str:
    return " ".join(text.split())


def _text(text: str) -> str:
    """Escape text as single-line Markdown."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", _line(text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fenced(text: str, language: str) -> str:
    """Format a code block whose fence is longer than any in the text (CommonMark, section 4.5)."""
    ticks = max([2, *map(len, re.findall("`+", text))]) + 1
    return f"{'`' * ticks}{language}\n{text.rstrip()}\n{'`' * ticks}"
