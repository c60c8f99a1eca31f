"""Inputs that name the files of the three models."""

from comfy_api.latest import io

from ..engine import catalogue


def inputs() -> list[io.Combo.Input]:
    return [
        io.Combo.Input(
            "diffusion_model",
            options=catalogue.options("diffusion_model"),
            default=catalogue.AUTO,
            tooltip="A file in models/diffusion_models, a Z-Image folder in models/diffusers, or the demo. "
            "'auto': z_image_turbo_bf16.safetensors, else a folder with 'turbo' in its name, else the demo.",
        ),
        io.Combo.Input(
            "text_encoder",
            options=catalogue.options("text_encoder"),
            default=catalogue.AUTO,
            tooltip="A Qwen3-4B file in models/text_encoders. 'auto': the one that belongs to the diffusion model.",
        ),
        io.Combo.Input(
            "vae",
            options=catalogue.options("vae"),
            default=catalogue.AUTO,
            tooltip="A Flux-type VAE in models/vae. 'auto': the one that belongs to the diffusion model.",
        ),
    ]
