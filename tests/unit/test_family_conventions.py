"""What is easy to get wrong about single families, where pictures of small models may not show it."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ray_jobs.diffusion.families import FAMILIES, lumina2, sana
from ray_jobs.diffusion.finetuning import FineTuning, add_lora
from ray_jobs.diffusion.objectives import FlowMatching, LossSettings
from ray_jobs.diffusion.sampling import encode_prompts, encode_texts
from ray_jobs.diffusion.solvers import tabulate
from ray_jobs.weights.loading import LORA_WEIGHTS, load_lora, load_pipeline, unload_lora
from ray_jobs.weights.saving import save_lora
from tests.serving import plain_diffusers

LONG = "a small red circle " * 200


def test_instructions_before_captions_are_those_of_the_pipelines(tiny: Callable[[str], Path]) -> None:
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert "\n".join(lines) == sana.INSTRUCTION
    pipeline = plain_diffusers.load(tiny("Lumina2Pipeline"))
    assert f"{pipeline.system_prompt} <Prompt Start> " == lumina2.SYSTEM_PROMPT


@pytest.mark.parametrize("name", ["SanaPipeline", "Lumina2Pipeline"])
def test_texts_of_prompts_and_of_negative_prompts_are_encoded_together_as_each_alone(
    tiny: Callable[[str], Path], name: str
) -> None:
    """Sana's are of different lengths until the instruction's tokens are left out."""
    pipeline, text = load_pipeline(str(tiny(name))), FAMILIES[name].text
    for caption in ("A big Blue cross ", LONG):
        together = encode_texts(pipeline, [text.as_prompt(caption), text.as_negative(caption)])
        for row, negative in enumerate((False, True)):
            alone = encode_prompts(pipeline, [caption], negative=negative)
            for column in text.embeds:
                assert torch.allclose(together[column][row].float(), alone[column][0].float(), atol=1e-5)
        as_prompt, as_negative = together["prompt_embeds"]
        assert not torch.allclose(as_prompt, as_negative, atol=1e-2)


def test_sana_keeps_the_tokens_of_captions_and_none_of_the_instruction(tiny: Callable[[str], Path]) -> None:
    pipeline, text = load_pipeline(str(tiny("SanaPipeline"))), FAMILIES["SanaPipeline"].text
    tokens = text.tokenize(pipeline, [text.as_prompt("red circle"), text.as_prompt(LONG)])
    kept = tokens["input_ids"].gather(1, tokens["kept"].long())
    words = [pipeline.tokenizer.convert_ids_to_tokens(row) for row in kept.tolist()]
    assert words[0][:4] == ["<bos>", "▁red", "▁circle", "<pad>"] and len(words[1]) == sana.MAX_TOKENS
    assert words[1][:6] == ["<bos>", "▁a", "▁small", "▁red", "▁circle", "▁a"]
    masks = tokens["attention_mask"].gather(1, tokens["kept"].long()).sum(dim=1)
    assert masks.tolist() == [3, sana.MAX_TOKENS]


def test_sana_is_trained_with_the_shift_that_it_samples_with(tiny: Callable[[str], Path]) -> None:
    """diffusers' training script gets 1: the flow-matching scheduler does not know `flow_shift`."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = load_pipeline(str(tiny("SanaPipeline")))
    config = pipeline.scheduler.config
    objective = FAMILIES["SanaPipeline"].schedule.objective(config)
    assert isinstance(objective, FlowMatching) and objective.shift == config.flow_shift == 3.0
    assert FlowMatchEulerDiscreteScheduler.from_config(config).config.shift == 1.0
    table = tabulate(pipeline.scheduler, FAMILIES["SanaPipeline"], 3, (8, 2, 2)).table
    assert table[:, 0].tolist() == [999, 856, 599]  # it is told integers, although sigmas are not


def test_a_solver_that_is_not_for_flows_has_no_shift_to_train_with(tiny_model: Path) -> None:
    scheduler = load_pipeline(str(tiny_model)).scheduler
    assert scheduler.config.flow_shift == 1.0
    with pytest.raises(ValueError, match="has no shift; choose a flow-matching model"):
        FAMILIES["SanaPipeline"].schedule.objective(scheduler.config)


def test_auraflow_shifts_its_lowest_sigma_twice_and_lumina_does_not(tiny: Callable[[str], Path]) -> None:
    def shifted(shift: float, sigma: float) -> float:
        return shift * sigma / (1 + (shift - 1) * sigma)

    for name, shift, lowest in (
        ("AuraFlowPipeline", 1.73, shifted(1.73, 0.001)),
        ("Lumina2Pipeline", 6, 0.25),
    ):
        scheduler = load_pipeline(str(tiny(name))).scheduler
        FAMILIES[name].schedule.set_timesteps(scheduler, 4, (4, 8, 8), "cpu")
        assert scheduler.sigmas[3].item() == pytest.approx(shifted(shift, lowest), rel=1e-3)


