"""Scripts run by the Python environment of ComfyUI; each says in its docstring what it prints."""
