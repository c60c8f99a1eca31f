"""Workflow files: both formats, the conversion between them, and --set."""

import copy
import json
from pathlib import Path

import pytest

from zimage_turbo.launcher import convert, schema, workflow
from zimage_turbo.launcher.report import LauncherError
from zimage_turbo.launcher.workflow import Change

DATA = Path(__file__).parent / "data"


def load(name):
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def object_info():
    """What ComfyUI 0.30's server says about the classes used here."""
    return load("object_info")


@pytest.fixture
def editor():
    """A graph saved by the real editor: fields, a dynamic combo, a primitive, reroute, notes, muted and bypassed."""
    return load("editor_workflow")


@pytest.fixture
def api():
    """The same graph as the editor itself sends it to the server."""
    return load("api_workflow")


def test_conversion_gives_what_the_editor_sends(editor, api, object_info):
    assert convert.to_api(editor, object_info) == api


def test_links_in_the_newer_notation(editor, api, object_info):
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    editor["links"] = [dict(zip(keys, link, strict=True)) for link in editor["links"]]
    assert convert.to_api(editor, object_info) == api


def test_seed_control_is_no_input_value(editor, object_info):
    sampler = next(node for node in editor["nodes"] if node["type"] == "KSampler")
    assert sampler["widgets_values"][:3] == [0, "randomize", 20]
    values = convert.field_values(sampler, object_info["KSampler"])
    assert (values["seed"], values["steps"], values["denoise"]) == (0, 20, 1)


def test_muted_source_leaves_the_input_out(editor, object_info):
    next(node for node in editor["nodes"] if node["type"] == "ImageScale")["mode"] = convert.MUTED
    prompt = convert.to_api(editor, object_info)
    assert "9" not in prompt and "images" not in prompt["5"]["inputs"]


def test_subgraph_is_refused_with_the_way_out(editor, object_info):
    editor["definitions"] = {"subgraphs": [{"id": "f00d", "name": "Upscaler"}]}
    editor["nodes"].append({"id": 99, "type": "f00d"})
    with pytest.raises(LauncherError, match="subgraph 'Upscaler'") as caught:
        convert.to_api(editor, object_info)
    assert "Export (API)" in caught.value.remedy


def test_unknown_class_is_named(editor, object_info):
    del object_info["ImageScale"]
    with pytest.raises(LauncherError, match="does not have: ImageScale"):
        convert.to_api(editor, object_info)


@pytest.mark.parametrize(
    ("text", "type_name", "value"),
    [
        ("8", "INT", 8),
        ("0.5", "FLOAT", 0.5),
        ("true", "BOOLEAN", True),
        ("euler", "COMBO", "euler"),
        ("a red circle", "STRING", "a red circle"),
        ("2024", "STRING", "2024"),
        ('"quoted"', "STRING", "quoted"),
        ("", "STRING", ""),
        ("[1, 2]", None, [1, 2]),
    ],
)
def test_values_are_read_by_the_input_s_type(text, type_name, value):
    assert workflow.parse_value(text, type_name) == value


@pytest.mark.parametrize("node", ["1", "Blank sheet", "EmptyImage"])
def test_set_by_id_title_or_class(api, object_info, node):
    before = copy.deepcopy(api)
    changed = workflow.apply(api, [Change.parse(f"{node}.width=300")], object_info)
    assert changed["1"]["inputs"]["width"] == 300
    assert api == before


def test_set_reaches_inputs_whose_name_or_node_has_dots(api, object_info):
    change = Change.parse("Resize Image/Mask.resize_type.multiplier=3.5")
    assert workflow.apply(api, [change], object_info)["2"]["inputs"]["resize_type.multiplier"] == 3.5
    api["1"]["_meta"]["title"] = "v1.5 sheet"
    assert workflow.apply(api, [Change.parse("v1.5 sheet.height=8")], object_info)["1"]["inputs"]["height"] == 8


def test_set_may_add_an_input_that_the_file_leaves_out(api, object_info):
    del api["1"]["inputs"]["color"]
    assert workflow.apply(api, [Change.parse("1.color=7")], object_info)["1"]["inputs"]["color"] == 7


def test_set_keeps_equal_signs_of_the_value(api, object_info):
    changed = workflow.apply(api, [Change.parse("5.filename_prefix=a=b")], object_info)
    assert changed["5"]["inputs"]["filename_prefix"] == "a=b"


@pytest.mark.parametrize("argument", ["steps=8", "1.width", "=", ".=1"])
def test_malformed_set_shows_the_form(argument):
    with pytest.raises(LauncherError) as caught:
        Change.parse(argument)
    assert "node.input=value" in caught.value.remedy


def test_set_lists_nodes_and_inputs_that_exist(api, object_info):
    with pytest.raises(LauncherError) as caught:
        workflow.apply(api, [Change.parse("Sampler.steps=8")], object_info)
    assert "1 = Blank sheet (EmptyImage)" in caught.value.remedy
    with pytest.raises(LauncherError, match="has no input 'widht'") as caught:
        workflow.apply(api, [Change.parse("1.widht=8")], object_info)
    assert "width, height, batch_size, color" in caught.value.remedy


def test_set_asks_for_the_id_when_a_name_fits_twice(api, object_info):
    api["20"] = copy.deepcopy(api["1"])
    with pytest.raises(LauncherError, match="2 nodes are called 'Blank sheet'") as caught:
        workflow.apply(api, [Change.parse("Blank sheet.width=8")], object_info)
    assert "1.width, 20.width" in caught.value.remedy


def test_dynamic_combo_shows_the_inputs_of_its_choice(object_info):
    shown = schema.inputs(object_info["ResizeImageMaskNode"], {"resize_type": "scale dimensions"})
    assert {"resize_type.width", "resize_type.height", "resize_type.crop"} <= set(shown)
    assert "resize_type.multiplier" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[1]", "not a ComfyUI workflow"), ('{"a": 1}', "not a ComfyUI workflow")],
)
def test_files_that_are_no_workflow(tmp_path, content, message):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(LauncherError, match=message):
        workflow.read(path)


def test_missing_file(tmp_path):
    with pytest.raises(LauncherError, match="No such file"):
        workflow.read(tmp_path / "none.json")


def test_shipped_workflows_are_read(pack):
    for path in sorted((pack / "workflows").rglob("*.json")):
        assert workflow.is_api_format(workflow.read(path)) is (path.parent.name == "api"), path
