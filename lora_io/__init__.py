"""LoRA files and their key names; torch and safetensors only."""
