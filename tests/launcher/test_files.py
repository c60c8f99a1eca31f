"""Links, the editor's workflow list, pictures: what the launcher does with a user's files."""

import struct

import pytest

from zimage_turbo.launcher import pack_link, pictures, shelf
from zimage_turbo.launcher.report import LauncherError


@pytest.fixture
def copied_pack(tmp_path):
    folder = tmp_path / "my pack"
    folder.mkdir()
    (folder / "install.py").touch()
    return folder


def test_pack_is_linked_once(tmp_path, copied_pack):
    nodes = tmp_path / "base" / "custom_nodes"
    assert pack_link.ensure(nodes, copied_pack) == ("z-image-turbo", True)
    assert (nodes / "z-image-turbo" / "install.py").is_file()
    assert pack_link.ensure(nodes, copied_pack) == ("z-image-turbo", False)


def test_pack_that_is_there_under_another_name_is_used(tmp_path, copied_pack):
    (tmp_path / "custom_nodes").mkdir()
    pack_link.make(tmp_path / "custom_nodes" / "turbo", copied_pack)
    assert pack_link.ensure(tmp_path / "custom_nodes", copied_pack) == ("turbo", False)


def test_link_to_a_folder_that_is_gone_is_replaced(tmp_path, copied_pack):
    nodes = tmp_path / "custom_nodes"
    nodes.mkdir()
    pack_link.make(nodes / "z-image-turbo", tmp_path / "moved away")
    assert pack_link.ensure(nodes, copied_pack) == ("z-image-turbo", True)
    assert (nodes / "z-image-turbo").resolve() == copied_pack


def test_other_folder_of_our_name_is_left_alone(tmp_path, copied_pack):
    other = tmp_path / "custom_nodes" / "z-image-turbo"
    other.mkdir(parents=True)
    with pytest.raises(LauncherError, match="exists and is not this pack"):
        pack_link.ensure(tmp_path / "custom_nodes", copied_pack)
    assert other.is_dir() and not other.is_symlink()


@pytest.fixture
def shipped(tmp_path):
    folder = tmp_path / "workflows"
    folder.mkdir()
    (folder / "One.json").write_text("1")
    (folder / "Two.json").write_text("2")
    return folder


def test_workflows_are_placed_and_updated(tmp_path, shipped):
    target, record = tmp_path / "user" / "workflows", tmp_path / "record.json"
    assert shelf.place(shipped, target, record) == (["One.json", "Two.json"], [])
    assert shelf.place(shipped, target, record) == ([], [])
    (shipped / "One.json").write_text("1, second version")
    assert shelf.place(shipped, target, record) == (["One.json"], [])
    assert (target / "One.json").read_text() == "1, second version"


def test_edited_workflow_stays(tmp_path, shipped):
    target, record = tmp_path / "user" / "workflows", tmp_path / "record.json"
    shelf.place(shipped, target, record)
    (target / "One.json").write_text("edited by the user")
    (shipped / "One.json").write_text("1, second version")
    assert shelf.place(shipped, target, record) == ([], ["One.json"])
    assert (target / "One.json").read_text() == "edited by the user"


def test_user_s_own_file_of_the_same_name_stays(tmp_path, shipped):
    target = tmp_path / "user" / "workflows"
    target.mkdir(parents=True)
    (target / "Two.json").write_text("mine")
    assert shelf.place(shipped, target, tmp_path / "record.json") == (["One.json"], ["Two.json"])
    assert (target / "Two.json").read_text() == "mine"


def test_list_in_another_folder_is_a_list_of_its_own(tmp_path, shipped):
    record = tmp_path / "record.json"
    shelf.place(shipped, tmp_path / "a", record)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "One.json").write_text("1, older, not written by us here")
    assert shelf.place(shipped, tmp_path / "b", record) == (["Two.json"], ["One.json"])


def image(name, kind="output"):
    return {"filename": name, "subfolder": "", "type": kind}


def test_saved_pictures_come_before_previews():
    outputs = {"1": {"images": [image("p.png", "temp")]}, "2": {"images": [image("s.png")], "text": ["8 NFE", 3]}}
    assert pictures.listed(outputs) == [image("s.png")]
    assert pictures.listed({"1": outputs["1"]}) == [image("p.png", "temp")]
    assert pictures.texts(outputs) == ["8 NFE"]


def test_pictures_never_replace_files_of_the_current_folder(tmp_path):
    (tmp_path / "a.png").touch()
    paths = pictures.targets([image("a.png"), image("a.png"), image("b.png")], None, tmp_path)
    assert [path.name for path in paths] == ["a2.png", "a3.png", "b.png"]


def test_named_output_is_numbered_from_the_second(tmp_path):
    paths = pictures.targets([image("a.png"), image("b.png")], tmp_path / "x.png", tmp_path)
    assert [path.name for path in paths] == ["x.png", "x_2.png"]


def test_size_of_a_picture(tmp_path):
    png = tmp_path / "a.png"
    png.write_bytes(pictures.PNG_SIGNATURE + b"\0\0\0\rIHDR" + struct.pack(">II", 1024, 512) + bytes(1476))
    assert pictures.size_text(png) == "1024x512, 2 kB"
    (tmp_path / "a.webp").write_bytes(bytes(3000))
    assert pictures.size_text(tmp_path / "a.webp") == "3 kB"
