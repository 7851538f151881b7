"""The vision side of a model: images to rows of visual tokens, and what decides them, as hashes."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

import torch

from recllm.errors import DataError
from recllm.mllm.processor import Picture, count_tokens, join, prepare

_SETTINGS_LEFT_OUT = ("processor_class", "auto_map", "return_tensors", "device", "disable_grouping")
_NOTES = ("image_grid_thw",)  # what a language model goes by besides the visual tokens


def store_identity(model: Any, processor: Any) -> dict[str, str]:
    """Returns two hashes: of the vision tower and projector (weights and configuration), and of the settings
    with which the processor prepares images.

    An adapter on the language model changes neither.

    Raises:
        DataError: The model has no language model beside its vision tower.
    """
    core = _core(model)
    children = dict(core.named_children())
    decoder = unwrapped(model).get_decoder()
    if not any(module is decoder for module in children.values()):
        raise DataError(
            f"{type(core).__name__} has no separate vision tower; no visual store can be made of it"
        )
    digest = hashlib.sha256()
    vision = core.config.vision_config.to_dict()
    vision = {name: value for name, value in vision.items() if name[0] != "_" and "dtype" not in name}
    vision.pop("transformers_version", None)
    digest.update(json.dumps(vision, sort_keys=True, default=str).encode())
    parts = {child: module.state_dict() for child, module in children.items() if module is not decoder}
    tensors = {f"{child}.{name}": tensor for child, part in parts.items() for name, tensor in part.items()}
    tensors |= core.named_parameters(recurse=False)  # LLaVA-NeXT's image_newline
    for name in sorted(tensors, key=lambda name: name.partition(".")):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    settings = json.loads(processor.image_processor.to_json_string())
    settings = {
        name: value
        for name, value in settings.items()
        if value is not None and name[0] != "_" and name not in _SETTINGS_LEFT_OUT
    }
    images = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    return {"tower": digest.hexdigest(), "processor": images.hexdigest()}


class VisionTower:
    """The vision side of a model: images to rows of visual tokens."""

    def __init__(self, model: Any, processor: Any):
        self._model, self._processor = unwrapped(model), processor
        self._core = _core(model)
        if "mm_encoder_outputs" not in inspect.signature(self._model.forward).parameters:
            raise DataError(
                f"{type(self._model).__name__} takes no images encoded beforehand, which a visual store and "
                "yes/no scores need; use another model"
            )
        self._takes = inspect.signature(self._core.get_image_features).parameters

    def pixels(self, image: Any) -> Picture:
        """Returns one image as the processor prepares it."""
        return prepare(self._processor, image)

    def count(self, picture: Picture) -> int:
        """Returns the image's share of a batch: its visual tokens."""
        return count_tokens(self._processor, picture.text, self._model.config.image_token_id)

    @torch.inference_mode()
    def encode(self, batch: dict[str, Picture]) -> dict[str, Any]:
        """Returns `rows` (a tensor for each image), `columns`, `tile` and `notes` of a batch by image key."""
        pixels = join([picture.tensors for picture in batch.values()], self._takes)
        joined = {name: tensor.to(self._model.device) for name, tensor in pixels.items()}
        training = self._model.training
        self._model.eval()
        try:
            output = self._core.get_image_features(**joined, return_dict=True)
        finally:
            self._model.train(training)
        known = {"last_hidden_state", "pooler_output", "hidden_states", "attentions", "deepstack_features"}
        projected, deep = output.pooler_output, list(getattr(output, "deepstack_features", None) or [])
        tile = None
        if isinstance(projected, torch.Tensor) and projected.dim() == 3:
            tile = projected.shape[1]
            projected = [
                tiles.flatten(0, 1)
                for tiles in projected.split([len(one.tensors["pixel_values"]) for one in batch.values()])
            ]
        streams = [list(stream) if isinstance(stream, tuple | list) else [] for stream in (projected, *deep)]
        counts = [len(one) for one in streams[0]]
        if (
            set(output.keys()) - known
            or len(counts) != len(batch)
            or any(
                not isinstance(one, torch.Tensor) or one.dim() != 2 for stream in streams for one in stream
            )
            or any([len(one) for one in stream] != counts for stream in streams)
        ):
            raise DataError(
                f"{type(self._model).__name__} encodes images in a form that the visual store does not know; "
                "use it without one"
            )
        return {
            "rows": [torch.cat(columns, dim=1) for columns in zip(*streams, strict=True)],
            "layout": {"columns": [stream[0].shape[1] for stream in streams], "tile": tile},
            "notes": [
                {name: one.tensors[name][0].tolist() for name in _NOTES if name in one.tensors}
                for one in batch.values()
            ],
            "keys": list(batch),
        }


def unwrapped(model: Any) -> Any:
    """Returns the transformers model within a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _core(model: Any) -> Any:
    return unwrapped(model).base_model
