"""The pack as a whole: its nodes' texts, its workflows, its metadata, its house rules."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_config.config_parser import extract_node_configuration
from PIL import Image

import nodes as host_nodes
import zimage_turbo
from zimage_turbo.launcher import convert, pyproject
from zimage_turbo.nodes import NODES
from zimage_turbo.server.health import VERSION

PACK = Path(zimage_turbo.__path__[0])
SCHEMAS = {node.define_schema().node_id: node.define_schema() for node in NODES}
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
ROOMS = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "server": {"server", "engine"},
    "nodes": {"nodes", "server", "engine"},
    "launcher": {"launcher"},
    "demo": {"demo"},
}
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server"}
NODE_LINES = 100
CHINESE = re.compile(r"[\u4e00-\u9fff]")

each_node = pytest.mark.parametrize("node_id", SCHEMAS)
each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)


def locale(name: str) -> dict:
    return json.loads((PACK / "locales/zh" / name).read_text(encoding="utf-8"))


# --- Nodes and their texts ---


@each_node
def test_node_id_can_be_translated_and_is_ours(node_id):
    assert re.fullmatch(r"ZImageTurbo[A-Za-z]+", node_id)  # the front end cuts translation keys at dots


@each_node
def test_every_part_of_a_node_is_described(node_id):
    schema = SCHEMAS[node_id]
    assert schema.display_name.startswith("Z-Image-Turbo ")
    assert schema.description
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip, f"{part.id or part.io_type} has no tooltip"
        assert not CHINESE.search(part.tooltip), f"{part.id}: Chinese belongs in locales/zh"


@each_node
def test_chinese_texts_cover_exactly_the_node(node_id):
    schema, texts = SCHEMAS[node_id], locale("nodeDefs.json")[node_id]
    assert set(texts) == {"display_name", "description", "inputs", "outputs"}
    assert CHINESE.search(texts["display_name"])
    assert CHINESE.search(texts["description"])
    assert list(texts["inputs"]) == [part.id for part in schema.inputs]
    assert list(texts["outputs"]) == [str(place) for place in range(len(schema.outputs))]
    for name, text in {**texts["inputs"], **texts["outputs"]}.items():
        assert set(text) == {"name", "tooltip"}, name
        assert text["name"], name
        assert CHINESE.search(text["tooltip"]), name


def test_chinese_texts_name_no_other_node():
    assert set(locale("nodeDefs.json")) == set(SCHEMAS)


def test_chinese_texts_cover_exactly_the_categories():
    words = {word for schema in SCHEMAS.values() for word in schema.category.split("/")}
    assert set(locale("main.json")["nodeCategories"]) == words


@each_node
def test_help_pages_are_headed_by_the_node_name(node_id):
    english = (PACK / f"web/docs/{node_id}.md").read_text(encoding="utf-8")
    chinese = (PACK / f"web/docs/{node_id}/zh.md").read_text(encoding="utf-8")
    assert english.splitlines()[0] == f"# {SCHEMAS[node_id].display_name}"
    assert chinese.splitlines()[0] == f"# {locale('nodeDefs.json')[node_id]['display_name']}"


def test_no_help_page_is_left_over():
    pages = {
        path.relative_to(PACK / "web/docs").as_posix() for path in (PACK / "web/docs").rglob("*") if path.is_file()
    }
    assert pages == {page for node_id in SCHEMAS for page in (f"{node_id}.md", f"{node_id}/zh.md")}


@pytest.mark.parametrize("path", sorted((PACK / "nodes").glob("*.py")), ids=lambda path: path.name)
def test_node_files_stay_thin(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= NODE_LINES


# --- Files ---


def json_files() -> list[Path]:
    """The pack's JSON files, without hidden folders (the launcher's home is one) and what tests write."""
    folders = [path for path in PACK.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [*PACK.glob("*.json"), *(path for folder in folders for path in folder.rglob("*.json"))]
    return sorted(path for path in found if not path.is_relative_to(PACK / "tests/artifacts"))


@pytest.mark.parametrize("path", json_files(), ids=lambda path: path.relative_to(PACK).as_posix())
def test_json_parses(path):
    json.loads(path.read_text(encoding="utf-8"))


# --- Workflows ---


@pytest.fixture(scope="module")
def object_info():
    """What /object_info says about the host's core nodes and ours, as far as the converter reads it."""
    classes = {**host_nodes.NODE_CLASS_MAPPINGS, **dict(zip(SCHEMAS, NODES, strict=True))}
    fields = {name: node.INPUT_TYPES() for name, node in classes.items()}
    return {
        name: {"input": groups, "input_order": {group: list(inputs) for group, inputs in groups.items()}}
        for name, groups in fields.items()
    }


def test_there_are_workflows():
    assert WORKFLOWS


@each_workflow
def test_workflow_has_a_thumbnail(workflow):
    with Image.open(workflow.with_suffix(".jpg")) as picture:
        picture.load()
        assert picture.format == "JPEG"
        assert min(picture.size) >= 256


