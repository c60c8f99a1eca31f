"""Around ComfyUI's server: health."""
