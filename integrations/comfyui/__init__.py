"""A ComfyUI node that inserts tokens learned by ipgo-opt: copy this folder into ComfyUI's custom_nodes."""

from typing import Any, ClassVar

from .insert import insert, read_tokens


class InsertTokens:
    """Conditioning in, conditioning with the tokens of a file from the `embeddings` folder out."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "run"
    CATEGORY = "conditioning"
    STRENGTH: ClassVar[dict[str, float]] = {"default": 1.0, "min": 0.0, "max": 1.5, "step": 0.05}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI shows."""
        import folder_paths  # part of ComfyUI

        files = folder_paths.get_filename_list("embeddings")
        return {"required": {"conditioning": ("CONDITIONING",), "file": (files,), "strength": ("FLOAT", cls.STRENGTH)}}

    def run(self, conditioning: list[list[Any]], file: str, strength: float) -> tuple[list[list[Any]]]:
        """The node's work."""
        import folder_paths

        tokens, how = read_tokens(folder_paths.get_full_path("embeddings", file))
        return (insert(conditioning, tokens, strength, **how),)


NODE_CLASS_MAPPINGS = {"IpgoInsertTokens": InsertTokens}
NODE_DISPLAY_NAME_MAPPINGS = {"IpgoInsertTokens": "Insert learned tokens (ipgo-opt)"}