def test_auraflow_gets_zeros_for_padding(tiny: Callable[[str], Path]) -> None:
    embeds = encode_prompts(load_pipeline(str(tiny("AuraFlowPipeline"))), ["a small red circle"])[
        "prompt_embeds"
    ]
    assert embeds[0, :5].abs().sum(dim=-1).min() > 0 and not embeds[0, 5:].any()


def test_lumina_guides_without_changing_the_norm_of_a_row_of_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    without, with_caption = torch.randn(2, 1, 4, 3, 5, generator=generator)
    guided = FAMILIES["Lumina2Pipeline"].guide(without, with_caption, torch.tensor(4.0))
    plain = without + 4 * (with_caption - without)
    assert torch.allclose(guided.norm(dim=-1), with_caption.norm(dim=-1), atol=1e-5)
    assert torch.allclose(
        guided / guided.norm(dim=-1, keepdim=True), plain / plain.norm(dim=-1, keepdim=True)
    )


def test_lumina_draws_the_same_whatever_stands_in_padding(tiny: Callable[[str], Path]) -> None:
    pipeline, family = load_pipeline(str(tiny("Lumina2Pipeline"))), FAMILIES["Lumina2Pipeline"]
    conditions = encode_prompts(pipeline, ["a small red circle", LONG])
    embeds, mask = conditions["prompt_embeds"], conditions["prompt_mask"]
    latents, told = (
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([900, 300]),
    )
    with torch.no_grad():
        expected = family.denoise(family.model(pipeline), latents, told, conditions)
        filled = conditions | {"prompt_embeds": torch.where(mask[..., None], embeds, 5.0)}
        assert torch.allclose(
            family.denoise(family.model(pipeline), latents, told, filled), expected, atol=1e-5
        )


def test_pixart_reads_captions_in_lower_case_and_as_they_are_otherwise(tiny: Callable[[str], Path]) -> None:
    """Its pipeline cleans them further where bs4 and ftfy are installed, unless it is told not to."""
    folder = tiny("PixArtSigmaPipeline")
    ours = encode_prompts(load_pipeline(str(folder)), [" A small RED &amp; circle "])
    pipeline = plain_diffusers.load(folder)
    with torch.no_grad():
        embeds, mask, *_ = pipeline.encode_prompt(" A small RED &amp; circle ", False, clean_caption=False)
    assert torch.equal(ours["prompt_mask"], mask.bool())
    assert torch.allclose(ours["prompt_embeds"], embeds * mask[..., None], atol=1e-5)
    family = FAMILIES["PixArtSigmaPipeline"]
    assert family.guidance_arguments(pipeline.transformer.config, 2.0)["clean_caption"] is False


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_a_pipeline_without_a_loader_have_diffusers_names_and_can_be_removed(
    tiny: Callable[[str], Path], tmp_path: Path, dora: bool
) -> None:
    from peft.utils import get_peft_model_state_dict

    folder, family = tiny("PixArtSigmaPipeline"), FAMILIES["PixArtSigmaPipeline"]
    trained, base = load_pipeline(str(folder)), load_pipeline(str(folder))
    assert not hasattr(trained, "load_lora_weights")
    add_lora(trained.transformer, rank=2, alpha=6, dropout=0.1, target_modules=["to_q"], use_dora=dora)
    for name, parameter in trained.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    objective = family.schedule.objective(trained.scheduler.config)
    model = FineTuning(trained, family, objective, LossSettings())
    save_lora(trained, model, dict(model.trained()), tmp_path)
    with safe_open(tmp_path / LORA_WEIGHTS, "pt") as file:
        names, told = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    state = get_peft_model_state_dict(trained.transformer)
    assert names == {f"transformer.{name}" for name in state}
    assert told["transformer.lora_alpha"] == 6 and told["transformer.lora_dropout"] == 0.0

    def predicted(pipeline: Any) -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        conditions = encode_prompts(pipeline, ["a small red circle"])
        with torch.no_grad():
            return family.denoise(family.model(pipeline), latents, torch.tensor([500]), conditions)

    plain = predicted(base)
    trained.transformer.eval()
    load_lora(base, tmp_path)
    assert torch.allclose(predicted(base), predicted(trained), atol=1e-5)
    assert not torch.allclose(predicted(base), plain, atol=1e-3)
    unload_lora(base)
    assert torch.equal(predicted(base), plain)
    assert not any("lora" in name for name, _ in base.transformer.named_parameters())
