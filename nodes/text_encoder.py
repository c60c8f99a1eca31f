"""Z-Image-Turbo Text Encode: prompts in English, Chinese or both, as CONDITIONING."""

from comfy_api.latest import io, ui

from ..engine import progress, prompt_batch, prompts


class ZImageTurboTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboTextEncode",
            display_name="Z-Image-Turbo Text Encode",
            category="Z-Image-Turbo",
            description='Encodes prompts in English, Chinese or both. Text to be drawn goes into "double quotes"; '
            "[zh]…[/zh] marks what is Chinese.",
            search_aliases=["prompt", "clip text encode", "z-image prompt", "bilingual", "chinese", "batch prompts"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder from the loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the picture shows. Put words that are to be written in the picture in double quotes, "
                    "and Chinese in [zh]…[/zh]: there Chinese quotes and full-width signs are put right.",
                ),
                io.Boolean.Input(
                    "one_per_line",
                    default=False,
                    optional=True,
                    tooltip="Every line is a prompt of its own. All are drawn in one batch, a picture for each.",
                ),
                io.Combo.Input(
                    "spans",
                    options=list(prompts.SPANS),
                    default=prompts.ONE_CONTEXT,
                    optional=True,
                    advanced=True,
                    tooltip="How [zh] spans are encoded. one context: together with the rest, each word knowing those "
                    "before it. own segments: each span for itself, behind the rest.",
                ),
                io.Float.Input(
                    "zh_weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How much the [zh] spans say: 0 nothing, 1 as they are, more with emphasis.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    tooltip="The encoded prompt without padding, for any sampler; of several lines a row for each.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip, text, one_per_line=False, spans=prompts.ONE_CONTEXT, zh_weight=1.0) -> io.NodeOutput:
        given = prompts.lines(text) if one_per_line else [text]
        encoded, reports = zip(*prompts.encode_all(clip, given, spans, zh_weight), strict=True)
        shown = "\n\n".join(map(str, reports))
        progress.show(shown)
        return io.NodeOutput(prompt_batch.gathered(encoded), ui=ui.PreviewText(shown))
