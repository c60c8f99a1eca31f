"""The inputs that say how several GPUs share work."""

from comfy_api.latest import io

from ..engine import plan


def inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "num_gpus",
            default=0,
            min=0,
            max=64,
            optional=True,
            advanced=True,
            tooltip="With multi-gpu: how many GPUs, the first ones. 0: all. On a machine without any: how many "
            "processes; 0 is two.",
        ),
        io.Combo.Input(
            "split",
            options=list(plan.SPLITS),
            default=plan.AUTO,
            optional=True,
            advanced=True,
            tooltip="With multi-gpu: images: every picture is drawn by one GPU. sequence: all GPUs that "
            "NVLink joins, or without it all, draw each picture together. auto: what is faster, as measured once for "
            "sizes alike.",
        ),
    ]
