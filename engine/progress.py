"""What a node is doing, said in the log and as text on that node in the editor. Always English: the server says it."""

import logging

from comfy_execution.utils import get_executing_context


def tell(text: str) -> None:
    """Says it in the log and on the node."""
    logging.info("Z-Image-Turbo: %s", text)
    show(text)


def show(text: str) -> None:
    """Text on the node that this thread executes, in place of the one before; nothing where no node is executed."""
    context = get_executing_context()
    if context is None:
        return
    from server import PromptServer  # a process without a server never loads the host's

    server = PromptServer.instance
    server.send_progress_text(text, context.node_id, server.client_id)


def run() -> str | None:
    """The id of the prompt that this thread executes; None where it executes none."""
    context = get_executing_context()
    return context.prompt_id if context else None
