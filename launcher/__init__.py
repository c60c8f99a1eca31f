"""One-command set-up: check a machine, run a workflow, run the tests, start the editor (``install.py`` is the entry).

Everything here needs the Python standard library only; the files in ``inside/`` are the exception: they are run as
scripts by the Python that has torch and ComfyUI's packages.
"""
