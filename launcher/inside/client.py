"""Queues one prompt on a ComfyUI server and follows it over the websocket.

Run by the launcher with ComfyUI's Python (aiohttp is one of its dependencies): ``python client.py URL < prompt.json``.
Every line printed is one JSON object with an ``event``:

    accepted {prompt_id}             rejected {status, body}
    cached {nodes}                   running {node}
    step {node, value, max}          error {…ComfyUI's execution_error…}
    interrupted {}                   lost {reason}
    finished {outputs: node → output}

The last one is rejected, error, interrupted, lost or finished.
"""

import asyncio
import json
import sys
import uuid

import aiohttp

HISTORY_TIMEOUT = 30.0
ENDINGS = {"execution_success": "finished", "execution_error": "error", "execution_interrupted": "interrupted"}


def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)


def report_progress(nodes, last):
    """Emit a step for each running node whose (value, max) differs from ``last``; nodes of one step are left out."""
    for node, state in nodes.items():
        now = (state["value"], state["max"])
        if state["state"] == "running" and state["max"] > 1 and last.get(node) != now:
            last[node] = now
            emit("step", node=node, value=state["value"], max=state["max"])


async def follow(socket, prompt_id):
    """Read messages of ``prompt_id`` until it ends; return (event, data), or (None, reason) when the line breaks."""
    last = {}
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:  # previews are binary
            continue
        content = json.loads(message.data)
        kind, data = content["type"], content.get("data") or {}
        if data.get("prompt_id") != prompt_id:
            continue
        if kind in ENDINGS:
            return ENDINGS[kind], data
        if kind == "execution_cached" and data["nodes"]:
            emit("cached", nodes=data["nodes"])
        elif kind == "executing" and data["node"] is not None:
            emit("running", node=data.get("display_node") or data["node"])
        elif kind == "progress_state":
            report_progress(data["nodes"], last)
    return None, "the server closed the connection"


async def outputs_of(session, url, prompt_id):
    """Return the outputs by node. The history entry appears shortly after the message that the prompt has ended."""
    for _ in range(int(HISTORY_TIMEOUT / 0.1)):
        async with session.get(f"{url}/history/{prompt_id}") as answer:
            history = await answer.json()
        if prompt_id in history:
            return history[prompt_id]["outputs"]
        await asyncio.sleep(0.1)
    raise TimeoutError(f"prompt {prompt_id} ended but did not appear in the history within {HISTORY_TIMEOUT:.0f} s")


async def run(url, prompt):
    client_id = uuid.uuid4().hex
    address, query = f"{url}/ws", {"clientId": client_id}
    async with aiohttp.ClientSession() as session, session.ws_connect(address, params=query, max_msg_size=0) as socket:
        # Tell the server which messages we understand, as the editor does: it sends progress by node then.
        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client_id}) as answer:
            body = await answer.text()
            if answer.status != 200:
                emit("rejected", status=answer.status, body=body)
                return
        accepted = json.loads(body)
        prompt_id = accepted["prompt_id"]
        emit("accepted", prompt_id=prompt_id)
        if accepted.get("node_errors"):  # of outputs that are not drawn, while another one is
            emit("left_out", body=body)
        ending, data = await follow(socket, prompt_id)
        if ending == "finished":
            emit("finished", outputs=await outputs_of(session, url, prompt_id))
        elif ending is None:
            emit("lost", reason=data)
        else:
            emit(ending, **data)


def main():
    try:
        asyncio.run(run(sys.argv[1], json.load(sys.stdin)))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        emit("lost", reason=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
