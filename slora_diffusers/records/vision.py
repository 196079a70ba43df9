"""Records of vision transformers, of the text encoders beside them, and of PyTorch's own attention.

They are matched by the class of one block, which every model of the family (headless, with a head, as a backbone or
inside another model) is built from. Where transformers 4 and 5 name the modules of a block differently, the record
names both; what a block does not have is passed over.
"""

from __future__ import annotations

from .base import Architecture, Sites, output, reads

_SELF = (reads("q_proj k_proj v_proj", "hidden_states"), *output("o_proj"))
_CLIP: Sites = {
    "self_attn": (reads("q_proj k_proj v_proj", "hidden_states"), *output("out_proj")),
    "mlp": output("fc1", "feed_forward"),
}
_T5_MLP = (reads("wi wi_0 wi_1", "hidden_states", name="feed_forward"),)


def _t5(encoder: str) -> Sites:
    cross = (reads("q", "hidden_states"), reads("k v", encoder, name="encoder_hidden_states"), *output("o"))
    return {
        "layer.*.SelfAttention": (reads("q k v", "hidden_states"), *output("o")),
        "layer.*.EncDecAttention": cross,
        "layer.*.DenseReluDense": _T5_MLP,
    }


RECORDS = (
    Architecture("CLIP, SigLIP (text and image)", ("CLIPEncoderLayer", "SiglipEncoderLayer"), _CLIP),
    Architecture("T5, mT5", ("T5Block", "MT5Block"), _t5("key_value_states")),
    Architecture("umT5", ("UMT5Block",), _t5("encoder_hidden_states")),
)
