"""Z-Image-Turbo Sigmas: our schedule and solver for SamplerCustomAdvanced."""

from comfy_api.latest import io

from ..engine import ode, sampling
from . import solvers


class ZImageTurboSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboSigmas",
            display_name="Z-Image-Turbo Sigmas",
            category="Z-Image-Turbo",
            description="The official noise schedule and a solver, for the stock SamplerCustomAdvanced.",
            search_aliases=["scheduler", "basic scheduler", "z-image schedule"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=ode.NFE,
                    min=1,
                    max=100,
                    tooltip="The budget of model evaluations (NFE). The model is distilled for 8.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the schedule starts later, for image to image.",
                ),
                *solvers.inputs(),
            ],
            outputs=[
                io.Sigmas.Output(tooltip="Noise levels from 1 (or later, with denoise) to 0."),
                io.Sampler.Output(tooltip="The chosen solver."),
            ],
        )

    @classmethod
    def execute(cls, steps, denoise, solver=ode.OFFICIAL, tolerance=ode.TOLERANCE) -> io.NodeOutput:
        return io.NodeOutput(ode.sigmas(steps, denoise), sampling.sampler(solver, tolerance))
