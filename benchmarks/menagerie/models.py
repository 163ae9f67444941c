"""The models of the zoo: every torchvision builder at its real size, and transformers of all kinds.

Weights are random. torchvision's images may be smaller than usual; transformers' configurations are small
(two to four layers) with the shape of the real ones. Detectors answer with their raw heads: the selection of
boxes is no part of the network that is compressed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TEXT_LENGTH = 16
VOCABULARY = 320


@dataclass(frozen=True)
class Subject:
    """A model of the zoo: its kind, how to build it, and the shapes of its inputs without the batch axis.

    Attributes:
        name: of the builder, or of the architecture.
        kind: such as ``classification`` or ``decoder``.
        build: makes the module.
        inputs: name -> shape; names that end in ``ids`` are token numbers.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, tuple[int, ...]]

    def example(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randint(3, VOCABULARY, (batch, *shape), generator=generator)
            if name.endswith("ids")
            else torch.randn((batch, *shape), generator=generator)
            for name, shape in self.inputs.items()
        }


# ---------------------------------------------------------------- torchvision

_FIXED_SIZES = {"ssd300_vgg16": 300, "inception_v3": 128, "maxvit_t": 224, "alexnet": 96, "googlenet": 96}
_IMAGE = 64


class Tensors(nn.Module):
    """A module whose answer is the tensors in the wrapped one's answer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, height, width] to a tensor, or several."""
        found = _floats(self.body(image))
        return found[0] if len(found) == 1 else tuple(found)


class OneStageHeads(nn.Module):
    """A one-stage detector up to its heads."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, height, width] to the tensors of the heads, [batch, anchors, values]."""
        features = self.backbone(image)
        return tuple(
            _floats(self.head(list(features.values()) if isinstance(features, dict) else [features]))
        )


class TwoStageHeads(nn.Module):
    """A two-stage detector: the proposal network's heads, and the box heads on fixed regions."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi = detector.backbone, detector.rpn.head, detector.roi_heads
        self.register_buffer("boxes", torch.tensor([[0.0, 0, 32, 32], [8, 8, 48, 64], [0, 16, 64, 48]]))

    def forward(self, image: Tensor) -> Any:
        """[batch, 3, height, width] to objectness and boxes for each level, then the heads' tensors."""
        from torchvision.ops import roi_align

        features = self.backbone(image)
        objectness, deltas = self.rpn(list(features.values()))
        level = features["0"]
        count = self.boxes.shape[0]
        owner = (
            torch.arange(image.shape[0], device=image.device).unsqueeze(1).expand(-1, count).reshape(-1, 1)
        )
        regions = torch.cat([owner.to(self.boxes), self.boxes.repeat(image.shape[0], 1)], dim=1)
        scale = level.shape[-1] / image.shape[-1]
        heads = list(self.roi.box_predictor(self.roi.box_head(roi_align(level, regions, 7, scale, 2))))
        for kind in ("mask", "keypoint"):
            head = getattr(self.roi, f"{kind}_head", None)
            if head is not None:
                pooled = roi_align(level, regions, 14, scale, 2)
                heads.append(getattr(self.roi, f"{kind}_predictor")(head(pooled)))
        return tuple(_floats([objectness, deltas, heads]))


def _floats(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer] if answer.is_floating_point() else []
    items = list(answer.values()) if hasattr(answer, "values") else answer
    return [tensor for item in items if item is not None for tensor in _floats(item)]


def _torchvision() -> list[Subject]:
    from torchvision import models

    subjects = []
    for kind in ("classification", "detection", "segmentation"):
        module = models if kind == "classification" else getattr(models, kind)
        for name in models.list_models(module):
            size = _size(name, kind)
            subjects.append(Subject(name, kind, _builder(name, kind, size), {"image": (3, size, size)}))
    return subjects


def _size(name: str, kind: str) -> int:
    """Width and height of the images; of whole patches, at least two, where a model has patches."""
    size = _FIXED_SIZES.get(name, _IMAGE if kind != "detection" else 128)
    if not name.startswith("vit"):
        return size
    patch = int(name.rsplit("_", 1)[1])
    return max(size, 2 * patch) // patch * patch


