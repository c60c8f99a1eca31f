"""Checks, runs, tests and starts the Z-Image-Turbo pack.

python install.py                    look at this machine and say what is missing (ComfyUI-Manager calls this)
python install.py run [workflow]     draw a picture; sets everything up on a fresh machine
python install.py test [arguments]   set everything up and run the tests
python install.py start              open the graph editor on port 7860
python install.py join URL           lend this machine's GPUs to multi-gpu on another one
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python gets a sentence, not a traceback
    sys.exit("Python 3.10 or newer is needed: run install.py with a newer one than " + sys.version.split()[0])

import argparse
import os
import signal
from pathlib import Path

from launcher import hosts
from launcher.check import check
from launcher.home import Home
from launcher.report import LauncherError
from launcher.run import run
from launcher.selftest import test
from launcher.start import start


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="install.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="command")

    running = commands.add_parser("run", help="draw a picture")
    running.add_argument("workflow", nargs="?", type=Path, help="workflow file, API or editor format (default: ours)")
    running.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI (default: that around the pack)")
    running.add_argument("--set", action="append", default=[], metavar="NODE.INPUT=VALUE", help="change an input")
    running.add_argument("--output", type=Path, metavar="FILE", help="where to write the picture")

    commands.add_parser("test", help="run the tests; what follows goes to pytest")

    starting = commands.add_parser("start", help="open the graph editor")
    number = ("--num_gpus", "--num-gpus")
    starting.add_argument(*number, type=int, metavar="N", help="use the first N GPUs (default: all)")
    starting.add_argument("--no-browser", action="store_true", help="do not open a browser")
    starting.add_argument("--port", type=int, default=7860, help="port of the editor (default: 7860)")
    starting.add_argument("--listen", default="127.0.0.1", metavar="ADDR", help="address (default: 127.0.0.1)")
    starting.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI (default: that around the pack)")
    starting.add_argument("--hosts", type=int, metavar="N", help="multi-gpu: N machines, this one included")
    starting.add_argument("--address", metavar="ADDR", help="multi-gpu: this machine's, as the other machines reach it")

    joining = commands.add_parser("join", help="lend this machine's GPUs to multi-gpu on another one")
    joining.add_argument("url", help="as the other machine's ComfyUI says, for example http://10.0.0.1:17860")
    joining.add_argument("--address", required=True, metavar="ADDR", help="of this machine, as the other reaches it")
    joining.add_argument(*number, type=int, metavar="N", help="lend the first N GPUs (default: all)")
    joining.add_argument("--comfyui", metavar="PATH", help="use this ComfyUI (default: that around the pack)")
    if arguments[:1] == ["test"]:  # argparse would take pytest's options for its own
        return argparse.Namespace(command="test", arguments=arguments[1:])
    return parser.parse_args(arguments)


def execute(options: argparse.Namespace, home: Home) -> int:
    if options.command == "run":
        run(home, options.workflow, options.comfyui, options.set, options.output)
        return 0
    if options.command == "test":
        return test(home, options.arguments)
    if options.command == "start":
        group = hosts.told(options.hosts, options.address, os.environ)
        start(home, options.num_gpus, not options.no_browser, options.port, options.listen, options.comfyui, group)
        return 0
    if options.command == "join":
        hosts.join(home, options.url, options.address, options.num_gpus, options.comfyui)
    return check(home)


def end_on_signals() -> None:
    """Turn SIGTERM into the KeyboardInterrupt that stops what we started; accept SIGINT even in the background."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that lacks a letter of a path must not end the set-up
    if os.name == "nt":
        os.system("")  # makes the Windows console understand the escape sequences that rewrite a line
    options = parse(sys.argv[1:])
    end_on_signals()
    try:
        return execute(options, Home.of(Path(os.path.abspath(__file__)).parent, os.environ))
    except LauncherError as error:
        print(error.render(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 0 if options.command in ("start", "join") else 130


if __name__ == "__main__":
    sys.exit(main())
