"""Rank processes on several GPUs: started, asked and replaced by ComfyUI's process, which is none of them."""