def _builder(name: str, kind: str, size: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        options: dict[str, Any] = {"weights": None}
        if kind != "classification":
            options["weights_backbone"] = None
        if name.startswith("vit"):
            options["image_size"] = size
        if name in ("inception_v3", "googlenet"):
            options |= {"aux_logits": False, "init_weights": False}
        model = models.get_model(name, **options)
        if kind != "detection":
            return Tensors(model)
        return TwoStageHeads(model) if hasattr(model, "rpn") else OneStageHeads(model)

    return build


# ---------------------------------------------------------------- transformers


class Answers(nn.Module):
    """A transformers model with tensors by position in, and its floating-point answers out."""

    def __init__(self, body: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.names = body, names

    def forward(self, *inputs: Tensor) -> Any:
        """The inputs in the order of ``names``."""
        answer = self.body(**dict(zip(self.names, inputs, strict=True)), return_dict=True)
        found = _floats({key: answer.get(key) for key in _ANSWERS})
        return found[0] if len(found) == 1 else tuple(found)


_ANSWERS = (
    "logits", "pred_boxes", "logits_per_image", "image_embeds", "text_embeds", "last_hidden_state",
    "predicted_depth", "class_queries_logits", "masks_queries_logits",
)  # fmt: skip
_TEXT = {"input_ids": (TEXT_LENGTH,)}
_PAIR = {"input_ids": (TEXT_LENGTH,), "decoder_input_ids": (8,)}
_PIXELS = {"pixel_values": (3, 64, 64)}
_WAVE = {"input_values": (4000,)}


@dataclass(frozen=True)
class _Recipe:
    """Auto class, configuration and its settings."""

    auto: str
    config: str
    inputs: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)


_SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8,
    "intermediate_size": 512, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_BART = {
    "vocab_size": VOCABULARY, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2,
    "max_position_embeddings": 64, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "encoder_ffn_dim": 512, "decoder_ffn_dim": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_VIT = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 512,
        "image_size": 64, "patch_size": 16}  # fmt: skip
_SPEECH = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 512,
           "conv_dim": (64, 64, 64), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 8), "vocab_size": 64,
           "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
_GROUPED = {**_SMALL, "num_key_value_heads": 4, "head_dim": 16}
_RESNET_OF_DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False,
                   "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]}}  # fmt: skip

