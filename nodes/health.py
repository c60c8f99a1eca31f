"""Z-Image-Turbo Health: what /health says, in the graph."""

import json

from comfy_api.latest import io, ui

from server import PromptServer

from ..server.health import document


class ZImageTurboHealth(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboHealth",
            display_name="Z-Image-Turbo Health",
            category="Z-Image-Turbo",
            description="Shows what GET /health says: device, memory, loaded models, multi-gpu, queue, last error.",
            search_aliases=["status", "memory", "gpu"],
            inputs=[],
            outputs=[io.String.Output(display_name="health", tooltip="The state as JSON text.")],
            is_output_node=True,
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls):
        return float("nan")  # never equal to itself: the state is read anew on every run

    @classmethod
    def execute(cls) -> io.NodeOutput:
        text = json.dumps(document(PromptServer.instance), indent=2, ensure_ascii=False)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
