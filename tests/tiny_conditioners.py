"""Small models with random weights that compute control images, in transformers' format."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _varied(model: "PreTrainedModel") -> "PreTrainedModel":
    """Give a model weights with which it finds other depths in other places."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


def depth_model(folder: Path, kind: str = "relative") -> Path:
    """Write a Depth Anything.

    Args:
        kind: relative or metric.
    """
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessor,
    )

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=32,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        depth_estimation_type=kind,
        max_depth=20 if kind == "metric" else 1,
    )
    _varied(DepthAnythingForDepthEstimation(config)).save_pretrained(folder)
    DPTImageProcessor(size={"height": 28, "width": 28}, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def zoe_depth(folder: Path) -> Path:
    """Write a ZoeDepth."""
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation, ZoeDepthImageProcessor

    torch.manual_seed(0)
    backbone = BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        bottleneck_features=8,
        num_attractors=[4, 4, 4, 1],
        bin_embedding_dim=8,
        num_relative_features=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
        patch_transformer_hidden_size=8,
        patch_transformer_intermediate_size=8,
        patch_transformer_num_attention_heads=2,
        num_patch_transformer_layers=1,
    )
    _varied(ZoeDepthForDepthEstimation(config)).save_pretrained(folder)
    ZoeDepthImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pose_model(folder: Path, experts: int = 1) -> Path:
    """Write a ViTPose."""
    from transformers import (
        VitPoseBackboneConfig,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[64, 48],
        patch_size=[16, 16],
        out_features=["stage2"],
        num_experts=experts,
        part_features=8 if experts > 1 else 0,
    )
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).save_pretrained(folder)
    VitPoseImageProcessor(size={"height": 64, "width": 48}).save_pretrained(folder)
    return folder


def people_detector(folder: Path, label: str = "person") -> Path:
    """Write a DETR of two labels, of which the second one is `label`."""
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    config = DetrConfig(
        backbone_config=backbone,
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        id2label={0: "dog", 1: label},
        label2id={"dog": 0, label: 1},
    )
    model = DetrForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.bias.copy_(torch.tensor([-4.0, 4.0, -4.0]))  # all that it finds
    model.save_pretrained(folder)
    DetrImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
