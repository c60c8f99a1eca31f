"""Z-Image-Turbo Loader: three models from files, a diffusers folder, or the demo."""

from comfy_api.latest import io

from ..engine import catalogue, devices, encodings, multi, progress
from ..engine.loading import load
from ..engine.model import ATTENTIONS, PRECISIONS
from . import parts, spreading


class ZImageTurboLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboLoader",
            display_name="Z-Image-Turbo Loader",
            category="Z-Image-Turbo",
            description="Loads the diffusion model, text encoder and VAE of Z-Image-Turbo. On 'auto', it takes the "
            "official files if they are in the models folder, else the built-in demo.",
            search_aliases=["z-image", "zimage", "turbo", "unet loader", "load diffusion model"],
            inputs=[
                *parts.inputs(),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="How the diffusion model is held and computed. 'auto': as stored, computed in what the "
                    "device does best. fp8: half the memory of bf16 and faster, from GeForce RTX 40 and H100 on. int4: "
                    "under a third of the memory, on any GPU, the text encoder too; int4-fp8: the same, computed in "
                    "FP8. fp16 is for GPUs before Ampere. A processor computes in fp32.",
                ),
                io.Combo.Input(
                    "device",
                    options=devices.options(),
                    default=devices.AUTO,
                    advanced=True,
                    tooltip="Where the three models run. 'auto' lets ComfyUI choose. 'multi-gpu' spreads the pictures "
                    "of a batch over several GPUs, by any sampler.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="The attention kernel. 'auto': the fastest on this GPU, measured once. hopper-fp8 "
                    "and triton-fp8 round to 8 bits as fp8 and int4-fp8 do, so 'auto' takes them with these only.",
                ),
                io.Boolean.Input(
                    "cache_quantised",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="With fp8 or int4: keep the quantised weights in a file beside the original, so that the "
                    "next start only reads it. Takes about 6.5 GB of disk for the official models.",
                ),
                *spreading.inputs(),
            ],
            outputs=[
                io.Model.Output(tooltip="The diffusion model. Every stock node that takes a MODEL takes it."),
                io.Clip.Output(tooltip="The text encoder. Every stock node that takes a CLIP takes it."),
                io.Vae.Output(tooltip="The VAE. Every stock node that takes a VAE takes it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, diffusion_model=None):
        if diffusion_model is None:  # linked, and known only when the graph runs, or missing
            return True
        return catalogue.problem("diffusion_model", diffusion_model) or True

    @classmethod
    def fingerprint_inputs(cls, diffusion_model, text_encoder, vae, **_):
        if None in (diffusion_model, text_encoder, vae):  # linked: the host's cache follows what they come from
            return ""
        return catalogue.resolve(diffusion_model, text_encoder, vae).fingerprint()

    @classmethod
    def execute(
        cls, diffusion_model, text_encoder, vae, precision, device, attention="auto", cache_quantised=False, **spreading
    ) -> io.NodeOutput:
        files = catalogue.resolve(diffusion_model, text_encoder, vae)
        many = multi.Spread.of(files, precision, attention, **spreading) if device == devices.MULTI_GPU else None
        models = load(files, precision, devices.resolve(device), attention, cache_quantised)
        if many is not None:
            multi.attach(models[0], models[2], many)
            encodings.attach(models[1], many, files.text_encoder)
            many.begin()
        remarks = [catalogue.remark(diffusion_model), many and many.remark]
        if said := "; ".join(filter(None, remarks)):
            progress.tell(said)
        return io.NodeOutput(*models)
