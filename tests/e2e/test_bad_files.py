"""Weight files that cannot be used: the loader says which, why, and what to do, and the server goes on."""

import contextlib
import random
from dataclasses import dataclass

import pytest
import torch

from .answers import assert_clear, failed, refused
from .damage import (
    FOLDERS,
    PLACED,
    Write,
    altered,
    bare_pickle,
    beginning,
    content,
    copy_of,
    mark_of,
    only,
    without,
    zipped_pickle,
)
from .graphs import turbo

GIT_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12309866400\n"
NORM = "layers.1.ffn_norm1.weight"
OUT = "layers.1.attention.to_out.0"
OTHER_MODEL = ("not a Z-Image-Turbo diffusion model", "Choose z_image_turbo_bf16.safetensors")
CUT = ("cannot be read", "download it again")
PICKLE = ("cannot be read", ".safetensors")


@dataclass(frozen=True)
class BadFile:
    """A file for one input of the loader, and words of the answer beside its name."""

    kind: str
    name: str
    write: Write
    says: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"

    def inputs(self) -> dict[str, str]:
        others = PLACED if self.kind == "diffusion_model" else {"diffusion_model": "demo"}
        return others | {self.kind: self.name}


MODEL, TEXT, VAE = FOLDERS
CASES = [
    BadFile(MODEL, "empty.safetensors", content(b""), ("empty (0 bytes)", "again")),
    BadFile(MODEL, "cut_in_header.safetensors", beginning(MODEL, 0.0001), CUT),
    BadFile(MODEL, "cut_in_data.safetensors", beginning(MODEL, 0.5), CUT),
    BadFile(MODEL, "random.safetensors", content(random.Random(0).randbytes(4096)), CUT),
    BadFile(MODEL, "web_page.safetensors", content(b"<!DOCTYPE html><html>404: Not Found</html>"), CUT),
    BadFile(MODEL, "git_lfs.safetensors", content(GIT_LFS), CUT),
    BadFile(MODEL, "pickle.pt", bare_pickle, PICKLE),
    BadFile(MODEL, "pickle_in_zip.pt", zipped_pickle, PICKLE),
    BadFile(MODEL, "list.pt", lambda path: torch.save([1, 2], path), ("holds no tensors", "Choose")),
    BadFile(MODEL, "is_a_vae.safetensors", copy_of(VAE), OTHER_MODEL),
    BadFile(MODEL, "is_a_text_encoder.safetensors", copy_of(TEXT), OTHER_MODEL),
    BadFile(
        MODEL,
        "stable_diffusion.safetensors",
        only(model__diffusion_model__input_blocks__0__0__weight=[320, 4, 3, 3]),
        OTHER_MODEL,
    ),
    BadFile(MODEL, "lacks_norm.safetensors", without(MODEL, NORM), (NORM, "incomplete", "download it again")),
    BadFile(MODEL, "lacks_weight.safetensors", without(MODEL, f"{OUT}.weight"), ("layers.1.attention.out", "again")),
    BadFile(
        MODEL, "wrong_shape.safetensors", altered(MODEL, NORM, lambda weight: weight[:100]), (NORM, "100", "damaged")
    ),
    BadFile(MODEL, "lacks_to_q.safetensors", without(MODEL, "layers.1.attention.to_q.weight"), ("to_q", "again")),
    BadFile(
        MODEL, "lacks_scale.safetensors", without(MODEL, f"{OUT}.weight_scale"), ("layers.1.attention.out", "again")
    ),
    BadFile(
        MODEL,
        "wrong_marker.safetensors",
        altered(MODEL, f"{OUT}.comfy_quant", lambda marker: marker[:5]),
        ("layers.1.attention.out", "again"),
    ),
    BadFile(
        MODEL,
        "unknown_format.safetensors",
        altered(MODEL, f"{OUT}.comfy_quant", lambda _: torch.tensor(list(b'{"format": "int3"}'), dtype=torch.uint8)),
        ("int3", "precision"),
    ),
    BadFile(TEXT, "cut.safetensors", beginning(TEXT, 0.5), CUT),
    BadFile(TEXT, "is_a_vae.safetensors", copy_of(VAE), ("not a Qwen3", "Choose qwen_3_4b.safetensors")),
    BadFile(TEXT, "of_another_size.safetensors", copy_of(TEXT), ("hidden size 256", "2560", "qwen_3_4b.safetensors")),
    BadFile(
        TEXT,
        "incomplete.safetensors",
        only(model__layers__0__self_attn__q_norm__weight=[128], model__embed_tokens__weight=[8, 2560]),
        ("incomplete", "again"),
    ),
    BadFile(VAE, "cut.safetensors", beginning(VAE, 0.5), CUT),
    BadFile(VAE, "is_a_model.safetensors", copy_of(MODEL), ("16 latent channels", "Choose ae.safetensors")),
    BadFile(
        VAE,
        "four_channels.safetensors",
        altered(VAE, "decoder.conv_in.weight", lambda weight: weight[:, :4]),
        ("16 latent channels", "Choose ae.safetensors"),
    ),
    BadFile(VAE, "of_another_width.safetensors", copy_of(VAE), ("encoder.down", "again")),
    BadFile(VAE, "incomplete.safetensors", only(decoder__conv_in__weight=[512, 16, 3, 3]), ("incomplete", "again")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_bad_file_is_named_with_the_remedy(comfy, base, case):
    path = base / "models" / FOLDERS[case.kind] / case.name
    case.write(path)
    try:
        result = await failed(comfy, turbo(steps=1, **case.inputs()))
    finally:
        path.unlink()
    assert result.error["node_type"] == "ZImageTurboLoader"
    assert_clear(result.error["exception_message"], (case.name, *case.says))
    assert not mark_of(path).exists(), "the file's code was run"


def test_the_pickle_would_run_its_code_where_it_is_trusted(tmp_path):
    for number, write in enumerate((bare_pickle, zipped_pickle)):
        path = tmp_path / f"{number}.pt"
        write(path)
        with contextlib.suppress(Exception):  # a bare pickle is no checkpoint: what counts is that its code ran
            torch.load(path, weights_only=False)
        assert mark_of(path).exists()


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["absent.safetensors", "../../etc/passwd", "/etc/passwd", "../vae/absent.safetensors"])
async def test_a_file_that_is_not_offered_is_refused(comfy, kind, name):
    reasons = await refused(comfy, turbo(**{kind: name}))
    assert_clear(reasons[f"ZImageTurboLoader.{kind}"], (kind, f"'{name}'", "auto"))


@pytest.mark.parametrize("kind", FOLDERS)
async def test_an_absent_file_is_answered_with_what_to_choose(comfy, kind):
    """By us for the diffusion model; by the host, with its list, for the two that follow it on 'auto'."""
    reasons = await refused(comfy, turbo(**{kind: "absent.safetensors"}))
    ours = (f"models/{FOLDERS[kind]}", "press R")
    assert_clear(
        reasons[f"ZImageTurboLoader.{kind}"], ours if kind == MODEL else (kind, "not in", "auto", PLACED[kind])
    )


async def test_auto_beside_a_chosen_file_names_the_official_file_to_fetch(comfy, base):
    path = base / "models" / FOLDERS[MODEL] / "chosen.safetensors"
    copy_of(MODEL)(path)
    try:
        result = await failed(comfy, turbo(diffusion_model=path.name))
    finally:
        path.unlink()
    says = ("text_encoder is 'auto'", "qwen_3_4b.safetensors is not in models/text_encoders", "Put it there")
    assert_clear(result.error["exception_message"], says)


async def test_the_type_of_the_error_tells_no_path_of_the_machine(comfy, base):
    path = base / "models" / FOLDERS[MODEL] / "empty.safetensors"
    path.touch()
    result = await failed(comfy, turbo(**PLACED, diffusion_model=path.name))
    path.unlink()
    assert result.error["exception_type"] == "CheckpointError"
