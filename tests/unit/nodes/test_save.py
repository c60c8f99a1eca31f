"""Our save node beside the host's: same names, same pixels, same metadata, same answer to the editor."""

import io
import json
import re

import folder_paths
import numpy as np
import pytest
import torch
from comfy.cli_args import args
from comfy_api.latest import io as comfy_io
from PIL import Image

import nodes
from zimage_turbo.nodes.save import ZImageTurboSaveImage

PROMPT = {"1": {"class_type": "ZImageTurboTextEncode", "inputs": {"text": "红色的圆 é"}}}
EXTRA = {"workflow": {"nodes": [{"title": "提示词"}]}, "zimage": [1, 2]}


@pytest.fixture
def output(tmp_path):
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


def batch(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 48, 32, 3, generator=torch.Generator().manual_seed(count))


def ours(images, prefix, prompt=PROMPT, extra=EXTRA, **inputs) -> dict:
    """What the node tells the editor."""
    hidden = {comfy_io.Hidden.prompt: prompt, comfy_io.Hidden.extra_pnginfo: extra}
    node = ZImageTurboSaveImage.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    result = node.execute(images, prefix, **inputs)
    assert result.result is None
    return result.ui.as_dict()


def theirs(images, prefix, prompt=PROMPT, extra=EXTRA) -> dict:
    return nodes.SaveImage().save_images(images, prefix, prompt, extra)["ui"]


def written(folder) -> dict[str, tuple[np.ndarray, dict]]:
    """Pixels and metadata of every file; empties the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            picture = Image.open(io.BytesIO(path.read_bytes()))
            found[str(path.relative_to(folder))] = np.asarray(picture), picture.info
            path.unlink()
    return found


@pytest.mark.parametrize(
    "prefix", ["ComfyUI", "shop/sign", "%width%x%height%/%year%_%batch_num%", "红色", "%batch_num%%batch_num%_"]
)
def test_files_and_answer_are_the_hosts(output, prefix):
    told, expected = [], []
    for save, answers in ((ours, told), (theirs, expected)):
        for count in (2, 3):  # the second call counts on
            answers.append(save(batch(count), prefix))
        answers.append(written(output))
    assert told[:2] == expected[:2]
    assert list(told[2]) == list(expected[2])
    assert told[2]
    for name, (pixels, information) in expected[2].items():
        assert np.array_equal(told[2][name][0], pixels)
        assert told[2][name][1] == information
        assert json.loads(information["workflow"]) == EXTRA["workflow"]


@pytest.mark.parametrize(("prompt", "extra"), [(None, None), (PROMPT, None), (None, EXTRA), (PROMPT, {})])
def test_metadata_that_is_not_there_is_not_written(output, prompt, extra):
    ours(batch(1), "a", prompt, extra)
    ((_, information),) = written(output).values()
    theirs(batch(1), "a", prompt, extra)
    ((_, expected),) = written(output).values()
    assert information == expected


def test_metadata_can_be_switched_off(output, monkeypatch):
    monkeypatch.setattr(args, "disable_metadata", True)
    ours(batch(1), "a", report="{}")
    ((_, information),) = written(output).values()
    assert information == {}


def test_the_samplers_report_stands_in_every_file(output):
    ours(batch(2), "a", report='{"nfe": 8}')
    for _, information in written(output).values():
        assert json.loads(information["zimage_turbo"]) == {"nfe": 8}
        assert json.loads(information["prompt"]) == PROMPT


def test_a_folder_that_cannot_be_written_is_named(output):
    (output / "taken").write_text("a file")
    with pytest.raises(OSError, match=r"filename_prefix is 'taken/a'.*Not a directory.*another prefix"):
        ours(batch(1), "taken/a")


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("x" * 238, "x" * 238),
        ("f" * 255 + "/" + "图" * 79, "f" * 255 + "/" + "图" * 79),
        ("a" * 230 + "%batch_num%" * 4, "a" * 230 + "0000"),  # longer than what is written
        ("f" * 300 + "/../b/", "b"),
    ],
)
def test_the_longest_names(output, prefix, name):
    assert ZImageTurboSaveImage.validate_inputs(filename_prefix=prefix) is True
    ours(batch(1), prefix)
    (file,) = written(output)
    assert file == f"{name}_00001_.png"


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("x" * 239, f"names a file '{'x' * 50}…' of 239 bytes, without a number; at most 238"),
        ("f" * 256 + "/a", f"names a folder '{'f' * 50}…' of 256 bytes, without a number; at most 255"),
        ("图" * 80, "of 240 bytes, without a number; at most 238"),
        ("f" * 250 + "/", "names a file"),
        ("a" * 230 + "\\" + "b" * 20, "names a file"),
        ("ok/\ud800", "holds half a character"),
    ],
)
def test_a_name_that_cannot_be_saved_is_told_of_before_anything_is_drawn(output, prefix, said):
    assert said in ZImageTurboSaveImage.validate_inputs(filename_prefix=prefix)
    with pytest.raises(ValueError, match=re.escape(said)):
        ours(batch(1), prefix)
    assert list(output.iterdir()) == []


def test_a_folder_outside_is_refused_as_by_the_host(output):
    with pytest.raises(Exception, match="outside the output folder"):
        ours(batch(1), "../outside")
    assert list(output.parent.glob("outside*")) == []


def test_a_mask_in_place_of_pictures_is_named(output):
    with pytest.raises(ValueError, match=r"images has the shape \[2, 48, 32\]"):
        ours(batch(2)[..., 0], "a")


def test_a_name_that_no_file_can_have_is_refused(output):
    assert "U+0000" in ZImageTurboSaveImage.validate_inputs(filename_prefix="a\0b")
    assert ZImageTurboSaveImage.validate_inputs(filename_prefix=None) is True  # linked
    assert ZImageTurboSaveImage.validate_inputs() is True  # missing, which the host tells of
    with pytest.raises(ValueError, match=r"filename_prefix is .* Delete it"):
        ours(batch(), "a\0b")
