"""The seam to ComfyUI, the only folder under trainers/ that imports it."""
