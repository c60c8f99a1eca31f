"""The text encoder: Qwen3 inside a CLIP, and prompts turned into conditioning without padding."""

import logging
import unicodedata
from pathlib import Path

import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.z_image as z_image
import comfy.utils
import torch
from comfy import sd1_clip
from transformers import Qwen2Tokenizer

from . import checkpoint
from .checkpoint import CheckpointError

FULL_WIDTH = 2560
RECOMMENDED_TOKENS = 512
MAX_TOKENS = 1504  # the model's first RoPE axis has 1536 places: the padded caption, then the image
_CONFIG_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)


def load_text_encoder(
    path: Path,
    device: torch.device | None = None,
    embedding_directory: list[str] | None = None,
    disable_dynamic: bool = False,
):
    """A CLIP from a Qwen3-4B weight file or a diffusers ``text_encoder`` folder (with ``tokenizer`` beside it).

    device: where it computes; None is the host's choice. Raises CheckpointError.
    """
    label = f"{path.parent.name}/{path.name}" if path.is_dir() else path.name
    weights, metadata = checkpoint.read(path)
    weights, _ = comfy.utils.convert_old_quants(weights, "", metadata=metadata)
    config = checkpoint.read_config(path) if path.is_dir() else {}
    norm = weights.get("model.layers.0.self_attn.q_norm.weight")
    embedding = weights.get("model.embed_tokens.weight")
    if norm is None or embedding is None:
        raise CheckpointError(
            f"'{label}' is not a Qwen3 text encoder. Choose qwen_3_4b.safetensors from models/text_encoders."
        )
    if checkpoint.is_quantised(weights) and config.get("quantization_config", {}).get("dequantize", False):
        weights = checkpoint.expand(weights, norm.dtype, label)
    options = (
        {"load_device": device, "offload_device": comfy.model_management.text_encoder_offload_device()}
        if device is not None
        else {}
    )
    if embedding.shape[1] == FULL_WIDTH:
        clip = comfy.sd.load_text_encoder_state_dicts(
            [weights],
            embedding_directory=embedding_directory,
            clip_type=comfy.sd.CLIPType.LUMINA2,
            model_options=options,
            disable_dynamic=disable_dynamic,
        )
    elif config:
        clip = _small_clip(path, weights, config, options, embedding_directory, disable_dynamic)
    else:
        raise CheckpointError(
            f"'{label}' has hidden size {embedding.shape[1]}, Z-Image-Turbo needs Qwen3-4B ({FULL_WIDTH}). "
            "Choose qwen_3_4b.safetensors from models/text_encoders."
        )
    clip.patcher.cached_patcher_init = (_load_patcher, (path, device, embedding_directory))
    return clip


def hidden_size(clip) -> int:
    """Width of the states that this encoder puts out."""
    return clip.cond_stage_model.qwen3_4b.transformer.model.config.hidden_size


def check_prompt(text: str) -> None:
    """Raises ValueError for a prompt that holds nothing to draw or characters that no tokenizer was trained on."""
    if not text.strip():
        raise ValueError("text is empty. Write what the picture should show, for example: a red circle on white.")
    for place, character in enumerate(text):
        if character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cs"):
            code = f"U+{ord(character):04X}"
            raise ValueError(
                f"text has the control character {code} at position {place}, which cannot be drawn. Delete it."
            )


def encode(clip, text: str) -> list:
    """Standard CONDITIONING for one prompt: [[states [1, tokens, width] fp32, {"attention_mask": ones, …}]].

    Padding is cut off, because the diffusion model attends to every state that it is given. Raises ValueError.
    """
    check_prompt(text)
    tokens = clip.tokenize(text)
    count = max(len(row) for rows in tokens.values() for row in rows)
    if count > MAX_TOKENS:
        raise ValueError(
            f"text has {len(text):,} characters or {count:,} tokens, the model takes at most {MAX_TOKENS:,} "
            f"and was trained on {RECOMMENDED_TOKENS}. Shorten it."
        )
    if count > RECOMMENDED_TOKENS:
        logging.warning(
            "Z-Image-Turbo: the prompt has %d tokens; the model was trained on %d, later ones may be ignored.",
            count,
            RECOMMENDED_TOKENS,
        )
    return [[*_trim(states, extra)] for states, extra in clip.encode_from_tokens_scheduled(tokens)]


def _trim(states: torch.Tensor, extra: dict) -> tuple[torch.Tensor, dict]:
    mask = extra.get("attention_mask")
    if mask is None or bool(mask.all()):
        return states, extra
    kept = mask[0].bool()
    return states[:, kept], extra | {"attention_mask": mask[:, kept]}


def _load_patcher(path: Path, device, embedding_directory, disable_dynamic: bool = False):
    return load_text_encoder(path, device, embedding_directory, disable_dynamic).patcher


def _small_clip(path: Path, weights, config: dict, options: dict, embedding_directory, disable_dynamic: bool):
    """A Qwen3 of another size than the official one, with the tokenizer of its own folder."""
    tokenizer_folder = path.parent / "tokenizer"
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise CheckpointError(f"'{path.parent.name}/tokenizer/tokenizer.json' is not there. Download the whole folder.")
    absent = [key for key in _CONFIG_KEYS if key not in config]
    if absent:
        raise CheckpointError(f"'{path.parent.name}/{path.name}/config.json' lacks {', '.join(absent)}.")

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            super().__init__(
                str(tokenizer_folder),
                pad_with_end=False,
                embedding_directory=embedding_directory,
                embedding_size=config["hidden_size"],
                embedding_key="qwen3_4b",
                tokenizer_class=Qwen2Tokenizer,
                has_start_token=False,
                has_end_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                pad_token=0,
                tokenizer_data=tokenizer_data,
            )

    class TurboTokenizer(z_image.ZImageTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            sd1_clip.SD1Tokenizer.__init__(
                self,
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data,
                name="qwen3_4b",
                tokenizer=Tokenizer,
            )
            self.llama_template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    encoder = z_image.te(**comfy.text_encoders.hunyuan_video.llama_detect(weights))
    target = comfy.supported_models_base.ClipTarget(TurboTokenizer, encoder)
    sizes = {key: config[key] for key in _CONFIG_KEYS}
    return comfy.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[weights],
        model_options=options | {"qwen3_4b_model_config": sizes},
        disable_dynamic=disable_dynamic,
    )