_TRANSFORMERS: dict[str, tuple[str, _Recipe]] = {
    "bert": ("text encoder", _Recipe("AutoModelForSequenceClassification", "BertConfig", _TEXT, _SMALL)),
    "roberta": ("text encoder", _Recipe("AutoModelForTokenClassification", "RobertaConfig", _TEXT, _SMALL)),
    "distilbert": ("text encoder", _Recipe("AutoModelForSequenceClassification", "DistilBertConfig", _TEXT,
                   {"vocab_size": VOCABULARY, "dim": 128, "n_layers": 3, "n_heads": 8, "hidden_dim": 512})),
    "electra": ("text encoder", _Recipe("AutoModelForSequenceClassification", "ElectraConfig", _TEXT,
                {**_SMALL, "embedding_size": 64})),
    "albert": ("text encoder", _Recipe("AutoModelForSequenceClassification", "AlbertConfig", _TEXT,
               {**_SMALL, "embedding_size": 64})),
    "mpnet": ("text encoder", _Recipe("AutoModelForSequenceClassification", "MPNetConfig", _TEXT, _SMALL)),
    "deberta-v2": ("text encoder", _Recipe("AutoModelForSequenceClassification", "DebertaV2Config", _TEXT,
                   {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]})),
    "modernbert": ("text encoder", _Recipe("AutoModelForSequenceClassification", "ModernBertConfig", _TEXT,
                   _SMALL)),
    "gpt2": ("decoder", _Recipe("AutoModelForCausalLM", "GPT2Config", _TEXT,
             {"vocab_size": VOCABULARY, "n_embd": 128, "n_layer": 3, "n_head": 8, "n_positions": 64})),
    "opt": ("decoder", _Recipe("AutoModelForCausalLM", "OPTConfig", _TEXT,
            {**_SMALL, "ffn_dim": 512, "word_embed_proj_dim": 128})),
    "bloom": ("decoder", _Recipe("AutoModelForCausalLM", "BloomConfig", _TEXT,
              {"vocab_size": VOCABULARY, "hidden_size": 128, "n_layer": 3, "n_head": 8})),
    "gpt-neox": ("decoder", _Recipe("AutoModelForCausalLM", "GPTNeoXConfig", _TEXT, _SMALL)),
    "llama": ("decoder", _Recipe("AutoModelForCausalLM", "LlamaConfig", _TEXT, _GROUPED)),
    "mistral": ("decoder", _Recipe("AutoModelForCausalLM", "MistralConfig", _TEXT, _GROUPED)),
    "qwen2": ("decoder", _Recipe("AutoModelForCausalLM", "Qwen2Config", _TEXT, _GROUPED)),
    "qwen3": ("decoder", _Recipe("AutoModelForCausalLM", "Qwen3Config", _TEXT, _GROUPED)),
    "gemma": ("decoder", _Recipe("AutoModelForCausalLM", "GemmaConfig", _TEXT, _GROUPED)),
    "phi": ("decoder", _Recipe("AutoModelForCausalLM", "PhiConfig", _TEXT, _SMALL)),
    "phi3": ("decoder", _Recipe("AutoModelForCausalLM", "Phi3Config", _TEXT, _GROUPED)),
    "falcon": ("decoder", _Recipe("AutoModelForCausalLM", "FalconConfig", _TEXT,
               {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3,
                "num_attention_heads": 8, "bos_token_id": 1, "eos_token_id": 2})),
    "mixtral": ("mixture of experts", _Recipe("AutoModelForCausalLM", "MixtralConfig", _TEXT,
                {**_GROUPED, "num_local_experts": 4})),
    "qwen2-moe": ("mixture of experts", _Recipe("AutoModelForCausalLM", "Qwen2MoeConfig", _TEXT,
                  {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
                   "shared_expert_intermediate_size": 256})),
    "t5": ("encoder-decoder", _Recipe("AutoModelForSeq2SeqLM", "T5Config", _PAIR,
           {"vocab_size": VOCABULARY, "d_model": 128, "d_kv": 16, "d_ff": 512, "num_layers": 2,
            "num_heads": 8})),
    "bart": ("encoder-decoder", _Recipe("AutoModelForSeq2SeqLM", "BartConfig", _PAIR, _BART)),
    "marian": ("encoder-decoder", _Recipe("AutoModelForSeq2SeqLM", "MarianConfig", _PAIR, _BART)),
    "whisper": ("speech", _Recipe("AutoModelForSpeechSeq2Seq", "WhisperConfig",
                {"input_features": (80, 100), "decoder_input_ids": (8,)},
                {**_BART, "max_source_positions": 50, "max_target_positions": 32})),
    "wav2vec2": ("speech", _Recipe("AutoModelForCTC", "Wav2Vec2Config", _WAVE, _SPEECH)),
    "hubert": ("speech", _Recipe("AutoModelForCTC", "HubertConfig", _WAVE, _SPEECH)),
    "ast": ("speech", _Recipe("AutoModelForAudioClassification", "ASTConfig", {"input_values": (64, 32)},
            {**_VIT, "max_length": 64, "num_mel_bins": 32})),
    "vit": ("vision", _Recipe("AutoModelForImageClassification", "ViTConfig", _PIXELS, _VIT)),
    "beit": ("vision", _Recipe("AutoModelForImageClassification", "BeitConfig", _PIXELS,
             {**_VIT, "use_relative_position_bias": True})),
    "dinov2": ("vision", _Recipe("AutoModelForImageClassification", "Dinov2Config", _PIXELS, _VIT)),
    "swin": ("vision", _Recipe("AutoModelForImageClassification", "SwinConfig", _PIXELS,
             {"image_size": 64, "embed_dim": 64, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4})),
    "swinv2": ("vision", _Recipe("AutoModelForImageClassification", "Swinv2Config", _PIXELS,
               {"image_size": 64, "embed_dim": 64, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4})),
    "convnext": ("vision", _Recipe("AutoModelForImageClassification", "ConvNextConfig", _PIXELS,
                 {"hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 2, 1]})),
    "mobilevit": ("vision", _Recipe("AutoModelForImageClassification", "MobileViTConfig", _PIXELS,
                  {"image_size": 64})),
    "poolformer": ("vision", _Recipe("AutoModelForImageClassification", "PoolFormerConfig", _PIXELS)),
    "segformer": ("segmentation", _Recipe("AutoModelForSemanticSegmentation", "SegformerConfig", _PIXELS)),
    "upernet": ("segmentation", _Recipe("AutoModelForSemanticSegmentation", "UperNetConfig", _PIXELS)),
    "detr": ("detection", _Recipe("AutoModelForObjectDetection", "DetrConfig", _PIXELS,
             {**_BART, **_RESNET_OF_DETR, "num_queries": 20})),
    "yolos": ("detection", _Recipe("AutoModelForObjectDetection", "YolosConfig", _PIXELS,
              {**_VIT, "image_size": (64, 64), "num_detection_tokens": 20})),
    "clip": ("multimodal", _Recipe("AutoModel", "CLIPConfig", {**_TEXT, **_PIXELS},
             {"text_config": _SMALL, "vision_config": _VIT, "projection_dim": 64})),
    "siglip": ("multimodal", _Recipe("AutoModel", "SiglipConfig", {**_TEXT, **_PIXELS},
               {"text_config": _SMALL, "vision_config": _VIT})),
}  # fmt: skip


def _transformers() -> list[Subject]:
    return [
        Subject(f"hf-{name}", kind, _from_config(recipe), recipe.inputs)
        for name, (kind, recipe) in _TRANSFORMERS.items()
    ]


def _from_config(recipe: _Recipe) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        config = getattr(transformers, recipe.config)(**recipe.settings)
        for part in (config, getattr(config, "text_config", None), getattr(config, "decoder", None)):
            if part is not None:
                part.use_cache = False
        config._experts_implementation = "batched_mm"
        model = getattr(transformers, recipe.auto).from_config(config, attn_implementation="eager")
        return Answers(model, tuple(recipe.inputs))

    return build


def subjects() -> dict[str, Subject]:
    """All models by name; those of torchvision where it is installed."""
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    found = [*(_torchvision() if has_torchvision else ()), *_transformers()]
    return {subject.name: subject for subject in found}


#: One of every kind of graph, cheap to run.
DOZEN = (
    "resnet18", "swin_t", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1",
    "lraspp_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large",
    "hf-bert", "hf-gpt2", "hf-llama", "hf-mixtral", "hf-t5", "hf-wav2vec2",
    "hf-swin", "hf-detr", "hf-clip",
)  # fmt: skip
