"""The real editor in Chromium: open the shipped workflow in two ways, run it, meet errors, read help."""

import itertools
import json
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from .damage import FOLDERS, PLACED
from .editor import BILINGUAL, SEVERAL, WORKFLOW
from .sight import shows_the_bilingual_prompt, shows_the_saved_prompt


@pytest.fixture
def editor(newcomer):
    """The editor with the shipped workflow open."""
    newcomer.close_templates()
    newcomer.open_from_list()
    return newcomer


def pixels(address: str) -> np.ndarray:
    with urllib.request.urlopen(address, timeout=60) as response:
        return np.asarray(Image.open(response).convert("RGB"))


def test_the_workflow_from_the_list_runs_and_shows_its_picture(editor):
    editor.screenshot("workflow")
    editor.run()
    address, width, height = editor.picture()
    editor.screenshot("picture")
    assert (width, height) == (256, 256)
    assert shows_the_saved_prompt(pixels(address))


def test_the_bilingual_workflow_runs_and_shows_what_was_sent(newcomer):
    newcomer.close_templates()
    newcomer.open_from_list(BILINGUAL)
    newcomer.screenshot("bilingual")
    assert all(node["known"] and not node["has_errors"] for node in newcomer.nodes())
    newcomer.run()
    address, _, _ = newcomer.picture()
    assert shows_the_bilingual_prompt(pixels(address))
    newcomer.page.get_by_text('写着红色文字"新年快乐"').first.wait_for()
    newcomer.screenshot("bilingual_picture")


def test_the_workflow_from_the_templates_runs(newcomer, pack):
    thumbnail = Image.open(pack / "workflows" / f"{WORKFLOW}.jpg")
    newcomer.page.get_by_text("All Templates").first.click()
    newcomer.page.get_by_placeholder("Search ...").fill(WORKFLOW)
    card = newcomer.test_id(f"template-workflow-{WORKFLOW}")
    card.wait_for()
    newcomer.page.wait_for_function(
        """([name, width]) => [...document.querySelectorAll(`[data-testid="template-workflow-${name}"] img`)]
            .some(image => image.src.startsWith('blob:') && image.naturalWidth === width)""",
        arg=[WORKFLOW, thumbnail.width],
    )
    newcomer.screenshot("templates")
    card.click()
    newcomer.wait_for_workflow()
    newcomer.run()
    address, _, _ = newcomer.picture()
    assert shows_the_saved_prompt(pixels(address))


def test_a_saved_picture_bears_its_name_and_opens_its_workflow(editor, base):
    prefix = "opened/%ZImageTurboSampler.steps%_%date:yyyy%"
    editor.set("ZImageTurboTextEncode", "text", "a green star")
    editor.set("ZImageTurboSaveImage", "filename_prefix", prefix)
    editor.run()
    address, _, _ = editor.picture()
    (file,) = (base / "output" / "opened").iterdir()
    assert file.name == f"8_{time.localtime().tm_year}_00001_.png"
    assert file.name in address
    editor.set("ZImageTurboTextEncode", "text", "another prompt")
    editor.open_file(file)
    editor.wait_for_value("ZImageTurboTextEncode", "text", "a green star")
    editor.wait_for_value("ZImageTurboSaveImage", "filename_prefix", prefix)
    assert all(node["known"] and not node["has_errors"] for node in editor.nodes())


@pytest.mark.parametrize("workflow", [WORKFLOW, BILINGUAL, SEVERAL])
def test_the_graph_stands_as_shipped(newcomer, pack, workflow):
    newcomer.close_templates()
    newcomer.open_from_list(workflow)
    shipped = json.loads((pack / "workflows" / f"{workflow}.json").read_text(encoding="utf-8"))
    nodes = newcomer.nodes()
    assert sorted(node["type"] for node in nodes) == sorted(node["type"] for node in shipped["nodes"])
    assert all(node["known"] and not node["has_errors"] for node in nodes), nodes
    assert sum(len(node["linked"]) for node in nodes) == len(shipped["links"]) == 7
    assert [node["title"] for node in nodes if node["size"][1] < node["needed"][1]] == []
    overlapping = [
        (one["title"], other["title"])
        for one, other in itertools.combinations(nodes, 2)
        if overlap(one["box"], other["box"])
    ]
    assert overlapping == []


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two rectangles [left, top, width, height] share a point."""
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def test_an_absent_file_is_shown_with_its_remedy(editor):
    editor.set("ZImageTurboLoader", "diffusion_model", "absent.safetensors")
    editor.run()
    overlay = editor.test_id("error-overlay")
    overlay.wait_for()
    assert "Z-Image-Turbo Loader" in overlay.inner_text() and "diffusion_model" in overlay.inner_text()
    assert [node["type"] for node in editor.nodes() if node["has_errors"]] == ["ZImageTurboLoader"]
    editor.test_id("error-overlay-see-errors").click()
    editor.page.get_by_role("button", name="Info for Z-Image-Turbo Loader - diffusion_model").click()
    editor.page.get_by_text("'absent.safetensors' is not in models/diffusion_models").wait_for()
    editor.screenshot("absent_file")


def test_a_corrupt_file_is_shown_with_its_remedy(editor, base, server):
    path = base / "models" / FOLDERS["diffusion_model"] / "corrupt.safetensors"
    path.write_bytes(bytes(4096))
    for name, value in (PLACED | {"diffusion_model": path.name}).items():
        editor.set("ZImageTurboLoader", name, value)
    editor.run()
    overlay = editor.test_id("error-overlay")
    overlay.wait_for()
    path.unlink()
    assert "Z-Image-Turbo Loader failed" in overlay.inner_text()
    editor.test_id("error-overlay-see-errors").click()
    editor.page.get_by_text("'corrupt.safetensors' (4,096 bytes) cannot be read").first.wait_for()
    editor.screenshot("corrupt_file")


@pytest.mark.parametrize("node_type", ["ZImageTurboLoader", "ZImageTurboSampler"])
def test_the_help_page_of_a_node_opens(editor, node_type, pack):
    heading = next(line for line in (pack / "web" / "docs" / f"{node_type}.md").read_text("utf-8").splitlines() if line)
    editor.select(node_type)
    editor.test_id("info-button").click()
    editor.page.get_by_role("heading", name=heading.lstrip("# "), exact=True).wait_for()
    editor.screenshot(f"help_{node_type}")
