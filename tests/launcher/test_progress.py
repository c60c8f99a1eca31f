"""What a running prompt prints, and how refusals and errors of the server are worded."""

import io
import json
from pathlib import Path

from zimage_turbo.launcher import queueing
from zimage_turbo.launcher.inside import client
from zimage_turbo.launcher.progress import Progress

PROMPT = {
    "1": {"class_type": "Loader", "inputs": {}, "_meta": {"title": "Load"}},
    "2": {"class_type": "KSampler", "inputs": {}},
}
LOG = Path("logs") / "run.log"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(stream, pause):
    times = iter(range(0, 1000))
    progress = Progress({"1": "Load", "2": "Sample"}, stream, lambda: next(times) * pause)
    for event in (
        {"event": "cached", "nodes": ["1"]},
        {"event": "accepted", "prompt_id": "x"},
        {"event": "running", "node": "2"},
        *({"event": "step", "node": "2", "value": value, "max": 3} for value in (1, 2, 3)),
    ):
        queueing.show(event, progress)
    progress.end()
    return stream.getvalue()


def test_log_gets_whole_lines():
    assert shown(io.StringIO(), pause=2).splitlines() == [
        "  unchanged, not run again: Load",
        "  Sample: step 1/3",
        "  Sample: step 2/3",
        "  Sample: step 3/3 (8.0 s)",
    ]


def test_log_is_not_flooded_by_fast_steps():
    assert shown(io.StringIO(), pause=0.01).splitlines()[1:] == ["  Sample: step 1/3", "  Sample: step 3/3 (0.0 s)"]


def test_terminal_counts_in_place():
    text = shown(Terminal(), pause=2)
    assert text.count("\n") == 2
    assert text.split("\r\x1b[K")[1:] == [
        "  Sample …",
        "  Sample: step 1/3",
        "  Sample: step 2/3",
        "  Sample: step 3/3",
        "  Sample: step 3/3 (8.0 s)\n",
    ]


def test_client_reports_each_step_once(capsys):
    last = {}
    node = {"value": 1, "max": 8, "state": "running"}
    states = {
        "2": node,
        "3": {"value": 0, "max": 1, "state": "running"},
        "1": {"value": 8, "max": 8, "state": "finished"},
    }
    client.report_progress(states, last)
    client.report_progress(states, last)
    client.report_progress({"2": {**node, "value": 2}}, last)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["node"], event["value"]) for event in events] == [("2", 1), ("2", 2)]


def test_refused_prompt_lists_each_node_s_errors():
    body = json.dumps(
        {
            "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed", "details": ""},
            "node_errors": {"2": {"errors": [{"message": "Value not in list", "details": "sampler_name: 'nope'"}]}},
        }
    )
    text = queueing.failure({"event": "rejected", "status": 400, "body": body}, PROMPT, LOG).render()
    assert "refused the workflow (HTTP 400)" in text
    assert "| Prompt outputs failed\n" in text
    assert "| node 2 (KSampler): Value not in list: sampler_name: 'nope'" in text


def test_answer_that_is_not_comfyui_s_is_shown_as_it_is():
    assert queueing.refusal("<html>bad gateway</html>", PROMPT) == "<html>bad gateway</html>"


def test_failed_node_is_named_with_message_and_where_to_look():
    ending = {"event": "error", "node_id": "1", "exception_message": "no such file\n", "traceback": ["  File x\n"]}
    error = queueing.failure(ending, PROMPT, LOG)
    assert error.reason == "node 1 (Load) failed: no such file"
    assert str(LOG) in error.remedy and not error.details


def test_cancelled_and_lost():
    assert "cancelled" in queueing.failure({"event": "interrupted"}, PROMPT, LOG).reason
    assert "lost: gone" in queueing.failure({"event": "lost", "reason": "gone"}, PROMPT, LOG).reason
