"""ComfyUI nodes that decode and encode by halovae: exactly, in the memory there is."""

from .nodes import VAEDecodeExact, VAEEncodeExact

NODE_CLASS_MAPPINGS = {"HalovaeVAEDecode": VAEDecodeExact, "HalovaeVAEEncode": VAEEncodeExact}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HalovaeVAEDecode": "VAE Decode (exact, low memory)",
    "HalovaeVAEEncode": "VAE Encode (exact, low memory)",
}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
