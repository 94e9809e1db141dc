"""hybrid_vit: hybrid convolution-attention vision backbones in JAX and Flax."""