@each_workflow
def test_workflow_equals_its_api_twin(workflow, object_info):
    def bare(graph: dict) -> dict:
        return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in graph.items()}

    twin = workflow.parent / "api" / workflow.name
    converted = convert.to_api(json.loads(workflow.read_text(encoding="utf-8")), object_info)
    assert bare(converted) == bare(json.loads(twin.read_text(encoding="utf-8")))


# --- Metadata ---


def test_pyproject_has_what_the_registry_asks_for():
    def value(table, key):
        return pyproject.read(PACK / "pyproject.toml", table, key)

    name = value("project", "name")
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", name)
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", value("project", "version"))
    assert value("project", "description")
    assert value("project", "requires-python") == ">=3.10"
    assert value("project.urls", "Repository").startswith("https://")
    assert value("tool.comfy", "PublisherId")
    assert value("tool.comfy", "DisplayName")
    assert value("tool.comfy", "requires-comfyui").startswith(">=")
    assert (PACK / value("project", "readme")).is_file()


def test_the_host_reads_pyproject():
    settings = extract_node_configuration(str(PACK))
    assert settings.project.version == VERSION
    assert (PACK / settings.project.license.file).is_file()
    assert settings.project.supported_os  # empty as soon as one classifier is unknown
    assert settings.project.supported_accelerators
    assert settings.project.supported_comfyui_version


def test_requirements_are_those_of_pyproject():
    lines = (PACK / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted == pyproject.read(PACK / "pyproject.toml", "project", "dependencies")


def test_changelog_begins_with_this_version():
    headings = re.findall(r"(?m)^## \[?v?(\d+\.\d+\.\d+)", (PACK / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert headings
    assert headings[0] == VERSION


# --- House rules ---


def imported(path: Path, text: str) -> tuple[set[str], set[str]]:
    """First parts of the modules that a file of the pack imports: relative ones (rooms), then absolute ones."""
    rooms, others = set(), set()
    for statement in ast.walk(ast.parse(text)):
        if isinstance(statement, ast.Import):
            others |= {alias.name.split(".")[0] for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            others.add(statement.module.split(".")[0])
        elif isinstance(statement, ast.ImportFrom):
            package = path.parent.parts
            start = package[: len(package) - statement.level + 1]
            names = [statement.module] if statement.module else [alias.name for alias in statement.names]
            rooms |= {(*start, *name.split("."))[0] for name in names}
    return rooms, others


@pytest.mark.parametrize(
    ("text", "rooms", "others"),
    [
        ("from ..nodes.loader import X", {"nodes"}, set()),
        ("from .. import nodes, demo", {"nodes", "demo"}, set()),
        ("from . import model\nfrom .vae import load", {"engine"}, set()),
        ("def f():\n    import comfy.sd\n    from torch import nn", set(), {"comfy", "torch"}),
    ],
)
def test_imports_are_seen(text, rooms, others):
    assert imported(Path("engine/file.py"), text) == (rooms, others)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downward(room):
    for path in sorted((PACK / room).rglob("*.py")):
        rooms, others = imported(path.relative_to(PACK), path.read_text(encoding="utf-8"))
        assert rooms <= ROOMS[room], path.name
        assert not others & (set(ROOMS) - HOST), f"{path.name}: the pack is imported relatively only"
        if room == "kernels":
            assert not others & HOST, f"{path.name}: kernels know torch and triton only"


IMPORT_ALL = """
import ast, importlib.util, json, logging, os, sys, threading
from pathlib import Path

pack, files = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
sys.path.insert(0, str(pack / "tests"))
import conftest
import torch

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    return {
        "sys.path": list(sys.path),
        "handlers": [f"{logger.name} {each} {id(each)}" for logger in loggers for each in logger.handlers],
        "levels": {logger.name: logger.level for logger in loggers if logger.level},
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "environment": dict(os.environ),
        "dtype": str(torch.get_default_dtype()),
        "gpu": torch.cuda.is_initialized(),
    }

# What the pack imports from elsewhere may do as it likes: it is imported before the first look.
for file in files:
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import) or isinstance(statement, ast.ImportFrom) and not statement.level:
            exec(compile(ast.Module([statement], []), str(file), "exec"), {})
before = state()
places = [str(pack)]
entry = importlib.util.spec_from_file_location("zimage_turbo", pack / "__init__.py", submodule_search_locations=places)
sys.modules["zimage_turbo"] = importlib.util.module_from_spec(entry)
entry.loader.exec_module(sys.modules["zimage_turbo"])
for file in files:
    importlib.import_module(".".join(("zimage_turbo", *file.relative_to(pack).with_suffix("").parts)))
after = state()
print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))
"""


def test_importing_does_nothing_but_define():
    files = [path for room in ("kernels", "engine", "server", "nodes") for path in sorted((PACK / room).rglob("*.py"))]
    command = [sys.executable, "-c", IMPORT_ALL, str(PACK), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_agrees(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--output-format", "concise", "."]
    done = subprocess.run(ruff, cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
