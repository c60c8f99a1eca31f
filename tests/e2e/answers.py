"""What the server must answer to a bad input: a clear sentence, and afterwards good pictures as before."""

import itertools

from .client import Client, Result
from .graphs import Graph, turbo

LONGEST = 400
_seeds = itertools.count(1000)


async def refused(comfy: Client, graph: Graph) -> dict[str, str]:
    """Post a graph that must be refused at once; the reasons by 'node class.input'."""
    status, body = await comfy.offer(graph)
    await still_draws(comfy)
    assert status == 400, body
    return {
        f"{node['class_type']}.{error['extra_info'].get('input_name')}": f"{error['message']}: {error['details']}"
        for node in body["node_errors"].values()
        for error in node["errors"]
    }


async def failed(comfy: Client, graph: Graph) -> Result:
    """Run a graph that must end with a node error."""
    result = await comfy.run(graph)
    await still_draws(comfy)
    assert result.status == "error", result.outputs
    return result


async def still_draws(comfy: Client) -> None:
    """A good prompt, never the cached one, succeeds; small, because it follows every bad one."""
    result = await comfy.run(turbo(seed=next(_seeds), steps=1, width=64, height=64))
    assert result.status == "success", result.messages


def assert_clear(message: str, says: tuple[str, ...]) -> None:
    """One short line that holds every given word, and nothing of the program's insides."""
    message = message.strip()
    missing = [word for word in says if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert "\n" not in message and len(message) <= LONGEST, f"not one short line: {message}"
    assert "Traceback" not in message
