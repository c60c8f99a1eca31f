"""Z-Image-Turbo Text Encode: a prompt in English, Chinese or both, as CONDITIONING."""

from comfy_api.latest import io

from ..engine.text import encode


class ZImageTurboTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboTextEncode",
            display_name="Z-Image-Turbo Text Encode",
            category="Z-Image-Turbo",
            description='Encodes a prompt in English, Chinese or both. Text to be drawn goes into "double quotes".',
            search_aliases=["prompt", "clip text encode", "z-image prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from the loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the picture shows. Put words that are to be written in the picture in double quotes.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="The encoded prompt without padding, for any sampler.")],
        )

    @classmethod
    def execute(cls, clip, text) -> io.NodeOutput:
        return io.NodeOutput(encode(clip, text))
