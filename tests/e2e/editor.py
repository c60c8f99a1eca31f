"""The graph editor in a real browser, driven as a user does."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page

from .servers import ARTIFACTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WORKFLOW = "Z-Image-Turbo_SingleCard"
BILINGUAL = "Z-Image-Turbo_Bilingual"
SEVERAL = "Z-Image-Turbo_8Card"
PATIENCE_MS = 60_000
SHOWN_PICTURES = """count => {
    const shown = window.app.graph.nodes
        .filter(node => node.type === 'ZImageTurboSaveImage')
        .flatMap(node => node.imgs ?? [])
        .filter(image => image.complete && image.naturalWidth > 0)
        .map(image => [image.src, image.naturalWidth, image.naturalHeight])
    return shown.length >= count && shown
}"""


def browser_path() -> str | None:
    """The Chromium named by CHROMIUM, or one on the PATH."""
    found = (shutil.which(name) for name in BROWSERS)
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


class Editor:
    """One page of the editor. Screenshots go to artifacts/."""

    def __init__(self, page: Page, url: str):
        self.page, self.url = page, url
        page.set_default_timeout(PATIENCE_MS)

    def open(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_function("() => window.app?.vueAppReady")
        self.test_id("queue-button").wait_for()

    def test_id(self, name: str) -> Locator:
        return self.page.get_by_test_id(name)

    def close_templates(self) -> None:
        """The first visit begins with the Templates dialog over everything."""
        self.test_id("template-workflows-content").wait_for()
        self.page.get_by_role("button", name="Close dialog").click()
        self.test_id("template-workflows-content").wait_for(state="hidden")

    def open_from_list(self, workflow: str = WORKFLOW) -> None:
        """Click a shipped workflow in the Workflows sidebar, then close the sidebar."""
        self.page.keyboard.press("w")
        self.test_id(f"tree-node-root/{workflow}.json").click()
        self.wait_for_workflow()
        self.page.keyboard.press("w")
        self.test_id("workflows-sidebar").wait_for(state="hidden")

    def wait_for_workflow(self) -> None:
        self.page.wait_for_function("() => window.app.graph?.nodes.some(node => node.type === 'ZImageTurboLoader')")

    def run(self) -> None:
        self.test_id("queue-button").click()

    def picture(self) -> tuple[str, int, int]:
        """Wait until the Save Image node has drawn its picture; its address, width and height."""
        return self.pictures(1)[0]

    def pictures(self, count: int) -> list[tuple[str, int, int]]:
        """The same of at least so many pictures."""
        return [tuple(each) for each in self.page.wait_for_function(SHOWN_PICTURES, arg=count).json_value()]

    def nodes(self) -> list[dict[str, Any]]:
        """What the graph knows of its nodes: type, errors, class and the rectangle with the title."""
        return self.page.evaluate(
            """() => window.app.graph.nodes.map(node => ({
                type: node.type,
                title: node.title,
                has_errors: Boolean(node.has_errors),
                known: node.type in LiteGraph.registered_node_types,
                box: Array.from(node.boundingRect),
                needed: Array.from(node.computeSize()),
                size: Array.from(node.size),
                linked: (node.inputs ?? []).filter(slot => slot.link != null).map(slot => slot.name),
            }))"""
        )

    def set(self, node_type: str, name: str, value: Any) -> None:
        """Give a field a value that its control would not offer."""
        self.page.evaluate(
            """([type, name, value]) => {
                const node = window.app.graph.nodes.find(node => node.type === type)
                node.widgets.find(widget => widget.name === name).value = value
            }""",
            [node_type, name, value],
        )

    def wait_for_value(self, node_type: str, name: str, value: Any) -> None:
        """Wait until a field has this value."""
        self.page.wait_for_function(
            """([type, name, value]) => window.app.graph?.nodes.find(node => node.type === type)
                ?.widgets.find(widget => widget.name === name)?.value === value""",
            arg=[node_type, name, value],
        )

    def open_file(self, path: Path) -> None:
        """As by the menu's Open."""
        self.page.locator("#comfy-file-input").set_input_files(path)

    def select(self, node_type: str) -> None:
        self.page.evaluate(
            """type => window.app.canvas.selectItems([window.app.graph.nodes.find(node => node.type === type)])""",
            node_type,
        )

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=ARTIFACTS / f"{name}.png")


def foreign_addresses() -> re.Pattern:
    """Everything that is not on this machine: the tests need no network."""
    return re.compile(r"^https?://(?!127\.0\.0\.1)")


def forget_settings(base: Path) -> None:
    """The next visit is a first visit."""
    (base / "user" / "default" / "comfy.settings.json").unlink(missing_ok=True)
