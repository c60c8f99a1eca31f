"""What 'auto' means, and what is said when a file is not there."""

import json

import folder_paths
import pytest

from zimage_turbo.engine import catalogue
from zimage_turbo.engine.checkpoint import CheckpointError


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Empty model folders in place of the host's."""
    for kind in ("diffusion_models", "text_encoders", "vae", "diffusers"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def put(models, *names):
    for name in names:
        (models / name).parent.mkdir(parents=True, exist_ok=True)
        (models / name).write_bytes(b"x")


def test_without_files_auto_is_the_demo(models):
    assert catalogue.options("diffusion_model") == ["auto", "demo"]
    parts = catalogue.resolve("auto", "auto", "auto")
    assert parts.diffusion_model == catalogue.DEMO_FOLDER / "transformer"
    assert parts.text_encoder == catalogue.DEMO_FOLDER / "text_encoder"
    assert parts.vae == catalogue.DEMO_FOLDER / "vae"


def test_official_files_come_first(models):
    put(models, "diffusion_models/other.safetensors", "diffusion_models/z_image_turbo_bf16.safetensors")
    put(models, "text_encoders/qwen_3_4b.safetensors", "vae/ae.safetensors")
    parts = catalogue.resolve("auto", "auto", "auto")
    assert parts.diffusion_model.name == "z_image_turbo_bf16.safetensors"
    assert (parts.text_encoder.name, parts.vae.name) == ("qwen_3_4b.safetensors", "ae.safetensors")


def test_another_build_of_the_official_file_is_found(models):
    put(models, "diffusion_models/sub/Z-Image-Turbo_fp8.safetensors")
    put(models, "text_encoders/qwen_3_4b_fp8.safetensors", "vae/ae.safetensors")
    assert catalogue.resolve("auto", "auto", "auto").diffusion_model.name == "Z-Image-Turbo_fp8.safetensors"


def test_a_diffusers_folder_is_offered_and_taken_by_auto(models):
    for name, pipeline in (
        ("A-Z-Image", "ZImagePipeline"),
        ("Z-Image-Turbo", "ZImagePipeline"),
        ("flux", "FluxPipeline"),
    ):
        put(models, f"diffusers/{name}/transformer/x", f"diffusers/{name}/text_encoder/x", f"diffusers/{name}/vae/x")
        (models / "diffusers" / name / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert catalogue.options("diffusion_model") == ["auto", "demo", "diffusers/A-Z-Image", "diffusers/Z-Image-Turbo"]
    assert catalogue.resolve("auto", "auto", "auto").vae == models / "diffusers" / "Z-Image-Turbo" / "vae"
    assert catalogue.resolve("demo", "auto", "auto").vae == catalogue.DEMO_FOLDER / "vae"
    assert catalogue.resolve("diffusers/A-Z-Image", "auto", "auto").vae == models / "diffusers" / "A-Z-Image" / "vae"


def test_a_file_in_a_subfolder_called_diffusers_is_a_file(models):
    put(
        models,
        "diffusion_models/diffusers/zit.safetensors",
        "text_encoders/diffusers/qwen.safetensors",
        "vae/ae.safetensors",
    )
    parts = catalogue.resolve("diffusers/zit.safetensors", "diffusers/qwen.safetensors", "auto")
    assert parts.diffusion_model == models / "diffusion_models" / "diffusers" / "zit.safetensors"
    assert parts.text_encoder == models / "text_encoders" / "diffusers" / "qwen.safetensors"


@pytest.mark.parametrize("lacking", ["transformer", "text_encoder", "vae"])
def test_a_folder_that_lacks_a_part(models, lacking):
    for part in {"transformer", "text_encoder", "vae"} - {lacking}:
        put(models, f"diffusers/Z/{part}/x")
    (models / "diffusers" / "Z" / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    with pytest.raises(CheckpointError, match=f"'Z' has no part '{lacking}'"):
        catalogue.resolve("diffusers/Z", "auto", "auto")


def test_a_missing_companion_is_named_with_its_place(models):
    put(models, "diffusion_models/z_image_turbo_bf16.safetensors", "vae/ae.safetensors")
    with pytest.raises(CheckpointError, match=r"text_encoder.*qwen_3_4b\.safetensors.*models/text_encoders"):
        catalogue.resolve("auto", "auto", "auto")


@pytest.mark.parametrize("name", ["nope.safetensors", "../../etc/passwd", "/etc/passwd", "diffusers/..", ""])
def test_a_name_that_is_not_offered(models, name):
    with pytest.raises(CheckpointError, match="is not in models/diffusion_models"):
        catalogue.resolve(name, "auto", "auto")


def test_a_replaced_file_changes_the_fingerprint(models):
    put(
        models,
        "diffusion_models/z_image_turbo.safetensors",
        "text_encoders/qwen_3_4b.safetensors",
        "vae/ae.safetensors",
    )
    before = catalogue.resolve("auto", "auto", "auto").fingerprint()
    (models / "vae" / "ae.safetensors").write_bytes(b"another")
    assert catalogue.resolve("auto", "auto", "auto").fingerprint() != before


def test_a_demo_that_nobody_chose_is_told_of(models):
    assert "the built-in demo draws" in catalogue.remark("auto") and catalogue.remark("demo") is None
    put(models, "diffusion_models/z_image_bf16.safetensors")
    assert "choose it by name: z_image_bf16.safetensors" in catalogue.remark("auto")
    put(models, "diffusion_models/z_image_turbo_bf16.safetensors")
    folder_paths.filename_list_cache.clear()
    assert catalogue.remark("auto") is None


def test_what_cannot_be_chosen_says_why(models):
    put(models, *(f"vae/{number}.safetensors" for number in range(12)))
    assert "… (13 in all)" in catalogue.problem("vae", "nope.safetensors")
    assert "does not read" in catalogue.problem("diffusion_model", "model.GGUF")
