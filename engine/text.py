"""The text encoder: Qwen3 inside a CLIP, and prompts turned into conditioning without padding."""

import functools
import logging
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Real
from pathlib import Path

import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.hunyuan_video
import comfy.text_encoders.llama as llama
import comfy.text_encoders.z_image as z_image
import comfy.utils
import torch
from comfy import sd1_clip
from comfy.patcher_extension import CallbacksMP
from transformers import Qwen2Tokenizer

from . import cache_file, encoder, formats, layouts, quantiser, qwen
from .checkpoint import Checkpoint, read_json, shapes_of
from .operations import operations
from .recent import Recent
from .residency import fits, held

FULL_WIDTH = 2560
RECOMMENDED_TOKENS = 512
EMBEDDINGS = "zimage_embeddings"  # attachment of our CLIP: the last prompts' conditioning
RANKS = "zimage_encodings"  # attachment, of multi-gpu: what has several prompts encoded by ranks
KEPT_PROMPTS = 32  # of at most 15 MB each, usually below 1 MB
MAX_TOKENS = 1504  # the model's first RoPE axis has 1536 places: the padded caption, then the image
QUANTISED = ("int4", "int4-fp8")  # precisions that hold the text encoder in INT4; fp8 would gain it little
_CONFIG = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads": int,
    "rms_norm_eps": Real,
    "rope_theta": Real,
}


def load_text_encoder(
    path: Path,
    device: torch.device | None = None,
    embedding_directory: list[str] | None = None,
    precision: str = "auto",
    cache: bool = False,
    beside: int = 0,
    disable_dynamic: bool = False,
):
    """A CLIP from a Qwen3-4B weight file or a diffusers ``text_encoder`` folder (with ``tokenizer`` beside it).

    device: where it computes; None is the host's choice. precision: that of the diffusion model. The INT4 ones, which
    are chosen to save memory, hold this model's projections in INT4 too; others hold it as the file does, on a GPU that
    has bf16 in that at most. Products are computed in bf16 where the device has it, but not with 'fp32'. cache: keep
    the quantised form beside the file. beside: bytes of the diffusion model, which is to stay on the same GPU. Raises
    CheckpointError.
    """
    load_device = device or management.text_encoder_device()
    dtype = torch.float32 if precision == "fp32" else qwen.compute_type(load_device)
    layouts.register()
    cached = cache_file.read(path, precision) if precision in QUANTISED else None
    checkpoint = _converted(cached or Checkpoint.read(path))
    sizes = _sizes(checkpoint)
    formats.check_quantised(checkpoint)
    names = shapes_of(llama.Qwen3_4B(sizes, torch.float32, "meta", comfy.ops.disable_weight_init))
    checkpoint.require(names)
    if precision in QUANTISED and not formats.is_ours(checkpoint) and formats.expandable(checkpoint):
        checkpoint = quantiser.quantised(checkpoint, precision, load_device, quantiser.TEXT_LINEAR)
        if cache:
            cache_file.write(checkpoint, path, precision)
    elif precision not in QUANTISED and formats.storage_only(checkpoint):
        checkpoint = _in_type(formats.expanded(checkpoint, dtype), dtype, names)
    if dtype == torch.bfloat16:
        checkpoint = _in_type(checkpoint, dtype, names)
    # The host's own offload device is the main GPU under --gpu-only: wrong for a model placed elsewhere.
    options = {"load_device": load_device} | ({} if device is None else {"offload_device": torch.device("cpu")})
    resident = disable_dynamic or fits(checkpoint.weights, dtype, load_device, beside)
    clip = _build(path, checkpoint, sizes, dtype, options, embedding_directory, resident)
    encoder.adopt(clip.cond_stage_model.qwen3_4b, dtype)
    clip.patcher.add_callback(CallbacksMP.ON_DETACH, encoder.free_memory)
    clip.patcher.cached_patcher_init = (_load_patcher, (path, device, embedding_directory, precision, cache, beside))
    clip.patcher.set_attachments(EMBEDDINGS, Recent(KEPT_PROMPTS))
    return clip


def _converted(checkpoint: Checkpoint) -> Checkpoint:
    """With older quantised files in the host's present format."""
    weights, metadata = comfy.utils.convert_old_quants(dict(checkpoint.weights), "", metadata=checkpoint.metadata)
    return checkpoint.replaced(weights, metadata)


def _build(
    path: Path,
    checkpoint: Checkpoint,
    sizes: dict,
    dtype: torch.dtype,
    options: dict,
    embedding_directory,
    resident: bool,
):
    """The host's CLIP that holds these weights. sizes: see `_sizes`; dtype: what products are computed in; resident:
    whether they stay on the GPU as they are."""
    ours = formats.is_ours(checkpoint)
    if ours:
        options["custom_operations"] = operations(dtype, layouts.COMPUTE_16)
        options["initial_device"] = torch.device("cpu")  # it is loaded when the lines below have been heard
    if sizes:
        options["qwen3_4b_model_config"] = sizes
        clip = _small_clip(path.parent, checkpoint, options, embedding_directory, resident)
    else:
        clip = comfy.sd.load_text_encoder_state_dicts(
            [dict(checkpoint.weights)],
            embedding_directory=embedding_directory,
            clip_type=comfy.sd.CLIPType.LUMINA2,
            model_options=options,
            disable_dynamic=resident,
        )
    if ours:  # the host would have all text in fp32, and multiply quantised weights out for it
        clip.patcher.set_model_compute_dtype(dtype)
        clip.patcher.force_cast_weights = False
    return clip


