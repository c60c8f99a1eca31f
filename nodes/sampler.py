"""Z-Image-Turbo Sampler: the schedule of eight evaluations, from a prompt to a latent."""

from comfy_api.latest import io, ui

from ..engine import ode, sampling
from . import solvers

MAX_SIDE = 4096


class ZImageTurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboSampler",
            display_name="Z-Image-Turbo Sampler",
            category="Z-Image-Turbo",
            description="Draws a latent in eight model evaluations by the official schedule: shift 3, guidance off.",
            search_aliases=["ksampler", "z-image sampler", "turbo sampler"],
            inputs=[
                io.Model.Input("model", tooltip="A Z-Image-Turbo model, from our loader or a stock one."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The encoded prompt, or several of them, which are drawn in one batch. A negative prompt "
                    "has no effect without guidance.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise that the picture starts from. The same seed and inputs give the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=ode.NFE,
                    min=1,
                    max=100,
                    tooltip="The budget of model evaluations (NFE). The model is distilled for 8; more rarely helps.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 draws anew. With a latent_image, the lower, the more of it is kept.",
                ),
                *(
                    io.Int.Input(
                        side,
                        default=0,
                        min=0,
                        max=MAX_SIDE,
                        step=sampling.SIZE_STEP,
                        tooltip=f"{side.capitalize()} in pixels, a multiple of 16. 0: the size that the model was "
                        "trained at. Not used with a latent_image.",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures of each prompt, each from noise of its own. Not used with a latent_image.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="An encoded picture to start from (image to image), or an empty latent. For several "
                    "prompts a batch of as many, or of one.",
                ),
                *solvers.inputs(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The drawn latent, for VAE Decode."),
                io.String.Output(
                    display_name="report",
                    tooltip="Solver, evaluations used, sigmas and errors as JSON, for Z-Image-Turbo Save Image.",
                ),
            ],
            has_intermediate_output=True,  # shown again when the graph is opened anew
        )

    @classmethod
    def execute(
        cls, model, positive, seed, steps, denoise, width, height, batch_size, latent_image=None, **solving
    ) -> io.NodeOutput:
        if denoise < 1.0 and latent_image is None:
            raise ValueError(
                f"denoise is {denoise}, but there is no latent_image to keep. Connect one, or set denoise to 1."
            )
        positive, latent = sampling.starting_point(model, positive, width, height, batch_size, latent_image)
        levels = ode.sigmas(steps, denoise)
        latent, reports = sampling.sample_and_report(model, positive, latent, seed, levels, **solving)
        shown = filter(None, (*map(str, reports), sampling.size_remark(model, latent)))
        return io.NodeOutput(latent, ode.as_json(reports), ui=ui.PreviewText("\n\n".join(shown)))
