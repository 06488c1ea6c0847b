"""Control images from pictures: edges, depth maps and skeletons (`data.control`).

Depth and poses come from models of transformers, loaded from a folder or hub name, with safetensors weights
only. Code in a model's repository is never run. They compute in float32.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from cluster.fetched import local_path
from ray_jobs.config import ControlConfig
from ray_jobs.metrics.control import unlike_depth, unlike_edges, unlike_points
from ray_jobs.metrics.feature_network import freeze, full_precision, require_pictures
from ray_jobs.metrics.vision_model import CONFIGURATIONS, FILES, downloaded, model_digest, require_safetensors
from ray_jobs.pictures.edges import edges
from ray_jobs.pictures.poses import NUM_COCO, Person, draw_poses, key_points, person_of_coco
from ray_jobs.pictures.reading import WHITE

MODEL, DETECTOR = "data.control.model", "data.control.detector"
VERSION = 1  # of what is drawn; a change computes it anew
INVERSE = ("depth_anything", "dpt")  # models whose values grow towards the viewer
DISTANCES = ("glpn", ZOE := "zoedepth")  # models whose values are distances
METRIC = "metric"  # depth_estimation_type of a Depth Anything of distances
NEAREST = 1e-3  # distances below, which are none, count as this one, in metres
PERSON = "person"  # label of detectors
DETECTED, SEEN = 0.3, 0.3  # least scores of a person and of a key point, as in transformers' documentation


class Conditioner(ABC):
    """Computes the control image of pictures."""

    @torch.inference_mode()
    @full_precision()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return control images: uint8, N x 3 x height x width, on the CPU.

        Args:
            pixels: pictures of one shape: uint8, N x 3 x height x width.
        """
        require_pictures(pixels)
        return self._conditions(pixels)

    def disagreement(self, pixels: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return how far the control image of each picture is from the one that it was given: float64, N.

        0 is equal, and 1 the most; see `metrics.control`.

        Args:
            pixels, given: pictures and their control images: uint8, N x 3 x height x width.
        """
        return self._apart(self(pixels), given.cpu())

    @abstractmethod
    def _conditions(self, pixels: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _apart(self, drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor: ...


class Edges(Conditioner):
    """Canny's edges."""

    def __init__(self, control: ControlConfig) -> None:
        self.thresholds = control.low_threshold, control.high_threshold

    def _conditions(self, pixels: torch.Tensor) -> torch.Tensor:
        return _stacked([edges(each, *self.thresholds) for each in _arrays(pixels)])

    def _apart(self, drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        pair = [each.float().mean(dim=1, keepdim=True) >= WHITE for each in (drawn, given)]
        return unlike_edges(*pair)


class Depth(Conditioner):
    """Maps of depth from black, far, to white, near, each over its full range.

    Of distances the map is of their inverse, as models of relative depth have it (Ranftl et al., MiDaS,
    arXiv 1907.01341).
    """

    def __init__(self, control: ControlConfig, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForDepthEstimation

        self.parts = _load(AutoModelForDepthEstimation, _depth_files(control), MODEL, device)
        config = self.parts.module.config
        self.is_distance = config.model_type in DISTANCES or (
            getattr(config, "depth_estimation_type", None) == METRIC
        )

    def _conditions(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[-2:]
        found = self.parts.run(pixels).predicted_depth.float().cpu()[:, None]
        if self.is_distance:  # first: between near values, bicubic ones may fall below 0
            found = 1 / found.clamp_min(NEAREST)
        # What ZoeDepth's processor has added at each side; its own way to cut it off needs torchvision.
        is_wider = self.parts.module.config.model_type == ZOE and self.parts.processor.do_pad
        above, left = (int(3 * (side / 2) ** 0.5) * is_wider for side in (height, width))
        whole = interpolate(found, (height + 2 * above, width + 2 * left), mode="bicubic")
        depth = whole[:, 0, above : above + height, left : left + width]
        levels = 255 * _full_range(depth)
        return levels.round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()

    def _apart(self, drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return unlike_depth(*(_full_range(each.float().mean(dim=1)) for each in (drawn, given)))


class Pose(Conditioner):
    """Skeletons on black, see `pictures.poses`, of the people in pictures."""

    def __init__(self, control: ControlConfig, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModelForObjectDetection, VitPoseForPoseEstimation

        self.parts = _load(VitPoseForPoseEstimation, _pose_files(control), MODEL, device)
        self.detector = None
        if control.detector:
            files = _detector_files(control)
            self.detector = _load(AutoModelForObjectDetection, files, DETECTOR, device)
            self.person = _person(self.detector.module.config.id2label)

    def _conditions(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = pixels.shape[-2:]
        boxes, arrays = self._boxes(pixels), _arrays(pixels)
        drawn = [
            draw_poses(self._people(array, box), height, width)
            for array, box in zip(arrays, boxes, strict=True)
        ]
        return _stacked(drawn)

    def _apart(self, drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        ours, theirs = (
            [torch.from_numpy(key_points(each))[None] for each in _arrays(pictures)]
            for pictures in (drawn, given)
        )
        # One at a time: 18 maps of a picture are much.
        return torch.cat([unlike_points(*pair) for pair in zip(ours, theirs, strict=True)])

    def _boxes(self, pixels: torch.Tensor) -> list[list[list[float]]]:
        """Return the boxes of people in each picture: left, top, width and height, in pixels."""
        count, _, height, width = pixels.shape
        if self.detector is None:
            return [[[0.0, 0.0, float(width), float(height)]]] * count
        outputs = self.detector.run(pixels)
        found = self.detector.processor.post_process_object_detection(
            outputs, threshold=DETECTED, target_sizes=[(height, width)] * count
        )
        people = [each["boxes"][each["labels"] == self.person].cpu() for each in found]
        return [torch.cat([each[:, :2], each[:, 2:] - each[:, :2]], dim=1).tolist() for each in people]

    def _people(self, picture: np.ndarray, boxes: list[list[float]]) -> list[Person]:
        """Return the people in the boxes of a picture: uint8, height x width x 3."""
        if not boxes:
            return []
        parts, module = self.parts, self.parts.module
        inputs = parts.processor(
            images=[picture], boxes=[boxes], input_data_format="channels_last", return_tensors="pt"
        )
        values = inputs["pixel_values"].to(parts.device)
        experts = {}
        if (
            module.config.backbone_config.num_experts > 1
        ):  # ViTPose++, whose first one knows COCO's key points
            experts["dataset_index"] = torch.zeros(len(values), dtype=torch.long, device=parts.device)
        outputs = module(pixel_values=values, **experts)
        [found] = parts.processor.post_process_pose_estimation(outputs, boxes=[boxes])
        return [
            person_of_coco(each["keypoints"].double().numpy(), each["scores"].numpy() >= SEEN)
            for each in found
        ]


class _Files(NamedTuple):
    """A model's folder, and its name for errors."""

    folder: Path
    name: str


class _Parts(NamedTuple):
    """A loaded model."""

    module: Any
    processor: Any
    device: torch.device

    def run(self, pixels: torch.Tensor) -> Any:
        """Return the model's outputs for pictures: uint8, N x 3 x height x width."""
        inputs = self.processor(
            images=list(pixels.cpu().numpy()), input_data_format="channels_first", return_tensors="pt"
        )
        return self.module(**inputs.to(self.device))


def load_conditioner(control: ControlConfig, device: str | torch.device = "cpu") -> Conditioner:
    """Return what computes `data.control`; its kind is given.

    Raises:
        ValueError: as for `check_conditioner`, or weights are missing in a model's files.
    """
    if control.kind == "edges":
        return Edges(control)
    assert control.needs_model
    return (Depth if control.kind == "depth" else Pose)(control, device)


def check_conditioner(control: ControlConfig) -> None:
    """Check the models of `data.control`, if it has any, without their weights.

    Raises:
        ValueError: naming the field, if a model is missing or of no supported kind, needs code of its own or
            a package that is missing, or has only pickled weights.
    """
    if not control.needs_model:
        return
    for field, files in _all_files(control, weights=False).items():
        _read_processor(files, field)


def conditioner_digest(control: ControlConfig) -> str:
    """Return the digest of the files of `data.control`'s models; "" without any."""
    if not control.needs_model:
        return ""
    return " ".join(model_digest(each.folder, FILES) for each in _all_files(control).values())


def conditioner_bytes(control: ControlConfig) -> int:
    """Return the bytes of the weights of `data.control`'s models, without reading them; 0 without any.

    Raises:
        ValueError: as for `check_conditioner`.
    """
    from transformers import (
        AutoConfig,
        AutoModelForDepthEstimation,
        AutoModelForObjectDetection,
        VitPoseForPoseEstimation,
    )

    if not control.needs_model:
        return 0
    depth = control.kind == "depth"
    makers: dict[str, Any] = {
        MODEL: AutoModelForDepthEstimation.from_config if depth else VitPoseForPoseEstimation,
        DETECTOR: AutoModelForObjectDetection.from_config,
    }
    found = 0
    for field, files in _all_files(control, weights=False).items():
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        with torch.device("meta"):
            found += sum(4 * each.numel() for each in makers[field](config).parameters())
    return found


def _all_files(control: ControlConfig, *, weights: bool = True) -> dict[str, _Files]:
    """Return the files of `data.control`'s models, by the field that names each."""
    own = _depth_files if control.kind == "depth" else _pose_files
    found = {MODEL: own(control, weights=weights)}
    return found | ({DETECTOR: _detector_files(control, weights=weights)} if control.detector else {})


def _depth_files(control: ControlConfig, *, weights: bool = True) -> _Files:
    files, config = _files(control.model, control.revision, MODEL, weights)
    if config["model_type"] not in (*INVERSE, *DISTANCES):
        raise ValueError(
            f"{MODEL}: {files.name}: {config['model_type']} is no depth model that is known; supported are "
            "Depth Anything, DPT, ZoeDepth and GLPN"
        )
    return files


def _pose_files(control: ControlConfig, *, weights: bool = True) -> _Files:
    files, config = _files(control.model, control.revision, MODEL, weights)
    if config["model_type"] != "vitpose":
        raise ValueError(
            f"{MODEL}: {files.name}: {config['model_type']} is no pose model that is known; only ViTPose is "
            "supported"
        )
    count = len(config.get("id2label") or [])
    if count not in (0, NUM_COCO):
        raise ValueError(f"{MODEL}: {files.name}: has {count} key points, not the {NUM_COCO} of COCO")
    return files


def _detector_files(control: ControlConfig, *, weights: bool = True) -> _Files:
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KNOWN

    files, config = _files(control.detector, control.detector_revision, DETECTOR, weights)
    if config["model_type"] not in KNOWN:
        raise ValueError(f"{DETECTOR}: {files.name}: {config['model_type']} finds no objects; name a DETR")
    if _person(config.get("id2label") or {}) is None:
        raise ValueError(f"{DETECTOR}: {files.name}: has no label {PERSON}; name one that knows people")
    return files


def _person(labels: dict[Any, str]) -> int | None:
    """Return the number of a detector's label of people; None without one."""
    return next((int(number) for number, name in labels.items() if name.lower() == PERSON), None)


def _files(
    name: str | None, revision: str | None, field: str, weights: bool
) -> tuple[_Files, dict[str, Any]]:
    """Return a model's files, and its config.json.

    Args:
        weights: False to fetch only configurations from the hub.
    """
    assert name is not None
    path = local_path(name, field)
    if Path(path).is_dir():
        folder, weights = Path(path), True
    else:
        folder = downloaded(path, revision, field, FILES if weights else CONFIGURATIONS)
    if weights:
        require_safetensors(folder, field)
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        str(config["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{field}: {name}: has no config.json that names a model_type") from None
    if config.get("auto_map"):
        raise ValueError(
            f"{field}: {name}: is loaded by Python code in its repository, which is never run; give one that "
            "transformers knows"
        )
    return _Files(folder, name), config


def _read_processor(files: _Files, field: str) -> Any:
    """Load a model's image processor by Pillow, so that it does not depend on installed packages."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(files.folder, backend="pil", trust_remote_code=False)
    except (ImportError, LookupError, OSError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{field}: {files.name}: its image processor cannot be loaded: {reason}") from None


def _load(kind: Any, files: _Files, field: str, device: str | torch.device) -> _Parts:
    """Load a frozen model of a class of transformers in float32."""
    module, loading = kind.from_pretrained(
        files.folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise ValueError(f"{field}: {files.name}: its weights lack {missing}")
    device = torch.device(device)
    freeze(module, device)
    return _Parts(module, _read_processor(files, field), device)


def _full_range(maps: torch.Tensor) -> torch.Tensor:
    """Return maps, float, N x height x width, whose values go from 0 to 1; 0 where they are even."""
    least, most = (each(maps.flatten(1), dim=1)[:, None, None] for each in (torch.amin, torch.amax))
    return (maps - least) / (most - least).clamp_min(torch.finfo(maps.dtype).tiny)


def _arrays(pixels: torch.Tensor) -> list[np.ndarray]:
    """Return pictures: uint8, height x width x 3."""
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())


def _stacked(pictures: list[np.ndarray]) -> torch.Tensor:
    """Inverse of `_arrays`, in contiguous order."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
