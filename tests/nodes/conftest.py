from .. import in_comfyui  # noqa: F401
