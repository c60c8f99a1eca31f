"""The inputs that choose a solver, which two nodes have."""

from comfy_api.latest import io

from ..engine import ode


def inputs() -> list[io.Input]:
    """`solver` and `tolerance`, after all other inputs: saved workflows hold values by their place."""
    return [
        io.Combo.Input(
            "solver",
            options=list(ode.SOLVERS),
            default=ode.OFFICIAL,
            optional=True,
            tooltip="official: Euler's method, which the model was distilled for. implicit: follows the model's path "
            "more closely in as many evaluations. adaptive: likewise, in fewer where the path is straight.",
        ),
        io.Float.Input(
            "tolerance",
            default=ode.TOLERANCE,
            min=0.0,
            max=1.0,
            step=0.005,
            round=False,
            optional=True,
            advanced=True,
            tooltip="For adaptive: the error that a step may make, as a share of the latent's own size. Larger: fewer "
            "evaluations. 0: all steps are used.",
        ),
    ]