def _in_type(checkpoint: Checkpoint, dtype: torch.dtype, names: Iterable[str]) -> Checkpoint:
    """With those named weights that are floats in `dtype`; what belongs to quantised ones stays."""
    taken = {name: checkpoint.weights[name].to(dtype) for name in names if held(checkpoint.weights[name])}
    return checkpoint.replaced(dict(checkpoint.weights) | taken)


def _sizes(checkpoint: Checkpoint) -> dict:
    """What differs from Qwen3-4B, by config.json; empty for Qwen3-4B itself. Raises CheckpointError."""
    embedding = checkpoint.weights.get("model.embed_tokens.weight")
    if embedding is None or "model.layers.0.self_attn.q_norm.weight" not in checkpoint.weights:
        raise checkpoint.error("is not a Qwen3 text encoder. Choose qwen_3_4b.safetensors from models/text_encoders.")
    width = embedding.shape[1]
    if width == FULL_WIDTH:
        return {}
    if not checkpoint.config:
        raise checkpoint.error(
            f"has hidden size {width}, Z-Image-Turbo needs Qwen3-4B ({FULL_WIDTH}). "
            "Choose qwen_3_4b.safetensors from models/text_encoders."
        )
    sizes = {name: checkpoint.setting(name, kind) for name, kind in _CONFIG.items()}
    if sizes["hidden_size"] != width:
        raise checkpoint.error(
            f"has hidden size {width}, its config.json says hidden_size {sizes['hidden_size']}. "
            "Download the folder again."
        )
    return sizes


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
    check_length(text, token_count(tokens))
    return encode_tokens(clip, [(text, tokens)])[0]


def token_count(tokens: dict) -> int:
    """tokens: as the host's CLIP.tokenize gives them."""
    return max(len(row) for rows in tokens.values() for row in rows)


def check_length(text: str, count: int) -> None:
    """Raises ValueError for a prompt of more tokens than the model has places for; warns of more than it was trained
    on."""
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


def encode_tokens(clip, wanted: Sequence[tuple[Hashable, dict]]) -> list[list]:
    """CONDITIONING without padding for each of several tokens as the host's CLIP.tokenize gives them, with a key that
    tells them from others. Those that are new may be encoded by ranks: raises as `encodings.Encodings` does."""
    kept, ranks = _remembering(clip), clip.patcher.get_attachment(RANKS)
    new = {key: tokens for key, tokens in wanted if kept is None or _with_state(clip, key) not in kept}
    made = {} if ranks is None else ranks(clip, new)

    def compute(key: Hashable, tokens: dict) -> list:
        return made[key] if key in made else unpadded(clip, tokens)

    # What is known first: what is stored can push it out.
    order = sorted(range(len(wanted)), key=lambda place: wanted[place][0] in new)
    found = {place: _remembered(clip, wanted[place][0], functools.partial(compute, *wanted[place])) for place in order}
    return [found[place] for place in range(len(wanted))]


def unpadded(clip, tokens: dict) -> list[tuple[torch.Tensor, dict]]:
    """What the host's CLIP gives for tokens, computed in this process."""
    return [_trim(*pair) for pair in clip.encode_from_tokens_scheduled(tokens)]


def _remembered(clip, key: Hashable, compute: Callable[[], list]) -> list:
    """What `compute` gives, or gave for this prompt with the same weights and layer."""
    kept = _remembering(clip)
    pairs = compute() if kept is None else kept.get(_with_state(clip, key), compute)
    return [[states, dict(extra)] for states, extra in pairs]  # nodes add to the dictionary


def _remembering(clip) -> Recent | None:
    """Where conditioning of prompts is kept; None under hooks, and for a CLIP of another loader."""
    hooked = clip.patcher.forced_hooks or clip.apply_hooks_to_conds or clip.patcher.injections
    return None if hooked else clip.patcher.get_attachment(EMBEDDINGS)


def _with_state(clip, key: Hashable) -> Hashable:
    return key, clip.patcher.patches_uuid, clip.layer_idx


def _trim(states: torch.Tensor, extra: dict) -> tuple[torch.Tensor, dict]:
    mask = extra.get("attention_mask")
    if mask is None or bool(mask.all()):
        return states, extra
    kept = mask[0].bool()
    return states[:, kept], extra | {"attention_mask": mask[:, kept]}


def _load_patcher(path: Path, device, embedding_directory, precision, cache, beside, disable_dynamic: bool = False):
    return load_text_encoder(path, device, embedding_directory, precision, cache, beside, disable_dynamic).patcher


def _small_clip(folder: Path, checkpoint: Checkpoint, options: dict, embedding_directory, disable_dynamic: bool):
    """A Qwen3 of another size than the official one, with the tokenizer of its own folder."""
    tokenizer_folder = folder / "tokenizer"
    read_json(tokenizer_folder / "tokenizer.json", f"{folder.name}/tokenizer/tokenizer.json")
    width = options["qwen3_4b_model_config"]["hidden_size"]

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):
            super().__init__(
                str(tokenizer_folder),
                pad_with_end=False,
                embedding_directory=embedding_directory,
                embedding_size=width,
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

    weights = checkpoint.weights
    factory = z_image.te(**comfy.text_encoders.hunyuan_video.llama_detect(weights))
    return comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(TurboTokenizer, factory),
        embedding_directory=embedding_directory,
        parameters=comfy.utils.calculate_parameters(weights),
        state_dict=[dict(weights)],
        model_options=options,
        disable_dynamic=disable_dynamic,
    )
