"""Z-Image-Turbo Save Image: PNG files as the host's Save Image writes them, compressed on all cores."""

import json
import os
from pathlib import Path

import comfy.utils
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..engine import pictures

REPORT = "zimage_turbo"  # keyword of what the sampler reports, in the file


class ZImageTurboSaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ZImageTurboSaveImage",
            display_name="Z-Image-Turbo Save Image",
            category="Z-Image-Turbo",
            description="Saves pictures as PNG in ComfyUI's output folder as Save Image does, compressed on all cores.",
            search_aliases=["save", "save image", "export image", "output image", "write image", "png"],
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="The prefix for the file to save. This may include formatting information such as "
                    "%date:yyyy-MM-dd% or %Empty Latent Image.width% to include values from nodes.",
                ),
                io.String.Input(
                    "report",
                    optional=True,
                    force_input=True,
                    tooltip="The report of Z-Image-Turbo Sampler, to be stored in the files as zimage_turbo.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        """Before anything is drawn; None if it is linked, and known only when the graph runs, or missing."""
        return filename_prefix is None or pictures.name_problem(filename_prefix) or True

    @classmethod
    def execute(cls, images, filename_prefix, report=None) -> io.NodeOutput:
        pictures.check(images)
        if problem := pictures.name_problem(filename_prefix):
            raise ValueError(problem)
        _, height, width, _ = images.shape
        progress = comfy.utils.ProgressBar(len(images))
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory(), width, height
            )
            files = [f"{name.replace('%batch_num%', str(i))}_{counter + i:05}_.png" for i in range(len(images))]
            paths = [Path(folder, file) for file in files]
            pictures.save(images, paths, cls._metadata(report), os.cpu_count(), lambda: progress.update(1))
        except OSError as error:
            raise OSError(
                f"filename_prefix is {filename_prefix!r}, but the picture cannot be written to the output folder: "
                f"{error.strerror}. Free space, let ComfyUI write there, or choose another prefix."
            ) from error
        saved = [ui.SavedResult(file, subfolder, io.FolderType.output) for file in files]
        return io.NodeOutput(ui=ui.SavedImages(saved))

    @classmethod
    def _metadata(cls, report: str | None) -> dict[str, str]:
        """What the file tells of its origin; the editor opens the workflow from it."""
        if args.disable_metadata:
            return {}
        known = {"prompt": cls.hidden.prompt} if cls.hidden.prompt is not None else {}
        texts = {key: json.dumps(value) for key, value in (known | (cls.hidden.extra_pnginfo or {})).items()}
        return texts if report is None else texts | {REPORT: report}
